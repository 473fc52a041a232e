"""Kandinsky's prior and decoder: losses as documented, constants, adapters, recomputed activations, folders that stock diffusers loads."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UnCLIPScheduler
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import CLIPImageProcessorPil, T5Config, T5EncoderModel

from data_shards.encoders.image import image_encoder
from data_shards.encoders.text import TextEncoder
from data_shards.encoders.vae import LatentEncoder
from data_shards.reading.sample import MicroBatch
from tests.tiny_models import tiny_clip_text, tiny_clip_vision, tiny_tokenizer
from tests.tiny_priors import TOKENS, WIDTH, clip_text, clip_vision, kandinsky_prior, kandinsky_unet, movq, normals, tensor, text_mask
from tests.trainer.models.states import encode_kandinsky_decoder, encode_kandinsky_prior
from trainer.diffusion.schedule import alpha_bar_of_betas, cosine_betas, linear_betas
from trainer.models.attention import use_attention
from trainer.models.deprecated import KandinskyV22Pipeline, KandinskyV22PriorPipeline, PriorTransformer
from trainer.models.kandinsky import (
    LORA_TARGETS,
    ImageStatistics,
    KandinskyDecoderDenoiser,
    KandinskyPriorDenoiser,
    image_statistics,
)
from trainer.objectives.denoising import denoising_loss

CPU = torch.device("cpu")
WEIGHTS = "pytorch_lora_weights.safetensors"
NO_IMAGES = torch.empty(2, 3, 0, 0, dtype=torch.uint8)
PRIOR_SCHEDULER = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
DECODER_SCHEDULER = DDPMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)

Denoiser = KandinskyPriorDenoiser | KandinskyDecoderDenoiser


def stored(step: int) -> MicroBatch:
    """Two samples of shards that hold all that either model is told."""
    image, latents, text, pooled = normals(step, (2, WIDTH), (2, 4, 8, 8), (2, TOKENS, WIDTH), (2, WIDTH))
    tensors = {"image.npy": image, "latents.npy": latents, "text.npy": text, "pooled.npy": pooled}
    tensors = {name: value.half() for name, value in tensors.items()}
    return MicroBatch(NO_IMAGES, ("a", "b"), tensors={**tensors, "text_mask.npy": text_mask(2).to(torch.uint8)})


def encoded(denoiser: Denoiser, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    match denoiser:
        case KandinskyPriorDenoiser():
            statistics = image_statistics(denoiser.prior)
            return encode_kandinsky_prior(stored(step), statistics=statistics, image_encoder=None, text_encoder=None, device=CPU)
        case KandinskyDecoderDenoiser():
            return encode_kandinsky_decoder(stored(step), image_encoder=None, movq=None, device=CPU)


def documented_prior_loss(model: PriorTransformer, batch: MicroBatch, noise: Tensor, timesteps: Tensor, snr_gamma: float | None) -> Tensor:
    """As diffusers' example for the prior computes it."""
    noise_scheduler, tensors = PRIOR_SCHEDULER, {name: value.float() for name, value in batch.tensors.items()}
    target = (tensors["image.npy"] - model.clip_mean.detach()) / model.clip_std.detach()
    predicted = model(
        noise_scheduler.add_noise(target, noise, timesteps),  # pyright: ignore[reportArgumentType]
        timestep=timesteps,
        proj_embedding=tensors["pooled.npy"],
        encoder_hidden_states=tensors["text.npy"],
        attention_mask=batch.tensors["text_mask.npy"].bool(),  # pyright: ignore[reportArgumentType]
    ).predicted_image_embedding
    if snr_gamma is None:
        return functional.mse_loss(predicted, target)
    levels = noise_scheduler.alphas_cumprod[timesteps]
    weights = (levels / (1 - levels)).clamp(max=snr_gamma)
    return (functional.mse_loss(predicted, target, reduction="none").mean(1) * weights).mean()


