"""AdamW whose moments are kept in 8 bits, block by block; the arithmetic of a step is fp32, a few million elements at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 256
"""Elements that share one scale."""

# A number's exponent and the first 12 bits of its fraction find its code in a table: finer than any two codes are apart, and on a CPU
# 100 times as fast as a binary search, whose branches are not foreseeable (2 ns an element in place of 200, AMD EPYC).
_FRACTION_BITS = 12
_SHIFT = 23 - _FRACTION_BITS
_SMALLEST_EXPONENT = -24
_FIRST_CELL = (127 + _SMALLEST_EXPONENT) << _FRACTION_BITS
_LAST_CELL = (127 << _FRACTION_BITS) - _FIRST_CELL
# Smaller blocks keep this scale, so that no value falls below the smallest normal fp32 number and every one comes back to its own code.
_SMALLEST_SCALE = 2.0**-100


def dynamic_values(*, signed: bool) -> np.ndarray:
    """The 256 numbers in [-1, 1] that the codes 0 ... 255 stand for, fp32; code 0 is 0, and code 256 - c the negative of c if signed.

    A byte holds a sign (if signed), e zeros, a one, and a fraction in the bits left over: 10^-e * (0.1, 1] in equal steps.
    Both 1 and -1 are among them, unlike in the paper's own table: a block's largest element, whatever its sign, keeps its value.
    Source: Dettmers et al. 2021, arXiv:2110.02861, sections 1.3 and 2.2."""
    widest = 6 if signed else 7
    positive = [10.0**-e * (0.1 + 0.9 * (k + 1) / 2 ** (widest - e)) for e in range(widest + 1) for k in range(2 ** (widest - e))]
    values = np.zeros(256)
    values[1 : len(positive) + 1] = sorted(positive)
    if signed:
        values[-len(positive) :] = -values[len(positive) : 0 : -1]
    return values.astype(np.float32)


@final
class Moment:
    """Numbers in blocks: a byte each, and one fp32 scale a block. Quantising what `read` has given again changes no bit.

    Non-negative ones (signed false) are 0 only where they were 0: a second moment that were rounded to 0 would make a step of
    first moment / eps."""

    def __init__(self, blocks: int, *, signed: bool, like: Tensor) -> None:
        """All zeros. like: any tensor on the device."""
        values = dynamic_values(signed=signed)
        count = 128 if signed else 256
        cells = (np.arange(_LAST_CELL + 1, dtype=np.int64) + _FIRST_CELL << _SHIFT) + (1 << _SHIFT - 1)
        middles = cells.astype(np.int32).view(np.float32).astype(np.float64)
        between = (values[1:count].astype(np.float64) + values[: count - 1]) / 2
        nearest = np.searchsorted(between, middles)
        nearest = nearest if signed else np.maximum(nearest, 1)
        self.values = like.new_tensor(values.tolist())
        self.nearest = like.new_tensor(nearest.astype(np.uint8).view(np.int8).tolist(), dtype=torch.int8)
        self.codes = like.new_zeros((blocks, BLOCK), dtype=torch.int8)
        self.scales = like.new_zeros(blocks)

    def read(self, first: int, blocks: int) -> Float[Tensor, "blocks 256"]:
        """An fp32 copy of some blocks."""
        codes = self.codes[first : first + blocks].view(torch.uint8).int()
        values = self.values.index_select(0, codes.view(-1)).view(codes.shape)
        return values.mul_(self.scales[first : first + blocks, None])

    def write(self, first: int, values: Float[Tensor, "blocks 256"]) -> None:
        """Replace some blocks by the nearest numbers that the codes can say.

        Source: Dettmers et al. 2021, arXiv:2110.02861, equation 5 and section 2.1: the scale is a block's largest magnitude."""
        last = first + values.shape[0]
        scales = values.abs().amax(dim=1).clamp_min_(_SMALLEST_SCALE)
        normal = values / scales[:, None]
        sign = normal.sign().to(torch.int8)
        cells = normal.abs_().view(torch.int32).bitwise_right_shift_(_SHIFT).sub_(_FIRST_CELL).clamp_(0, _LAST_CELL)
        self.codes[first:last] = self.nearest.index_select(0, cells.view(-1)).view(cells.shape).mul_(sign)
        self.scales[first:last] = scales


