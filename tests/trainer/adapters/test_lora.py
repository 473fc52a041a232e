"""LoRA and DoRA on real classes: counts, freezing, reproducibility, switching off, merging."""

import copy

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from tests.trainer.adapters.small import WIDTH, adapt, output, small_text_encoder, small_unet, unet_input
from trainer.adapters.lora import (
    ADDED_ATTENTION_TARGETS,
    ATTENTION_TARGETS,
    CLIP_TEXT_TARGETS,
    adapter_parameters,
    add_lora,
    disabled,
    lora_layers,
    merge,
)
from trainer.adapters.weights import adapter_weights, load_adapter
from trainer.models.dropout import Dropout, use_logical_dropout
from trainer.rng import generator


@pytest.mark.parametrize(
    ("cross_attention_dim", "heads", "linear_projection", "parameters"), [(1024, (5, 10, 20, 20), True, 829_952), (768, 8, False, 797_184)]
)
def test_rank_4_on_stable_diffusion_adapts_128_layers_with_the_known_count_of_weights(
    cross_attention_dim: int, heads: int | tuple[int, ...], linear_projection: bool, parameters: int
) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            cross_attention_dim=cross_attention_dim,
            attention_head_dim=heads,  # pyright: ignore[reportArgumentType]
            use_linear_projection=linear_projection,
        )
        add_lora(unet, rank=4, alpha=4, targets=ATTENTION_TARGETS, generator=generator(0))
    assert len(lora_layers(unet)) == 128
    assert sum(parameter.numel() for parameter in adapter_parameters(unet).values()) == parameters


@pytest.mark.parametrize("dora", [False, True])
def test_only_the_adapter_trains_in_fp32_on_a_bf16_base_whose_function_it_does_not_change(dora: bool) -> None:
    unet = small_unet()
    before = output(unet)
    unet.bfloat16()
    add_lora(unet, rank=4, alpha=8, targets=ATTENTION_TARGETS, dora=dora, generator=generator(0))
    trained = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert trained == adapter_parameters(unet)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    base = {parameter.dtype for name, parameter in unet.named_parameters() if name not in trained}
    assert base == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(output(unet).float(), before, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_changes_nothing(dora: bool) -> None:
    unet = small_unet()
    before = output(unet)
    add_lora(unet, rank=2, alpha=4, targets=ATTENTION_TARGETS, dora=dora, generator=generator(0))
    torch.testing.assert_close(output(unet), before, atol=1e-6, rtol=0)


def test_the_adapter_is_a_function_of_its_generator_and_leaves_the_default_one_alone() -> None:
    state = torch.get_rng_state()
    drawn = []
    for unet in (small_unet(), small_unet().bfloat16()):
        add_lora(unet, rank=4, alpha=4, targets=ATTENTION_TARGETS, generator=generator(7))
        drawn.append(adapter_weights(unet).tensors)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    down = torch.cat([tensor.flatten() for name, tensor in drawn[0].items() if "lora_A" in name])
    assert down.std().item() == pytest.approx(1 / 4, rel=0.05)
    assert not any(tensor.any() for name, tensor in drawn[0].items() if "lora_B" in name)


def test_a_text_encoder_is_adapted_by_clips_names() -> None:
    text_encoder = small_text_encoder()
    add_lora(text_encoder, rank=2, alpha=2, targets=CLIP_TEXT_TARGETS, generator=generator(0))
    assert len(lora_layers(text_encoder)) == 2 * 4


def test_attention_to_added_keys_is_adapted_by_their_names() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16),
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            encoder_hid_dim=16,
            encoder_hid_dim_type="image_proj",
            cross_attention_dim=WIDTH,
        )
        add_lora(unet, rank=2, alpha=2, targets=ADDED_ATTENTION_TARGETS, generator=generator(0))
    assert any(name.endswith("add_k_proj") for name in lora_layers(unet))


def test_an_unknown_target_is_named_with_modules_that_exist() -> None:
    with pytest.raises(ValueError, match=r"'to_qq' matches no module of UNet2DConditionModel; it has to_q, .*to_out\.0"):
        add_lora(small_unet(), rank=4, alpha=4, targets=("to_q", "to_qq"), generator=generator(0))
    with pytest.raises(ValueError, match=r"norm1' matches .*, a LayerNorm; wanted linear layers"):
        add_lora(small_unet(), rank=4, alpha=4, targets=("transformer_blocks.0.norm1",), generator=generator(0))


