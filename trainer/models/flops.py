"""What a model costs and what a GPU could do, in floating-point operations: the two sides of MFU."""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(build: Callable[[], nn.Module], *, image_shape: tuple[int, int, int]) -> int:
    """Operations of one image's forward pass: those of convolutions, matrix products and attention, 2 a multiply-add.

    build: makes a model of (images, timesteps); it is called once, without weights or memory, and draws no random number.
    image_shape: channels, height, width.
    0.13 s for the demo's U-Net on an AMD EPYC core."""
    # On the meta device, not in eager CPU kernels: those hide attention's products from the counter.
    with torch.device("meta"), torch.no_grad():
        model = build()
        images, timesteps = torch.empty(1, *image_shape), torch.zeros(1)
        with FlopCounterMode(display=False) as counter:
            model(images, timesteps)
    return counter.get_total_flops()


def flops_of(model: nn.Module, inputs: Callable[[], tuple[object, ...]]) -> int:
    """Operations of a forward pass of a model that is there already, counted as `forward_flops` does; nothing is computed.

    inputs: makes its arguments, called where tensors have shapes alone."""
    shapes = {name: _shape(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    # Fake tensors would do, too, at three times the cost: with peft's layers 3 seconds of a core before each start.
    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        functional_call(model, shapes, inputs())
    return counter.get_total_flops()


def training_forwards(model: nn.Module) -> float:
    """What a forward and a backward pass take, in forward passes: 3, or of a model that is trained in part (LoRA) little more than 2.

    One is for the outputs, one for the inputs' gradients, which a frozen layer amid the model hands on, too; and one for the weights'."""
    sizes = {kind: sum(weight.numel() for weight in model.parameters() if weight.requires_grad is kind) for kind in (True, False)}
    return 2 + sizes[True] / (sizes[True] + sizes[False])


def _shape(tensor: Tensor) -> Tensor:
    """A tensor without memory; in fp32, as no autocast brings types together there."""
    return torch.empty_like(tensor, device="meta", dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype)


# Peaks of one GPU without sparsity, in 1e12 operations a second: fp32 units (TF32 off), bf16 and fp16 tensor cores with
# fp32 accumulation; None: no such unit. The first name found as a word of the device's name counts.
# Source: NVIDIA data sheets (T4, V100, V100S, A10, A100, L4, L40S, H100, H200, HGX B200); those of Ada and later print twice the
# dense number, with sparsity.
_PEAKS: tuple[tuple[str, float, float | None, float], ...] = (
    ("T4", 8.1, None, 65.0),
    ("V100S", 16.4, None, 130.0),
    ("V100-SXM[23]", 15.7, None, 125.0),
    ("V100-PCIE", 14.0, None, 112.0),
    ("A10", 31.2, 125.0, 125.0),
    ("A100", 19.5, 312.0, 312.0),
    ("L4", 30.3, 121.0, 121.0),
    ("L40S", 91.6, 362.0, 362.0),
    ("H100 PCIe", 51.0, 756.5, 756.5),
    ("H100 NVL", 60.0, 835.5, 835.5),
    ("H100 80GB HBM3", 67.0, 989.5, 989.5),  # the SXM module
    ("H200 NVL", 60.0, 835.5, 835.5),
    ("H200", 67.0, 989.5, 989.5),
    ("B200", 75.0, 2250.0, 2250.0),
)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations a second that the data sheet promises for a device in fp32, bf16 or fp16; None where the table has none.

    A slice of a GPU (MIG) has none."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name.split():
        return None
    return named_peak(name, precision)


def named_peak(name: str, precision: str) -> float | None:
    """peak_flops of a GPU by the name that its driver gives it."""
    for pattern, fp32, bf16, fp16 in _PEAKS:
        if re.search(rf"\b{pattern}\b", name):
            teraflops = {"fp32": fp32, "bf16": bf16, "fp16": fp16}.get(precision)
            return None if teraflops is None else teraflops * 1e12
    return None
