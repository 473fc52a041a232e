"""Part e: xformers' attention against PyTorch's, for the shapes that the models use: how fast, and how near to fp32."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.benchmark import Timer

from gpu_parts.bench import Bench, Part, Step, markdown
from gpu_parts.budget import Row
from gpu_parts.faces import RECIPE as TINY_DIFFUSION
from trainer.architectures import read_architecture
from trainer.config import TinyUNetConfig
from trainer.config_io import load_recipe, recipe_path
from trainer.models.attention import xformers_trouble
from trainer.models.from_config import build_empty_model
from trainer.models.tiny_unet import build_tiny_unet
from trainer.rng import generator

Shape = tuple[int, int, int, int]
"""Heads, tokens that ask, tokens that are asked, channels of a head."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of queries, keys and values, each (images x heads, tokens, channels), as diffusers hands them over."""
_PARITY = 2.0
"""xformers may be so many times as far from fp32 as PyTorch's own kernels are."""


def model_shapes() -> Mapping[Shape, str]:
    """What the models ask of attention, and the first of them that does; nothing is computed."""
    tiny = load_recipe(recipe_path(TINY_DIFFUSION), []).model
    assert isinstance(tiny, TinyUNetConfig), "a model of pixels"
    stable, ddpm = (read_architecture(name).components["unet"] for name in ("stable_diffusion_2_1", "ddpm_celebahq_256"))
    found: dict[Shape, str] = {}
    with torch.device("meta"), torch.no_grad():
        for name, model, inputs in (
            ("tiny_diffusion_53m 64 px", build_tiny_unet(tiny, 64), (torch.empty(1, 3, 64, 64), torch.zeros(1))),
            ("SD 2.1 512 px", build_empty_model(stable), (torch.empty(1, 4, 64, 64), torch.zeros(1), torch.empty(1, 77, 1024))),
            ("DDPM 256 px", build_empty_model(ddpm), (torch.empty(1, 3, 256, 256), torch.zeros(1))),
        ):
            with _Asked() as asked:
                model(*inputs)
            found |= {shape: name for shape in asked.shapes if shape not in found}
    return found


@final
class _Asked(TorchFunctionMode):
    """Notes the shapes of attention within it."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[Shape, None] = {}

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: Collection[type],
        args: tuple[Tensor, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Tensor:
        """See TorchFunctionMode."""
        if func is scaled_dot_product_attention:
            query, key = args[:2]
            self.shapes[(query.shape[1], query.shape[2], key.shape[2], query.shape[3])] = None
        return func(*args, **(kwargs or {}))


def _steps(bench: Bench) -> Sequence[Step]:
    wanted = {shape: name for shape, name in model_shapes().items() if shape[1] <= bench.size.attention_tokens}
    return [("_".join(map(str, shape)), partial(_compare, bench, shape, name)) for shape, name in wanted.items()]


def _compare(bench: Bench, shape: Shape, model: str) -> Row:
    """Both kernels forward and backward, in bf16, on the same numbers."""
    heads, asking, asked, width = shape
    rows = bench.size.attention_batch * heads
    draws = generator(0, "benchmarks/gpu attention")
    sizes = ((rows, asking, width), (rows, asked, width), (rows, asked, width), (rows, asking, width))
    exact = [torch.randn(size, generator=draws).to(bench.device) for size in sizes]
    lower = [tensor.bfloat16() for tensor in exact]
    reference = _forth_and_back(_plain, [tensor.float() for tensor in lower])
    trouble = xformers_trouble(bench.device, torch.bfloat16, head_widths=(width,))
    kernels: dict[str, Attend] = {"sdpa": _sdpa}
    if trouble is None:
        kernels["xformers"] = import_module("xformers.ops").memory_efficient_attention
    row: Row = {"model": model, "heads": heads, "tokens": asking, "of": asked, "width": width, "batch": bench.size.attention_batch}
    for name, attend in kernels.items():
        row[f"{name}_error"] = max(_distance(*pair) for pair in zip(_forth_and_back(attend, lower), reference, strict=True))
        timer = Timer("run(attend, tensors)", globals={"run": _forth_and_back, "attend": attend, "tensors": lower})
        row[f"{name}_milliseconds"] = round(1e3 * timer.blocked_autorange(min_run_time=bench.size.attention_seconds).median, 4)
    if trouble is None:
        row["ratio"] = round(row["sdpa_milliseconds"] / row["xformers_milliseconds"], 3)
    return {**row, "xformers_trouble": trouble}


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    # a head of its own each, as PyTorch's fast kernels want four dimensions
    return scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]


def _plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value


def _forth_and_back(attend: Attend, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What comes out, and the gradients of queries, keys and values. tensors: these, and the gradient of what comes out."""
    inputs = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    out = attend(*inputs)
    return (out.detach(), *torch.autograd.grad(out, inputs, tensors[3]))


def _distance(got: Tensor, wanted: Tensor) -> float:
    """Relative, by the Euclidean norm."""
    return round(((got.float() - wanted).norm() / wanted.norm()).item(), 6)


def _table(rows: Mapping[str, Row]) -> list[str]:
    heads = ("model", "heads", "tokens", "of", "width", "SDPA ms", "xformers ms", "ratio", "SDPA error", "xformers error")
    keys = (
        "model",
        "heads",
        "tokens",
        "of",
        "width",
        "sdpa_milliseconds",
        "xformers_milliseconds",
        "ratio",
        "sdpa_error",
        "xformers_error",
    )
    troubles = sorted({row["xformers_trouble"] for row in rows.values() if row["xformers_trouble"]})
    lines = markdown(heads, [[row.get(key) for key in keys] for row in rows.values()])
    return [*lines, *(f"\nxformers: {trouble}" for trouble in troubles)]


def _met(rows: Mapping[str, Row]) -> bool | None:
    pairs = [(row["xformers_error"], row["sdpa_error"]) for row in rows.values() if "xformers_error" in row]
    return all(theirs <= _PARITY * own for theirs, own in pairs) if pairs else None


ATTENTION = Part(
    title="attention forward and backward in bf16: xformers against PyTorch's (a ratio above 1: xformers is faster)",
    aim=f"xformers' error at most {_PARITY:g} times that of PyTorch's kernels",
    steps=_steps,
    table=_table,
    met=_met,
)