def test_numbers_out_of_range_and_a_second_adapter_are_refused() -> None:
    unet = small_unet()
    with pytest.raises(ValueError, match=r"rank=0, alpha=4, dropout=0\.0: wanted a rank from 1"):
        add_lora(unet, rank=0, alpha=4, targets=ATTENTION_TARGETS, generator=generator(0))
    add_lora(unet, rank=4, alpha=4, targets=ATTENTION_TARGETS, generator=generator(0))
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(unet, rank=4, alpha=4, targets=ATTENTION_TARGETS, generator=generator(0))


@pytest.mark.parametrize("dora", [False, True])
def test_while_disabled_the_model_is_its_base_and_trains_on_afterwards(dora: bool) -> None:
    unet, base = small_unet(), output(small_unet())
    adapt(unet, targets=ATTENTION_TARGETS, dora=dora)
    adapted = output(unet)
    with disabled(unet):
        assert torch.equal(output(unet), base)
        assert all(parameter.requires_grad for parameter in adapter_parameters(unet).values())
    assert torch.equal(output(unet), adapted)
    assert (adapted - base).abs().max() > 0.01


@pytest.mark.parametrize("targets", [ATTENTION_TARGETS, (*ATTENTION_TARGETS, "proj_in", "conv1", "conv_shortcut", "ff.net.0.proj")])
@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_model_has_plain_names_and_the_same_output(dora: bool, targets: tuple[str, ...]) -> None:
    unet = small_unet()
    adapt(unet, targets=targets, alpha=8, dora=dora)
    adapted = output(unet)
    merge(unet)
    assert list(unet.state_dict()) == list(small_unet().state_dict())
    torch.testing.assert_close(output(unet), adapted, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="has no adapter to merge"):
        merge(unet)


def test_a_merge_that_fails_changes_nothing() -> None:
    unet = small_unet()
    adapt(unet, targets=ATTENTION_TARGETS)
    last = list(adapter_parameters(unet).values())[-1]
    with torch.no_grad():
        last[0, 0] = float("nan")
    before = copy.deepcopy(unet.state_dict())
    with pytest.raises(ValueError, match="the merged weight is not finite"):
        merge(unet)
    assert list(unet.state_dict()) == list(before)
    assert all(torch.equal(before[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in unet.state_dict().items())


@pytest.mark.parametrize("dora", [False, True])
def test_weights_move_to_another_model_and_the_average_can_take_their_place(dora: bool) -> None:
    unet, other = small_unet(), small_unet()
    adapt(unet, targets=ATTENTION_TARGETS, alpha=1, dora=dora)
    load_adapter(other, adapter_weights(unet))
    assert torch.equal(output(other), output(unet))
    averages = {name: parameter * 0.5 for name, parameter in adapter_parameters(unet).items()}
    halved, whole = adapter_weights(unet, averages).tensors, adapter_weights(unet).tensors
    assert all(torch.equal(halved[name], whole[name] * 0.5) for name in whole)


def test_weights_of_another_rank_are_refused() -> None:
    unet, other = small_unet(), small_unet()
    adapt(unet, targets=ATTENTION_TARGETS)
    adapt(other, targets=ATTENTION_TARGETS, rank=2)
    with pytest.raises(ValueError, match="the adapter has rank=4, the model's has rank=2"):
        load_adapter(other, adapter_weights(unet))


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_inside_an_adapter_becomes_the_logical_one(dora: bool) -> None:
    unet = small_unet()
    add_lora(unet, rank=4, alpha=4, targets=ATTENTION_TARGETS, dropout=0.5, dora=dora, generator=generator(0))
    with torch.no_grad():
        for name, parameter in adapter_parameters(unet).items():
            if "lora_B" in name:
                parameter.fill_(0.1)
    quiet = output(unet)
    assert torch.equal(output(unet), quiet)  # added in evaluation mode, it stays in it
    use_logical_dropout(unet)
    kinds = {type(layer.lora_dropout["default"]) for layer in lora_layers(unet).values()}
    assert kinds == {Dropout}
    assert not any(type(module) is nn.Dropout for module in unet.modules())
    assert torch.equal(output(unet.eval()), quiet)
    unet.train()
    assert not torch.equal(output(unet), quiet)


def test_gradients_reach_every_part_of_an_adapter_and_only_it() -> None:
    unet = small_unet()
    adapt(unet, targets=ATTENTION_TARGETS, dora=True)
    unet(**unet_input()).sample.square().mean().backward()
    with_gradient = {name for name, parameter in unet.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(adapter_parameters(unet))
