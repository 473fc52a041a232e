"""LoRA files: what stock diffusers draws with them, and what comes back from them."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from tests.tiny_models import tiny_tokenizer
from tests.trainer.adapters.small import WIDTH, adapt, drawn, pipeline, small_text_encoder, small_unet
from trainer.adapters.lora import ADDED_ATTENTION_TARGETS, ATTENTION_TARGETS, CLIP_TEXT_TARGETS, adapter_parameters
from trainer.adapters.lora_files import FILE_NAME, read_lora, write_diffusers, write_kohya
from trainer.adapters.weights import AdapterWeights, adapter_weights, load_adapter
from trainer.models.deprecated import DDPMWuerstchenScheduler, PriorTransformer, WuerstchenPrior, WuerstchenPriorPipeline
from trainer.rng import generator


def adapted(*, alpha: float = 4, dora: bool = False, text: bool = True) -> tuple[nn.Module, nn.Module, dict[str, AdapterWeights]]:
    """A U-Net and a text encoder with adapters, and the adapters."""
    unet, text_encoder = small_unet(), small_text_encoder()
    adapt(unet, targets=ATTENTION_TARGETS, alpha=alpha, dora=dora)
    parts = {"unet": adapter_weights(unet)}
    if text:
        adapt(text_encoder, targets=CLIP_TEXT_TARGETS, alpha=alpha, dora=dora)
        parts["text_encoder"] = adapter_weights(text_encoder)
    return unet, text_encoder, parts


def assert_same(found: Mapping[str, AdapterWeights], wanted: Mapping[str, AdapterWeights]) -> None:
    """Bit for bit, in the same order."""
    assert list(found) == list(wanted)
    for part, weights in wanted.items():
        assert (found[part].rank, found[part].alpha, found[part].dora) == (weights.rank, weights.alpha, weights.dora)
        assert list(found[part].tensors) == list(weights.tensors)
        assert all(torch.equal(found[part].tensors[name], tensor) for name, tensor in weights.tensors.items())


def small_models() -> dict[str, nn.Module]:
    """Models without adapters to read a file for."""
    return {"unet": small_unet(), "text_encoder": small_text_encoder()}


@pytest.mark.parametrize(("alpha", "text"), [(4, True), (8, True), (1, True), (8, False)])
@pytest.mark.parametrize(("form", "dora"), [("diffusers", False), ("diffusers", True), ("kohya", False)])
def test_a_stock_pipeline_draws_our_images_with_the_file(tmp_path: Path, form: str, dora: bool, alpha: int, text: bool) -> None:
    unet, text_encoder, parts = adapted(alpha=alpha, dora=dora, text=text)
    file = write_diffusers(tmp_path, parts) if form == "diffusers" else write_kohya(tmp_path / "kohya.safetensors", parts)
    stock = pipeline(small_unet(), small_text_encoder())
    stock.load_lora_weights(str(tmp_path), weight_name=file.name)
    torch.testing.assert_close(drawn(stock), drawn(pipeline(unet, text_encoder)), atol=1e-5, rtol=0)


def test_stock_diffusers_drops_the_magnitudes_of_kohyas_dora_which_only_its_own_form_keeps(tmp_path: Path) -> None:
    _, _, parts = adapted(dora=True)
    write_kohya(tmp_path / "kohya.safetensors", parts)
    stock = pipeline(small_unet(), small_text_encoder())
    stock.load_lora_weights(str(tmp_path), weight_name="kohya.safetensors")
    assert not any("magnitude" in name for name, _ in stock.unet.named_parameters())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("alpha", [4, 0.5])
def test_both_forms_come_back_bit_for_bit_and_one_turns_into_the_other(tmp_path: Path, alpha: float, dora: bool) -> None:
    _, _, parts = adapted(alpha=alpha, dora=dora)
    models = small_models()
    from_diffusers = read_lora(write_diffusers(tmp_path, parts).parent, models)
    assert_same(from_diffusers, parts)
    from_kohya = read_lora(write_kohya(tmp_path / "kohya.safetensors", from_diffusers), models)
    assert_same(from_kohya, parts)
    assert_same(read_lora(write_diffusers(tmp_path / "again", from_kohya), models), parts)


def test_convolutions_and_feed_forward_layers_go_through_both_forms(tmp_path: Path) -> None:
    unet = small_unet()
    adapt(unet, targets=("proj_in", "proj_out", "ff.net.0.proj", "conv1", "time_emb_proj"), dora=True)
    parts = {"unet": adapter_weights(unet)}
    assert_same(read_lora(write_diffusers(tmp_path, parts), {"unet": unet}), parts)
    assert_same(read_lora(write_kohya(tmp_path / "kohya.safetensors", parts), {"unet": small_unet()}), parts)


def test_keys_are_those_that_others_write(tmp_path: Path) -> None:
    _, _, parts = adapted()
    keys = load_file(write_diffusers(tmp_path, parts))
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert f"unet.{block}.to_out.0.lora_A.weight" in keys
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight" in keys
    keys = load_file(write_kohya(tmp_path / "kohya.safetensors", parts))
    assert f"lora_unet_{block.replace('.', '_')}_to_out_0.lora_down.weight" in keys
    assert keys["lora_te_text_model_encoder_layers_1_self_attn_out_proj.alpha"].item() == 4


def test_a_file_of_diffusers_scripts_is_read_with_alpha_equal_to_the_rank(tmp_path: Path) -> None:
    _, _, parts = adapted(alpha=4)
    names = {"lora_A.weight": "lora.down.weight", "lora_B.weight": "lora.up.weight"}
    tensors = {}
    for name, tensor in parts["unet"].tensors.items():
        for ours, theirs in names.items():
            if name.endswith(ours):
                tensors[f"unet.{name.removesuffix(ours)}{theirs}"] = tensor
    save_file(tensors, tmp_path / FILE_NAME, {"format": "pt"})
    assert_same(read_lora(tmp_path, small_models()), {"unet": parts["unet"]})


def test_wuerstchens_prior_is_loaded_by_its_stock_pipeline(tmp_path: Path) -> None:
    prior, text_encoder = wuerstchen_prior(), small_text_encoder()
    adapt(prior, targets=ATTENTION_TARGETS, alpha=8)
    adapt(text_encoder, targets=CLIP_TEXT_TARGETS, alpha=2)
    parts = {"prior": adapter_weights(prior), "text_encoder": adapter_weights(text_encoder)}
    write_diffusers(tmp_path, parts)
    stock = WuerstchenPriorPipeline(
        tokenizer=tiny_tokenizer(),  # pyright: ignore[reportArgumentType]
        text_encoder=small_text_encoder(),
        prior=wuerstchen_prior(),
        scheduler=DDPMWuerstchenScheduler(),
    )
    stock.load_lora_weights(str(tmp_path))
    numbers = generator(0, "input")
    latents, ids = torch.randn(2, 4, 4, 4, generator=numbers), torch.tensor([[2, 7, 8, 3]])
    with torch.no_grad():
        ours = prior(latents, torch.tensor([0.3, 0.7]), text_encoder(ids).last_hidden_state.repeat(2, 1, 1))
        theirs = stock.prior(latents, torch.tensor([0.3, 0.7]), stock.text_encoder(ids).last_hidden_state.repeat(2, 1, 1))
        base = wuerstchen_prior()(latents, torch.tensor([0.3, 0.7]), text_encoder(ids).last_hidden_state.repeat(2, 1, 1))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    assert (ours - base).abs().max() > 1e-3
    assert_same(read_lora(tmp_path, {"prior": wuerstchen_prior(), "text_encoder": small_text_encoder()}), parts)


@pytest.mark.parametrize("dora", [False, True])
def test_kandinskys_models_load_the_file_themselves(tmp_path: Path, dora: bool) -> None:
    prior, decoder = kandinsky_prior(), kandinsky_decoder()
    adapt(prior, targets=ATTENTION_TARGETS, alpha=8, dora=dora)
    adapt(decoder, targets=ADDED_ATTENTION_TARGETS, alpha=1, dora=dora)
    parts = {"prior": adapter_weights(prior), "unet": adapter_weights(decoder)}
    write_diffusers(tmp_path, parts)
    stock_prior, stock_decoder = kandinsky_prior(), kandinsky_decoder()
    stock_prior.load_lora_adapter(tmp_path, prefix="prior", weight_name=FILE_NAME)
    stock_decoder.load_lora_adapter(tmp_path, prefix="unet", weight_name=FILE_NAME)
    numbers = generator(0, "input")
    for ours, theirs, base, inputs in (
        (
            prior,
            stock_prior,
            kandinsky_prior(),
            {
                "hidden_states": torch.randn(2, 16, generator=numbers),
                "timestep": torch.tensor([3, 500]),
                "proj_embedding": torch.randn(2, 16, generator=numbers),
                "encoder_hidden_states": torch.randn(2, 5, 16, generator=numbers),
            },
        ),
        (
            decoder,
            stock_decoder,
            kandinsky_decoder(),
            {
                "sample": torch.randn(2, 4, 8, 8, generator=numbers),
                "timestep": torch.tensor([3, 500]),
                "encoder_hidden_states": None,
                "added_cond_kwargs": {"image_embeds": torch.randn(2, 16, generator=numbers)},
            },
        ),
    ):
        with torch.no_grad():
            torch.testing.assert_close(theirs(**inputs)[0], ours(**inputs)[0], atol=1e-5, rtol=0)
            assert (ours(**inputs)[0] - base(**inputs)[0]).abs().max() > 1e-3
    assert_same(read_lora(tmp_path, {"prior": kandinsky_prior(), "unet": kandinsky_decoder()}), parts)
    with pytest.raises(ValueError, match=r"kohya's form has no name for 'prior'"):
        write_kohya(tmp_path / "kohya.safetensors", parts)
    with pytest.raises(ValueError, match=r"kohya's form has no .*add_k_proj"):
        write_kohya(tmp_path / "kohya.safetensors", {"unet": parts["unet"]})


def test_training_goes_on_from_a_file(tmp_path: Path) -> None:
    unet, _, parts = adapted(alpha=8, text=False)
    write_diffusers(tmp_path, parts)
    fresh = small_unet()
    load_adapter(fresh, read_lora(tmp_path, {"unet": fresh})["unet"])
    assert all(parameter.requires_grad for parameter in adapter_parameters(fresh).values())
    assert list(adapter_parameters(fresh)) == list(adapter_parameters(unet))


def test_files_that_are_no_such_adapter_are_refused_by_name(tmp_path: Path) -> None:
    models = small_models()
    with pytest.raises(ValueError, match="no such file; wanted a LoRA in safetensors"):
        read_lora(tmp_path, models)
    (tmp_path / FILE_NAME).write_bytes(b"no tensors in here")
    with pytest.raises(ValueError, match="not a LoRA in safetensors"):
        read_lora(tmp_path, models)
    save_file({"unet.elsewhere.to_q.lora_A.weight": torch.zeros(4, 8)}, tmp_path / FILE_NAME)
    with pytest.raises(ValueError, match=r"unet\.elsewhere\.to_q\.lora_A\.weight belongs to no layer of unet, text_encoder"):
        read_lora(tmp_path, models)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"unet.{layer}.lora_A.weight": torch.zeros(4, 16)}, tmp_path / FILE_NAME)
    with pytest.raises(ValueError, match=r"to_q\.lora_B\.weight is missing or alone"):
        read_lora(tmp_path, models)


def test_layers_of_several_ranks_are_refused(tmp_path: Path) -> None:
    block = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    tensors = {}
    for layer, rank in (("to_q", 4), ("to_k", 2)):
        tensors |= {f"{block}.{layer}.lora_A.weight": torch.ones(rank, 16), f"{block}.{layer}.lora_B.weight": torch.ones(16, rank)}
    save_file(tensors, tmp_path / FILE_NAME)
    with pytest.raises(ValueError, match=r"the unet's layers have the ranks \[2, 4\]"):
        read_lora(tmp_path, small_models())


def wuerstchen_prior() -> WuerstchenPrior:
    """Two attention blocks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = WuerstchenPrior(c_in=4, c=16, c_cond=WIDTH, c_r=8, depth=2, nhead=2).eval()
        # Its last layer starts at zero, and would hide the adapter.
        return _noisy(prior)


def kandinsky_prior() -> PriorTransformer:
    """One block."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PriorTransformer(
            num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=16, num_embeddings=5, additional_embeddings=4
        ).eval()


def kandinsky_decoder() -> UNet2DConditionModel:
    """Attention to added keys, 8 channels out."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=8,
            block_out_channels=(8, 16),
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            addition_embed_type="image",
            addition_embed_type_num_heads=4,
            encoder_hid_dim=16,
            encoder_hid_dim_type="image_proj",
            cross_attention_dim=WIDTH,
            resnet_time_scale_shift="scale_shift",
        ).eval()


def _noisy(module: nn.Module) -> WuerstchenPrior:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert isinstance(module, WuerstchenPrior)
    return module
