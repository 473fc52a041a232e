"""Where DeepSpeed 0.19's ZeRO keeps what, as buffers without memory: it cannot itself be run on fake tensors."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from data_shards import ranks
from trainer.engines.engine import LossPerImage
from trainer.engines.precision import autocast
from trainer.engines.zero_partitions import bucket_elements
from trainer.models.network import network
from trainer.plan.live_bytes import LiveBytes

if TYPE_CHECKING:
    from trainer.plan.plan_input import PlanInput

_MOMENTS = 2


@final
class ZeroLayout:
    """The buffers of one rank under ZeRO 1, 2 or 3, and their life in a step.

    Weights, gradients and optimizer are fp32 to DeepSpeed. Stage 3 counts weights as gathered up to its limit, which a network of
    less than a thousand million weights stays under."""

    def __init__(self, module: nn.Module, *, stage: int, live: LiveBytes, on_gpu: bool, plan: "PlanInput") -> None:
        self.stage, self.live, self.precision = stage, live, plan.engine.precision
        self.network = network(module.train())
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        count = sum(parameter.numel() for parameter in self.trained)
        self.bucket = bucket_elements(count)
        self.share = -(-count // ranks.world_size())
        live.label("gathered" if stage == 3 else "weights", self.trained)
        self.kept = [self._buffer("weights", self.share)]
        self.kept += [self._buffer("averages", self.share) for _ in range(plan.averages)]
        self.kept += [self._buffer("moments", int(self.share * plan.moment_bytes / 4)) for _ in range(_MOMENTS)]
        if stage == 3:
            frozen = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters() if not parameter.requires_grad)
            self.kept.append(self._buffer("frozen", frozen // 4 // ranks.world_size() if ranks.world_size() > 1 else 0))
            self.kept += [self._buffer("weights", self.share), self._buffer("gradients", self.share), self._buffer("sent", self.bucket)]
        else:
            # DeepSpeed 0.19.8 copies the network's weights into one buffer, and something keeps the memory that they were in.
            self.kept.append(self._buffer("weights", count))
        # Two buckets where reduction overlaps the backward pass, as it does on GPUs.
        self.buckets = 0 if stage == 3 else 2 if on_gpu else 1
        self.filled = 0
        self.open_buckets: list[Tensor] = []
        self.reduced: list[Tensor] = []
        self.accumulated: list[Tensor] = []
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(self._reduce)

    def step(
        self, step: int, losses: Iterable[LossPerImage], *, learning_rate: float, votes: Sequence[float], loss_limit: float | None = None
    ) -> None:
        """The life of the buffers in one optimizer step; nothing is computed with them."""
        for loss_per_image in losses:
            with autocast(self.precision):
                loss = loss_per_image(self.network).mean()
            loss.backward()
            self._empty_bucket()
            self.accumulated = self.accumulated or self.reduced
            self.reduced, self.open_buckets = [], []
        flat = self._buffer("gradients", self.share)
        self.accumulated = []
        del flat
        for parameter in self.trained:
            parameter.grad = None

    def _reduce(self, parameter: Tensor) -> None:
        """A gradient goes into the bucket, which the first one opens, and when that is full this rank's share of it is kept."""
        self.open_buckets = self.open_buckets or [self._buffer("sent", self.bucket) for _ in range(self.buckets)]
        if self.stage > 1:
            parameter.grad = None
        self.filled += parameter.numel()
        if self.filled > self.bucket:
            self._empty_bucket()

    def _empty_bucket(self) -> None:
        self.filled = 0
        if self.stage == 2 and not self.reduced:
            self.reduced = [self._buffer("gradients", self.share)]

    def _buffer(self, kind: str, count: int) -> Tensor:
        buffer = torch.empty(count)
        self.live.label(kind, [buffer])
        return buffer
