"""Wuerstchen's prior: scale, loss as documented, adapters, recomputed activations, and folders that stock diffusers loads."""

import json
from inspect import signature
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from data_shards.encoders.efficient_net import EfficientNetEncoder
from data_shards.encoders.image import image_encoder
from data_shards.encoders.text import TextEncoder
from data_shards.reading.sample import MicroBatch
from tests.tiny_models import tiny_clip_text, tiny_tokenizer
from tests.tiny_priors import clip_text, normals, tensor, wuerstchen_decoder, wuerstchen_prior
from tests.trainer.models.states import encode_wuerstchen_prior
from trainer.models.attention import use_attention
from trainer.models.deprecated import DDPMWuerstchenScheduler, WuerstchenDecoderPipeline, WuerstchenPriorPipeline
from trainer.models.wuerstchen import (
    LORA_TARGETS,
    WuerstchenPriorDenoiser,
    from_prior_latents,
    loadable_index,
    to_prior_latents,
)
from trainer.objectives.continuous import continuous_denoising_loss

CPU = torch.device("cpu")
WEIGHTS = "pytorch_lora_weights.safetensors"


def stored(step: int) -> MicroBatch:
    """Two samples of shards that hold an encoder's latents and text states."""
    effnet, text = normals(step, (2, 16, 4, 4), (2, 16, 32))
    return MicroBatch(torch.empty(2, 3, 0, 0, dtype=torch.uint8), ("a", "b"), tensors={"image.npy": effnet.half(), "text.npy": text.half()})


def draws(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(2, 16, 4, 4, generator=generator), torch.rand(2, generator=generator, dtype=torch.float64)


def test_the_scale_is_the_one_that_the_pipeline_undoes() -> None:
    (effnet,) = normals(0, (2, 16, 4, 4))
    assert torch.equal(to_prior_latents(effnet), effnet.add(1.0).div(42.0))
    torch.testing.assert_close(from_prior_latents(to_prior_latents(effnet)), effnet)
    defaults = signature(WuerstchenPriorPipeline.__init__).parameters
    undone = to_prior_latents(effnet) * defaults["latent_mean"].default - defaults["latent_std"].default
    torch.testing.assert_close(undone, from_prior_latents(to_prior_latents(effnet)))


def test_losses_of_five_steps_are_the_documented_computations() -> None:
    ours, theirs = WuerstchenPriorDenoiser(wuerstchen_prior()), wuerstchen_prior()
    stock = DDPMWuerstchenScheduler()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2) for model in (ours, theirs)]
    ours.train()
    theirs.train()
    largest = 0.0
    for step in range(5):
        for index in range(3 * step, 3 * step + 3):
            noise, uniforms = draws(index)
            with torch.random.fork_rng():  # both draw dropout's masks
                torch.manual_seed(index)
                x_0, cond = encode_wuerstchen_prior(stored(index), image_encoder=None, text_encoder=None, device=CPU)
                found = continuous_denoising_loss(
                    lambda x_t, t, cond=cond: ours(x_t, t, cond).sample, x_0, noise=noise, uniforms=uniforms
                ).mean()
                (found / 3).backward()
            with torch.random.fork_rng():
                torch.manual_seed(index)
                latents = stored(index).tensors["image.npy"].float().add(1.0).div(42.0)
                times = uniforms.float()
                predicted = theirs(stock.add_noise(latents, noise, times), times, stored(index).tensors["text.npy"].float())
                wanted = functional.mse_loss(predicted, noise)
                (wanted / 3).backward()
            largest = max(largest, abs(found.item() - wanted.item()))
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert 0 <= largest < 1e-5
    before = wuerstchen_prior().state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in ours.prior.state_dict().items())