def documented_decoder_loss(
    model: UNet2DConditionModel, batch: MicroBatch, noise: Tensor, timesteps: Tensor, snr_gamma: float | None
) -> Tensor:
    """As diffusers' example for the decoder computes it."""
    noise_scheduler = DECODER_SCHEDULER
    latents, image = batch.tensors["latents.npy"].float(), batch.tensors["image.npy"].float()
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)  # pyright: ignore[reportArgumentType]
    predicted = model(noisy, timesteps, None, added_cond_kwargs={"image_embeds": image}).sample[:, :4]
    if snr_gamma is None:
        return functional.mse_loss(predicted, noise)
    levels = noise_scheduler.alphas_cumprod[timesteps]
    snr = levels / (1 - levels)
    weights = snr.clamp(max=snr_gamma) / snr
    return (functional.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3)) * weights).mean()


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("kind", ["prior", "decoder"])
def test_losses_of_five_steps_are_the_documented_computations(kind: str, snr_gamma: float | None) -> None:
    if kind == "prior":
        ours, theirs = KandinskyPriorDenoiser(kandinsky_prior()), kandinsky_prior()
        alpha_bar, prediction, documented = alpha_bar_of_betas(cosine_betas(1000)), "x_0", partial(documented_prior_loss, theirs)
    else:
        ours, theirs = KandinskyDecoderDenoiser(kandinsky_unet()), kandinsky_unet()
        alpha_bar, prediction = alpha_bar_of_betas(linear_betas(0.00085, 0.012, steps=1000)), "eps"
        documented = partial(documented_decoder_loss, theirs)
    trained = [[weight for weight in model.parameters() if weight.requires_grad] for model in (ours, theirs)]
    optimizers = [torch.optim.AdamW(weights, lr=1e-3, weight_decay=1e-2) for weights in trained]
    largest = 0.0
    for step in range(5):
        for index in range(3 * step, 3 * step + 3):
            x_0, cond = encoded(ours, index)
            (noise,) = normals(1000 + index, tuple(x_0.shape))
            timesteps = torch.randint(0, 1000, (2,), generator=torch.Generator().manual_seed(index))
            sides = (..., *(None,) * (4 - x_0.ndim))  # an embedding as an image of one pixel
            found = denoising_loss(
                lambda x_t, timestep, cond=cond: ours(x_t, timestep, cond).sample[:, : x_t.shape[1]],
                x_0[sides],
                noise=noise[sides],
                uniforms=(timesteps.double() + 0.5) / 1000,
                alpha_bar=alpha_bar,
                prediction=prediction,
                loss="mse" if snr_gamma is None else "min_snr",
                min_snr_gamma=snr_gamma or 5.0,
            ).mean()
            wanted = documented(stored(index), noise, timesteps, snr_gamma)
            for loss in (found, wanted):
                (loss / 3).backward()
            largest = max(largest, abs(found.item() - wanted.item()))
        for weights, optimizer in zip(trained, optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert largest < 1e-5


def test_the_mean_and_deviation_of_embeddings_are_no_weights_and_stay_in_what_is_saved(tmp_path: Path) -> None:
    denoiser = KandinskyPriorDenoiser(kandinsky_prior())
    frozen = [name for name, parameter in denoiser.named_parameters() if not parameter.requires_grad]
    assert frozen == ["prior.clip_mean", "prior.clip_std"]
    denoiser.prior.save_pretrained(tmp_path)
    again = type(denoiser.prior).from_pretrained(tmp_path, local_files_only=True)
    assert torch.equal(again.clip_std, denoiser.prior.clip_std) and torch.equal(again.clip_mean, denoiser.prior.clip_mean)
    (embeds,) = normals(0, (3, WIDTH))
    standardised = image_statistics(again).standardise(embeds)
    torch.testing.assert_close(again.post_process_latents(standardised).detach(), embeds)


def test_a_prior_without_statistics_is_refused() -> None:
    prior = kandinsky_prior()
    with torch.no_grad():
        prior.clip_std[0, 3] = 0
    with pytest.raises(ValueError, match=r"clip_std holds numbers that are not above zero.*wanted the weights of a trained prior"):
        image_statistics(prior)


def test_the_decoder_puts_out_noise_and_behind_it_a_variance() -> None:
    denoiser = KandinskyDecoderDenoiser(kandinsky_unet())
    x_0, cond = encoded(denoiser, 0)
    output = denoiser(x_0, torch.tensor([3.0, 700.0]), cond).sample[:, : x_0.shape[1]]  # as the task cuts it
    assert output.shape == x_0.shape
    output.square().mean().backward()
    gradient = denoiser.unet.conv_out.weight.grad
    assert gradient is not None and gradient[:4].abs().min() > 0 and gradient[4:].abs().max() == 0


def test_live_encoders_give_what_stored_states_give_with_padding_masked_or_not(tmp_path: Path) -> None:
    tiny_clip_text(tmp_path / "text", projects=True)
    tiny_clip_vision(tmp_path / "vision")
    movq().save_pretrained(tmp_path / "movq")
    images = (torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 256).to(torch.uint8)
    live = MicroBatch(images, ("a", "b"), captions=("a cat", "a person of blue hair"))
    image = image_encoder(str(tmp_path / "vision"), precision="fp32", device=CPU)
    latent = LatentEncoder(str(tmp_path / "movq"), precision="fp32", device=CPU)
    unmasked, masked = (
        TextEncoder(str(tmp_path / "text"), layer="last", tokens=0, masks=masks, precision="fp32", device=CPU) for masks in (False, True)
    )
    made = masked.encode(["a cat", "a person of blue hair"])
    assert made.pooled is not None
    tensors = {"text.npy": made.hidden, "pooled.npy": made.pooled, "text_mask.npy": made.mask.to(torch.uint8)}
    with torch.no_grad():
        wanted = latent.module.encode(images.float() / 127.5 - 1).latents  # pyright: ignore[reportCallIssue]
    tensors |= {"image.npy": image.encode(images), "latents.npy": wanted}
    shards = MicroBatch(NO_IMAGES, ("a", "b"), tensors=tensors)

    (x_0, cond), (x_0_stored, cond_stored) = (
        encode_kandinsky_decoder(live, image_encoder=image, movq=latent, device=CPU),
        encode_kandinsky_decoder(shards, image_encoder=None, movq=None, device=CPU),
    )
    torch.testing.assert_close(x_0, x_0_stored)
    assert torch.equal(cond["image"], cond_stored["image"])

    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = KandinskyPriorDenoiser(
            PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=32, num_embeddings=TOKENS)
        )
    statistics = ImageStatistics(torch.zeros(1, 24), torch.full((1, 24), 0.5))
    (x_0, cond), (x_0_stored, cond_stored) = (
        encode_kandinsky_prior(live, statistics=statistics, image_encoder=image, text_encoder=unmasked, device=CPU),
        encode_kandinsky_prior(shards, statistics=statistics, image_encoder=None, text_encoder=None, device=CPU),
    )
    assert torch.equal(x_0, image.encode(images) * 2) and torch.equal(x_0, x_0_stored)
    assert (cond["text"] - cond_stored["text"]).abs().max() > 1e-3, "states of padding differ"
    x_t, pooled = normals(0, (2, 32), (2, 32))
    outputs = [prior(x_t, torch.tensor([3.0, 700.0]), {**said, "pooled": pooled}).sample for said in (cond, cond_stored)]
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(cond["pooled"], cond_stored["pooled"])
    outputs[0].sum().backward()  # what encoders gave can be saved for it


