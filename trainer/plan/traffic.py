"""Bytes that one rank sends in an optimizer step, by engine; rings, as NCCL and gloo make them for large messages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from trainer.plan.plan_input import BYTES, PlanInput


@final
@dataclass(frozen=True)
class Part:
    """Weights that are gathered or reduced together: shape and bytes an element of each, trained or frozen."""

    shape: tuple[int, ...]
    element_bytes: int
    trained: bool

    @property
    def count(self) -> int:
        """Elements of the whole."""
        count = 1
        for side in self.shape:
            count *= side
        return count


def bytes_sent(plan: PlanInput, parts: Sequence[Part]) -> Mapping[str, int]:
    """By collective, of one rank in one optimizer step.

    An all-reduce of S bytes on N ranks sends 2 (N - 1) / N S; a gather or a reduce-scatter half of that. FSDP2 deals rows to ranks:
    where there are fewer rows than ranks it fills up, and the filling travels too.
    Source: Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations", section 3."""
    ranks, repeats = plan.world_size, plan.accumulation
    trained_bytes = sum(part.count for part in parts if part.trained) * 4
    all_bytes = sum(part.count * part.element_bytes for part in parts)
    match plan.engine.kind:
        case "replicated":
            sent = {"all-reduce of gradients": 2 * _ring(trained_bytes, ranks)}
        case "fsdp":
            shards = ranks // plan.engine.replicas
            lower = None if plan.engine.precision == "fp32" else BYTES[plan.engine.precision]
            gathered = sum(_filled(part, shards) * (lower or part.element_bytes) for part in parts)
            reduced = sum(_filled(part, shards) * 4 for part in parts if part.trained)
            sent = {
                "all-gather of weights": 2 * repeats * _ring(gathered, shards),
                "reduce-scatter of gradients": repeats * _ring(reduced, shards),
                "all-reduce among replicas": 2 * repeats * _ring(reduced // shards, plan.engine.replicas),
            }
        case "deepspeed":
            gathers, gathered = (2 * repeats, all_bytes) if plan.engine.zero_stage == 3 else (1, trained_bytes)
            reductions = 1 if plan.engine.zero_stage == 1 else repeats
            sent = {
                "all-gather of weights": gathers * _ring(gathered, ranks),
                "reduce of gradients": reductions * _ring(trained_bytes, ranks),
            }
    return {name: size for name, size in sent.items() if size}


def _ring(size_bytes: int, ranks: int) -> int:
    return size_bytes * (ranks - 1) // ranks


def _filled(part: Part, shards: int) -> int:
    """Elements of a part whose rows are dealt to `shards` ranks, each filled up to as many as the first one has."""
    rows = part.shape[0] if part.shape else 1
    return -(-rows // shards) * shards * (part.count // max(rows, 1))
