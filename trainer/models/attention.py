"""Which attention kernels a diffusers model uses: PyTorch's own (sdpa) or xformers'."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Literal, cast, final

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    XFormersAttnAddedKVProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

Kernels = Literal["sdpa", "xformers"]


def use_attention(
    model: ModelMixin,
    requested: Literal["auto", "sdpa", "xformers"],
    device: torch.device | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Kernels:
    """Switch all attention layers of a model to one kind of kernels, for training and inference; returns the kind.

    device: where it will run; None: where it is now. dtype: of the activations there. auto takes xformers where its kernels run
    on the device, forward and backward, at the model's head widths. On a CPU sdpa attends to few tokens in fp32 whatever the
    activations are. Layers with a processor of their own (IP adapters, fused projections) keep it.
    Raises: ValueError if xformers is asked for where it cannot work."""
    device = device or model.device
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    widths = sorted({layer.inner_dim // layer.heads for layer in layers})
    trouble = None if requested == "sdpa" else xformers_trouble(device, dtype, head_widths=widths)
    if requested == "xformers" and trouble:
        raise ValueError(f"engine.attention=xformers: {trouble}; or set engine.attention=auto")
    chosen: Kernels = "sdpa" if requested == "sdpa" or trouble else "xformers"
    for layer in layers:
        _switch(layer, chosen, in_fp32=device.type == "cpu" and dtype != torch.float32)
    return chosen


def xformers_trouble(device: torch.device, dtype: torch.dtype, *, head_widths: Iterable[int]) -> str | None:
    """Why xformers cannot train with heads of these widths on a device, and what would mend it; None where it can.

    It is tried, not looked up: a build that does not fit PyTorch, CUDA or the GPU imports well and has no kernels."""
    if device.type != "cuda":
        return f"its kernels need a CUDA device, and this rank has {device.type}; run it on a GPU"
    if find_spec("xformers") is None:
        return "it is not installed; pip install 'halfstep[xformers]'"
    if torch.are_deterministic_algorithms_enabled():
        return "its backward pass does not give the same bits every time; set engine.deterministic=false"
    for width in head_widths:
        if failure := first_failure(device, dtype, width):
            return f"its kernels do not run on {device} ({dtype}, heads of {width} channels): {failure}; install a build that fits"
    return None


@cache
def first_failure(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """First line of what xformers says when it attends once, forward and backward; None if it does. Draws no random number."""
    try:
        attend = import_module("xformers.ops").memory_efficient_attention
        with torch.enable_grad():
            query = torch.ones(2, 16, head_width, device=device, dtype=dtype, requires_grad=True)
            attend(query, query, query).sum().backward()
            query.sum().item()  # waits for the kernels: their faults show only then
    except Exception as error:  # a package that does not fit fails in any way
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


_SCORES_IN_FP32 = 512 * 512
"""Pairs of tokens of a head up to which a CPU attends in fp32: with 1,024 tokens bf16 is the faster by a seventh."""


class _AttendInFp32(TorchFunctionMode):
    """Within it scaled_dot_product_attention over few tokens computes in fp32 and returns the type that it was given."""

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: Collection[type],
        args: tuple[Tensor, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Tensor:
        """See TorchFunctionMode."""
        kwargs = kwargs or {}
        if (
            func is not scaled_dot_product_attention
            or args[0].shape[-2] * args[1].shape[-2] > _SCORES_IN_FP32
            or args[0].is_meta  # operations are counted: there are shapes alone, and meta has no autocast
        ):
            return func(*args, **kwargs)
        with torch.autocast(args[0].device.type, enabled=False):
            attended = func(*map(_raised, args), **{name: _raised(given) for name, given in kwargs.items()})
        return attended.to(args[0].dtype)


def _raised(given: object) -> object:
    """Numbers in fp32; anything else, such as a mask of truths, as it is."""
    return given.float() if isinstance(given, Tensor) and given.is_floating_point() else given


_Processor = Callable[..., Tensor]


class _Around(ABC):
    """A processor that calls another one."""

    # diffusers reads the names of the arguments, and passes on only those that it finds
    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        given = (attn, hidden_states, encoder_hidden_states, attention_mask)
        # the processors with added keys do not take the last one
        return self.attend(*given, *(() if temb is None else (temb,)))

    @abstractmethod
    def attend(self, attn: Attention, hidden: Tensor, encoded: Tensor | None, mask: Tensor | None, *temb: Tensor) -> Tensor:
        """Attend by the other one."""


@final
class InFp32(_Around):
    """PyTorch's attention over few tokens in fp32, between linear layers in the activations' type: more exact, and on CPUs faster.

    Their backward kernel is slow in bf16: 64 tokens of 4 heads of 32 channels, 16 images, take a core of an AMD EPYC 9.4 ms forward and
    backward, and 2.5 ms in fp32."""

    def __init__(self, process: _Processor) -> None:
        self.process = process

    def attend(self, attn: Attention, hidden: Tensor, encoded: Tensor | None, mask: Tensor | None, *temb: Tensor) -> Tensor:
        """See _Around."""
        with _AttendInFp32():
            return self.process(attn, hidden, encoded, mask, *temb)


@final
class XFormersUnlessMasked(_Around):
    """xformers' kernels where there is no mask, else PyTorch's.

    xformers refuses masks whose rows are not aligned to 16 bytes, such as a prior's over 81 tokens."""

    def __init__(self, unmasked: _Processor, masked: _Processor) -> None:
        self.unmasked, self.masked = unmasked, masked

    def attend(self, attn: Attention, hidden: Tensor, encoded: Tensor | None, mask: Tensor | None, *temb: Tensor) -> Tensor:
        """See _Around."""
        return (self.unmasked if mask is None else self.masked)(attn, hidden, encoded, mask, *temb)


def _unwrapped(processor: object) -> object:
    """Diffusers' own processor, from what was put around it."""
    match processor:
        case XFormersUnlessMasked(masked=inner) | InFp32(process=inner):
            return _unwrapped(inner)
    return processor


def _switch(layer: Attention, kernels: Kernels, *, in_fp32: bool) -> None:
    """Set a layer's processor; diffusers' own switch gives layers with added keys a wrong one on the way back."""
    match _unwrapped(layer.processor):
        case AttnProcessor() | AttnProcessor2_0() | XFormersAttnProcessor():
            # PyTorch's kernels by way of diffusers know one scale only
            sdpa, xformers = AttnProcessor2_0() if layer.scale_qk else AttnProcessor(), XFormersAttnProcessor()
        case AttnAddedKVProcessor() | AttnAddedKVProcessor2_0() | XFormersAttnAddedKVProcessor():
            sdpa, xformers = AttnAddedKVProcessor2_0(), XFormersAttnAddedKVProcessor()
        case _:
            return
    plain = InFp32(sdpa) if in_fp32 else sdpa
    processor = plain if kernels == "sdpa" else XFormersUnlessMasked(xformers, plain)
    layer.set_processor(cast("AttnProcessor", processor))  # diffusers' annotation names one class of many