def test_what_shards_lack_is_named_with_its_mend() -> None:
    statistics = image_statistics(kandinsky_prior())
    whole = stored(0)
    for name, option in (("pooled.npy", "--text-encoder MODEL --pooled"), ("text_mask.npy", "--text-encoder MODEL --text-mask")):
        part = MicroBatch(NO_IMAGES, ("a", "b"), tensors={key: value for key, value in whole.tensors.items() if key != name})
        with pytest.raises(ValueError, match=rf"hold no {name}, .*halfstep shards encode {option}\)"):
            encode_kandinsky_prior(part, statistics=statistics, image_encoder=None, text_encoder=None, device=CPU)
    part = MicroBatch(NO_IMAGES, ("a", "b"), tensors={"image.npy": whole.tensors["image.npy"]})
    with pytest.raises(ValueError, match=r"hold no latents\.npy, .*halfstep shards encode --vae MODEL"):
        encode_kandinsky_decoder(part, image_encoder=None, movq=None, device=CPU)


def test_a_text_encoder_without_projection_is_refused(tmp_path: Path) -> None:
    T5EncoderModel(T5Config(vocab_size=80, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    text = TextEncoder(str(tmp_path), layer="last", tokens=8, masks=True, precision="fp32", device=CPU)
    with pytest.raises(ValueError, match="has no pooled text state; name CLIP's text encoder with its projection"):
        encode_kandinsky_prior(
            MicroBatch(NO_IMAGES, ("a", "b"), captions=("a", "b")),
            statistics=image_statistics(kandinsky_prior()),
            image_encoder=None,
            text_encoder=text,
            device=CPU,
        )


BUILDERS: tuple[Callable[[], Denoiser], ...] = (
    lambda: KandinskyPriorDenoiser(kandinsky_prior()),
    lambda: KandinskyDecoderDenoiser(kandinsky_unet()),
)


def gradients(denoiser: Denoiser) -> list[Tensor | None]:
    x_0, cond = encoded(denoiser, 0)
    denoiser.train().zero_grad()
    denoiser(x_0, torch.tensor([3.0, 700.0]), cond).sample.square().mean().backward()
    return [parameter.grad for parameter in denoiser.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("build", BUILDERS)
def test_recomputed_activations_give_the_same_bits_under_the_same_names(build: Callable[[], Denoiser]) -> None:
    kept, again = build(), build()
    again.checkpoint_activations()
    assert list(kept.state_dict()) == list(again.state_dict())
    for one, other in zip(gradients(kept), gradients(again), strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


@pytest.mark.parametrize(("build", "adapters"), list(zip(BUILDERS, (2 * 4, 4 * 6), strict=True)))
def test_adapters_alone_are_trained_and_all_of_them_get_gradients(build: Callable[[], Denoiser], adapters: int) -> None:
    denoiser = build()
    model = denoiser.prior if isinstance(denoiser, KandinskyPriorDenoiser) else denoiser.unet
    use_attention(model, "auto", CPU)
    adapt(model)
    trained = [name for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * adapters and all("lora_" in name for name in trained)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients(denoiser))


def adapt(model: PriorTransformer | UNet2DConditionModel) -> None:
    """Adapters that change the output, unlike fresh ones."""
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights="gaussian", target_modules=list(LORA_TARGETS)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)


def test_stock_diffusers_reloads_prior_and_decoder_and_their_adapters(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = TOKENS
    prior, unet = kandinsky_prior().eval(), kandinsky_unet().eval()
    first = KandinskyV22PriorPipeline(
        prior=prior,
        image_encoder=clip_vision(),
        text_encoder=clip_text(projects=True),  # pyright: ignore[reportArgumentType]
        tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
        scheduler=UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0),
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),  # pyright: ignore[reportArgumentType]
    )
    second = KandinskyV22Pipeline(unet=unet, scheduler=DECODER_SCHEDULER, movq=movq())
    first.save_pretrained(tmp_path / "prior")
    second.save_pretrained(tmp_path / "decoder")
    first_again = KandinskyV22PriorPipeline.from_pretrained(tmp_path / "prior", local_files_only=True)
    second_again = KandinskyV22Pipeline.from_pretrained(tmp_path / "decoder", local_files_only=True)
    base = images(first, second)
    assert torch.equal(images(first_again, second_again), base)

    for part, model, loaded in (("prior", prior, first_again.prior), ("unet", unet, second_again.unet)):
        adapt(model)
        told = {"r": 2, "lora_alpha": 4, "target_modules": sorted(LORA_TARGETS)}
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps({f"{part}.{name}": value for name, value in told.items()})}
        (tmp_path / part).mkdir(exist_ok=True)
        save_file(
            {f"{part}.{name}": value for name, value in get_peft_model_state_dict(model).items()}, tmp_path / part / WEIGHTS, metadata
        )
        loaded.load_lora_adapter(tmp_path / part, prefix=part, weight_name=WEIGHTS, local_files_only=True)
    adapted = images(first_again, second_again)
    assert torch.equal(adapted, images(first, second)) and not torch.equal(adapted, base)


def images(first: KandinskyV22PriorPipeline, second: KandinskyV22Pipeline) -> Tensor:
    """Embeddings and images of two prompts, each with its own generator."""
    for pipeline in (first, second):
        pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    told = first(["a cat", "a blue cup"], num_inference_steps=2, guidance_scale=2.0, generator=generators, return_dict=False)
    embeds, negative = (tensor(value) for value in told)
    output = second(embeds, negative, height=16, width=16, num_inference_steps=2, generator=generators, output_type="pt", return_dict=False)
    drawn = tensor(output[0])
    assert bool(drawn.isfinite().all()) and drawn.shape == (2, 3, 16, 16)
    return torch.cat((embeds.flatten(), drawn.flatten()))