def test_live_encoders_give_what_their_models_give(tmp_path: Path) -> None:
    tiny_clip_text(tmp_path / "text")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        effnet = EfficientNetEncoder()
    torch.save({"effnet_state_dict": effnet.state_dict()}, tmp_path / "stage_b.pt")
    images = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 256).to(torch.uint8)
    batch = MicroBatch(images, ("a", "b"), captions=("a cat", None))
    text = TextEncoder(str(tmp_path / "text"), layer="last", tokens=0, masks=True, precision="fp32", device=CPU)
    image = image_encoder(str(tmp_path / "stage_b.pt"), precision="fp32", device=CPU)
    x_0, cond = encode_wuerstchen_prior(batch, image_encoder=image, text_encoder=text, device=CPU)
    mean, scale = (torch.tensor(three)[:, None, None] for three in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    padded = tiny_tokenizer()(["a cat", ""], padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(x_0, effnet((images / 255 - mean) / scale).add(1.0).div(42.0))
        wanted = text.module(padded.input_ids, attention_mask=padded.attention_mask).last_hidden_state
    torch.testing.assert_close(cond["text"], wanted)
    assert cond.keys() == {"text"} and x_0.shape == (2, 16, 2, 2)
    WuerstchenPriorDenoiser(wuerstchen_prior())(x_0, torch.tensor([0.1, 0.9]), cond).sample.sum().backward()  # no inference tensors


def test_what_shards_lack_is_named_with_its_mend() -> None:
    batch = stored(0)
    without = MicroBatch(batch.images, batch.keys, tensors={"text.npy": batch.tensors["text.npy"]})
    with pytest.raises(ValueError, match=r"hold no image\.npy, .*halfstep shards encode --image-encoder MODEL"):
        encode_wuerstchen_prior(without, image_encoder=None, text_encoder=None, device=CPU)
    without = MicroBatch(batch.images, batch.keys, tensors={"image.npy": batch.tensors["image.npy"]})
    with pytest.raises(ValueError, match=r"hold no text\.npy, .*halfstep shards encode --text-encoder MODEL"):
        encode_wuerstchen_prior(without, image_encoder=None, text_encoder=None, device=CPU)


def gradients(denoiser: WuerstchenPriorDenoiser) -> list[Tensor | None]:
    x_0, cond = encode_wuerstchen_prior(stored(0), image_encoder=None, text_encoder=None, device=CPU)
    denoiser.train().zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        denoiser(x_0, torch.tensor([0.3, 0.8]), cond).sample.square().mean().backward()
    return [parameter.grad for parameter in denoiser.parameters() if parameter.requires_grad]


def test_recomputed_activations_give_the_same_bits_dropout_included() -> None:
    kept, again = (WuerstchenPriorDenoiser(wuerstchen_prior()) for _ in range(2))
    again.checkpoint_activations()
    for one, other in zip(gradients(kept), gradients(again), strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_adapters_alone_are_trained_and_all_of_them_get_gradients() -> None:
    denoiser = WuerstchenPriorDenoiser(wuerstchen_prior())
    use_attention(denoiser.prior, "auto", CPU)
    denoiser.prior.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=list(LORA_TARGETS)))
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    trained = [name for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 4 * 2 and all("lora_" in name for name in trained)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients(denoiser))


def test_units_hold_all_but_small_weights() -> None:
    denoiser = WuerstchenPriorDenoiser(wuerstchen_prior())
    assert [type(unit).__name__ for unit in denoiser.units()] == ["ResBlock", "AttnBlock"] * 2


def test_stock_diffusers_reloads_the_prior_its_adapter_and_draws_the_same_images(tmp_path: Path) -> None:
    denoiser = WuerstchenPriorDenoiser(wuerstchen_prior()).eval()
    decoder, vqgan = wuerstchen_decoder()
    text, tokenizer, scheduler = clip_text(projects=False), tiny_tokenizer(), DDPMWuerstchenScheduler()
    tokenizer.model_max_length = 16
    first = WuerstchenPriorPipeline(tokenizer=tokenizer, text_encoder=text, prior=denoiser.prior, scheduler=scheduler)  # pyright: ignore[reportArgumentType]
    second = WuerstchenDecoderPipeline(tokenizer=tokenizer, text_encoder=text, decoder=decoder, scheduler=scheduler, vqgan=vqgan)  # pyright: ignore[reportArgumentType]
    first.save_pretrained(tmp_path / "prior")
    with pytest.raises(ValueError, match="has no class `WuerstchenPrior`"):
        WuerstchenPriorPipeline.from_pretrained(tmp_path / "prior", local_files_only=True)
    listing = tmp_path / "prior" / "model_index.json"
    listing.write_text(json.dumps(loadable_index(json.loads(listing.read_text()))))
    again = WuerstchenPriorPipeline.from_pretrained(tmp_path / "prior", local_files_only=True)
    assert torch.equal(images(again, second), images(first, second))

    config = LoraConfig(r=2, lora_alpha=4, target_modules=list(LORA_TARGETS), init_lora_weights="gaussian")
    denoiser.prior.add_adapter(config)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    (tmp_path / "adapter").mkdir()
    state = {f"prior.{name}": value for name, value in get_peft_model_state_dict(denoiser.prior).items()}
    told = {"r": 2, "lora_alpha": 4, "target_modules": sorted(LORA_TARGETS)}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps({f"prior.{name}": value for name, value in told.items()})}
    save_file(state, tmp_path / "adapter" / WEIGHTS, metadata=metadata)
    base = images(again, second)
    again.load_lora_weights(str(tmp_path / "adapter"), weight_name=WEIGHTS, local_files_only=True)
    adapted = images(again, second)
    assert torch.equal(adapted, images(first, second)) and not torch.equal(adapted, base)


def images(first: WuerstchenPriorPipeline, second: WuerstchenDecoderPipeline) -> Tensor:
    """Embeddings and images of two prompts, each with its own generator.

    The decoder would draw every embedding with every prompt, so it gets one at a time."""
    prompts, drawn = ["a cat", "a blue cup"], list[Tensor]()
    for pipeline in (first, second):
        pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    output = first(prompts, height=128, width=128, num_inference_steps=2, guidance_scale=3.0, generator=generators, return_dict=False)
    embeddings = tensor(output[0])
    for prompt, embedding, generator in zip(prompts, embeddings, generators, strict=True):
        told = {"num_inference_steps": 2, "guidance_scale": 0.0, "generator": generator, "output_type": "pt"}
        drawn.append(tensor(second(embedding[None], prompt, **told, return_dict=False)))
    assert all(bool(image.isfinite().all()) for image in drawn)
    return torch.cat([part.flatten() for part in (embeddings, *drawn)])
