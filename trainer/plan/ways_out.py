"""Changes of a recipe that need less memory, cheapest in time first; each with the figures of a plan of its own."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import final

from torch import nn

from trainer.models.flops import named_peak
from trainer.plan.gpus import Gpu, Prices
from trainer.plan.plan import Plan, make_plan, speed_of
from trainer.plan.plan_input import PlanInput
from trainer.plan.work import Work, work_of

logger = logging.getLogger(__name__)

Change = Callable[[PlanInput], PlanInput]
Build = Callable[[], nn.Module]
WANTED = 3
MEASURED = 8
"""Changes that are measured at most: each takes about 10 s of a core for SD 2.1."""
_MOMENTS_OF_8_BITS = "optim.kind=adamw_8bit"
_KEPT_UNKNOWN = (0, 0)
"""Of a way out only the peak is shown."""


@final
@dataclass(frozen=True)
class WayOut:
    """One change that makes a run fit."""

    change: str
    """As KEY=VALUE words of the command line."""
    plan: Plan


def ways_out(plan: Plan, prices: Prices, *, wanted: int = WANTED) -> list[WayOut]:
    """Up to `wanted` changes after which the run fits, the fastest first.

    Single changes are tried first, then pairs of them where too few single ones do; no more than a few are measured."""
    assert plan.gpu is not None, "without a type of GPU nothing says that the run does not fit"
    name, gpu = plan.gpu
    works = {plan.source.build: plan.work}
    single = dict(_changes(plan.source, has_bf16=named_peak(gpu.peak, "bf16") is not None))
    found: list[WayOut] = []
    left = MEASURED
    for group in (single, _pairs(single)):
        if len(found) >= wanted:
            break
        altered = [(change, alter(plan.source)) for change, alter in group.items()]
        for _, source in altered:
            if source.build not in works:
                works[source.build] = work_of(source)
        worth = [(change, source) for change, source in altered if _least_bytes(source, works[source.build]) <= (plan.usable or 0)]
        for change, source in sorted(worth, key=lambda way: _step_seconds(way[1], works, prices, gpu)):
            if len(found) >= wanted or left == 0:
                break
            left -= 1
            logger.info("it does not fit; trying %s", change)
            other = make_plan(source, prices, name, work=works[source.build], kept=_KEPT_UNKNOWN)
            if other.fits:
                found.append(WayOut(change, other))
    return sorted(found, key=lambda way: _step_seconds(way.plan.source, works, prices, gpu))


def _least_bytes(source: PlanInput, work: Work) -> int:
    """A bound from below of what a rank's device holds, known without measuring: weights, moments and averages."""
    trained = work.trained * 4
    state = trained * (1 + 2 * source.moment_bytes / 4 + source.averages)
    if source.engine.cpu_offload:
        return 0
    if source.engine.kind == "replicated":
        return int(state) + trained
    return int(state) * source.engine.replicas // source.world_size


def _step_seconds(source: PlanInput, works: Mapping[Build, Work], prices: Prices, gpu: Gpu) -> float:
    speed = speed_of(source, works[source.build], prices, gpu)
    return speed.step_seconds if speed else float("inf")


def _changes(source: PlanInput, *, has_bf16: bool) -> Iterator[tuple[str, Change]]:
    engine = source.engine
    if engine.precision == "fp32":
        precision = "bf16" if has_bf16 else "fp16"
        yield f"engine.precision={precision}", lambda plan: _engine(plan, precision=precision)
    if source.world_size > 1 and engine.kind != "fsdp":
        yield "engine.kind=fsdp", lambda plan: _engine(plan, kind="fsdp")
    if engine.replicas > 1:
        yield "engine.replicas=1", lambda plan: _engine(plan, replicas=1)
    if not source.activation_checkpointing:
        yield "train.activation_checkpointing=true", lambda plan: replace(plan, activation_checkpointing=True)
    if source.micro_batch_size % 2 == 0:
        half = source.micro_batch_size // 2
        yield (
            f"data.micro_batch_size={half}",
            lambda plan: replace(plan, micro_batch_size=half, micro_batches=plan.micro_batches * 2),
        )
    if source.optim.kind == "adamw" and not engine.cpu_offload:
        yield _MOMENTS_OF_8_BITS, lambda plan: replace(plan, optim=plan.optim.model_copy(update={"kind": "adamw_8bit"}))
    if not engine.cpu_offload and source.optim.kind != "adamw_8bit":
        kind = engine.kind if engine.kind != "replicated" else "fsdp"
        words = "engine.cpu_offload=true" if kind == engine.kind else "engine.kind=fsdp engine.cpu_offload=true"
        yield words, lambda plan: _engine(plan, kind=kind, cpu_offload=True)
    if source.ema.more_decays:
        yield "ema.more_decays=[]", lambda plan: replace(plan, ema=plan.ema.model_copy(update={"more_decays": ()}))
    yield from source.variants.items()


def _pairs(single: dict[str, Change]) -> dict[str, Change]:
    """Activation checkpointing, the strongest of the cheap ones, with each of the others."""
    first = "train.activation_checkpointing=true"
    if first not in single:
        first = next(iter(single), "")
    # Moments of 8 bits are not offloaded.
    others = [other for other in single if other != first and not (first == _MOMENTS_OF_8_BITS and "cpu_offload" in other)]
    return {f"{first} {other}": _both(single[first], single[other]) for other in others}


def _both(first: Change, second: Change) -> Change:
    return lambda plan: second(first(plan))


def _engine(plan: PlanInput, **changes: object) -> PlanInput:
    return replace(plan, engine=plan.engine.model_copy(update=changes))