@final
@dataclass(frozen=True, eq=False)
class Span:
    """Elements offset ... offset + count - 1 of a buffer that the optimizer updates."""

    buffer: Tensor
    offset: int
    count: int

    @property
    def blocks(self) -> int:
        """That it takes; the last one may be filled up."""
        return -(-self.count // BLOCK)


@final
class AdamW8bit(torch.optim.Optimizer):
    """AdamW on spans of buffers, none of whose blocks reaches into another span: so each can be saved and restored by itself.

    The loop sets the rate and `state[buffer]["step"]`, the updates that came before, ahead of each step.
    Source: Loshchilov & Hutter 2017, arXiv:1711.05101, algorithm 2; Dettmers et al. 2021, arXiv:2110.02861, section 2."""

    def __init__(self, parameters: Sequence[Tensor], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        super().__init__(list(parameters), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._groups: list[tuple[int, list[Span]]] = []
        self.moments: dict[str, Moment] = {}

    def lay_out(self, spans: Sequence[Span]) -> list[int]:
        """Take memory for the moments of spans, in the order given; returns the first block of each."""
        firsts = [0]
        for span in spans:
            firsts.append(firsts[-1] + span.blocks)
        if spans:
            like, blocks = spans[0].buffer.detach(), firsts[-1]
            self.moments = {"exp_avg": Moment(blocks, signed=True, like=like), "exp_avg_sq": Moment(blocks, signed=False, like=like)}
            # A step's fp32 copies: 4 MiB each, or 16 MiB so that a GPU is kept busy.
            self._groups = list(_grouped(spans, blocks=2**14 if like.is_cuda else 2**12))
        return firsts[:-1]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the buffers among the parameters at this call from their `grad`, and their moments."""
        due = {id(buffer) for buffer in self.param_groups[0]["params"]}
        rate, (beta_1, beta_2), eps, decay = (self.param_groups[0][key] for key in ("lr", "betas", "eps", "weight_decay"))
        for first, spans in self._groups:
            if id(spans[0].buffer) not in due:
                continue
            count = float(self.state[spans[0].buffer]["step"]) + 1
            weights = [span.buffer.detach()[span.offset : span.offset + span.count] for span in spans]
            gradient = weights[0].new_zeros(sum(span.blocks for span in spans), BLOCK)
            torch._foreach_copy_(_parts(gradient, spans), [_gradient(span) for span in spans])
            mean = self.moments["exp_avg"].read(first, len(gradient)).lerp_(gradient, 1 - beta_1)
            square = self.moments["exp_avg_sq"].read(first, len(gradient)).mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
            self.moments["exp_avg"].write(first, mean)
            self.moments["exp_avg_sq"].write(first, square)
            update = mean.div_(square.sqrt_().div_((1 - beta_2**count) ** 0.5).add_(eps))
            if decay:
                torch._foreach_mul_(weights, 1 - rate * decay)
            torch._foreach_add_(weights, _parts(update, spans), alpha=-rate / (1 - beta_1**count))


def _grouped(spans: Sequence[Span], *, blocks: int) -> Iterator[tuple[int, list[Span]]]:
    """Neighbouring spans, long ones cut between blocks, so that each group takes at most so many blocks; with its first block.

    Only buffers that would fit into a group share one: ZeRO-3 updates its large ones by a call each."""
    first, used, group = 0, 0, []
    for span in spans:
        at = 0
        while at < span.count:
            large = max(span.buffer.numel(), group[-1].buffer.numel() if group else 0) > blocks * BLOCK
            if group and (used == blocks or (large and group[-1].buffer is not span.buffer)):
                yield first, group
                first, used, group = first + used, 0, []
            part = Span(span.buffer, span.offset + at, min(span.count - at, (blocks - used) * BLOCK))
            group.append(part)
            at, used = at + part.count, used + part.blocks
    if group:
        yield first, group


def _parts(blocks: Tensor, spans: Sequence[Span]) -> list[Tensor]:
    """Where the spans' elements lie in their blocks, flat."""
    parts = blocks.view(-1).split([span.blocks * BLOCK for span in spans])
    return [part[: span.count] for part, span in zip(parts, spans, strict=True)]


def _gradient(span: Span) -> Tensor:
    assert span.buffer.grad is not None, "the engine gives every buffer a gradient"
    return span.buffer.grad[span.offset : span.offset + span.count]
