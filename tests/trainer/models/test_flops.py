"""Operations counted are operations computed by hand."""

import time

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.config import TinyUNetConfig, pixel_model
from trainer.config_io import load_recipe, recipe_path
from trainer.models.attention import use_attention
from trainer.models.flops import flops_of, forward_flops, peak_flops, training_forwards
from trainer.models.tiny_unet import build_tiny_unet

TINY = TinyUNetConfig(channels=(16, 32), attention=(False, True), attention_heads=2, norm_groups=4)


class Denoising(nn.Module):
    """One layer, called as a denoiser is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:
        return self.layer(images)


class Attending(nn.Module):
    """Attention among the pixels of a channel's rows."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(images, images, images)


@pytest.mark.parametrize(
    ("layer", "flops"),
    [
        (lambda: nn.Conv2d(3, 8, kernel_size=3, padding=1), 2 * 3 * 3 * 3 * 8 * 16 * 16),
        (lambda: nn.Conv2d(3, 8, kernel_size=3, padding=1, stride=2), 2 * 3 * 3 * 3 * 8 * 8 * 8),
        (lambda: nn.Linear(16, 5), 2 * 3 * 16 * 16 * 5),
        (Attending, 2 * 2 * 3 * 16 * 16 * 16),
    ],
    ids=["convolution", "strided convolution", "linear", "attention"],
)
def test_one_layer_costs_two_operations_a_multiply_add(layer: type[nn.Module], flops: int) -> None:
    assert forward_flops(lambda: Denoising(layer()), image_shape=(3, 16, 16)) == flops


def test_the_demos_network_is_counted_at_once_and_without_a_random_number() -> None:
    model, state = pixel_model(load_recipe(recipe_path("demo"), [])), torch.get_rng_state()
    started = time.process_time()
    flops = forward_flops(lambda: build_tiny_unet(model, 32), image_shape=(3, 32, 32))
    assert time.process_time() - started < 1.0
    assert flops == 769_376_256
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("trained", [(0, 1, 2, 3), (0, 3), (1,)])
def test_a_training_step_takes_what_is_counted_forward_and_backward(trained: tuple[int, ...]) -> None:
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4)))
    for number, layer in enumerate(model):
        layer.requires_grad_(number in trained)
    with FlopCounterMode(display=False) as counter:
        images = torch.zeros(8, 16, requires_grad=True)  # as from layers in front of these
        model(images).sum().backward()
    assert counter.get_total_flops() == training_forwards(model) * flops_of(model, lambda: (images,))


def test_attention_of_the_network_is_counted() -> None:
    """On the CPU's eager kernels it is not: the count there is lower by the products of the attention."""

    model = build_tiny_unet(TINY, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as eager:
        model(torch.zeros(1, 3, 16, 16), torch.zeros(1))
    tokens, width, layers = 8 * 8, 32, 4  # one layer down, one in the middle, two up; all at 8 by 8 pixels
    assert forward_flops(lambda: build_tiny_unet(TINY, 16), image_shape=(3, 16, 16)) == (
        eager.get_total_flops() + layers * 2 * 2 * tokens * tokens * width
    )


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("Tesla T4", "fp16", 65.0),
        ("Tesla T4", "bf16", None),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("Tesla V100-PCIE-32GB", "fp32", 14.0),
        ("NVIDIA A10", "bf16", 125.0),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "fp16", 835.5),
        ("NVIDIA H200", "fp32", 67.0),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA B200", "bf16", 2250.0),
        ("NVIDIA GB200", "bf16", None),
        ("NVIDIA GeForce RTX 4090", "bf16", None),
    ],
)
def test_peaks_are_those_of_the_named_gpu(name: str, precision: str, teraflops: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), precision) == (None if teraflops is None else teraflops * 1e12)


def test_a_processor_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu"), "fp32") is None


def test_a_model_that_is_there_costs_what_one_without_weights_costs_whatever_types_its_frozen_layers_have() -> None:
    model = build_tiny_unet(TINY, 16)
    wanted = forward_flops(lambda: build_tiny_unet(TINY, 16), image_shape=(3, 16, 16))
    model.mid_block.to(torch.bfloat16)  # pyright: ignore[reportOptionalMemberAccess] (it has one)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert flops_of(model, lambda: (torch.zeros(1, 3, 16, 16), torch.zeros(1))) == wanted
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_whose_attention_a_cpu_raises_to_fp32_is_counted_too() -> None:
    model = build_tiny_unet(TINY, 16)
    use_attention(model, "auto", torch.device("cpu"), dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        counted = flops_of(model, lambda: (torch.zeros(1, 3, 16, 16), torch.zeros(1)))
    assert counted == forward_flops(lambda: build_tiny_unet(TINY, 16), image_shape=(3, 16, 16))
