"""Changes of a recipe that need less memory, cheapest in time first; each with the figures of a plan of its own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import final

from trainer.models.flops import named_peak
from trainer.plan.gpus import Prices
from trainer.plan.plan import Plan, make_plan
from trainer.plan.plan_input import PlanInput

Change = Callable[[PlanInput], PlanInput]
WANTED = 3


@final
@dataclass(frozen=True)
class WayOut:
    """One change that makes a run fit."""

    change: str
    """As KEY=VALUE words of the command line."""
    plan: Plan


def ways_out(plan: Plan, prices: Prices, *, wanted: int = WANTED) -> list[WayOut]:
    """Up to `wanted` changes after which the run fits, the fastest first.

    Single changes are tried before pairs of them, and pairs only as long as too few have been found."""
    assert plan.gpu is not None, "without a type of GPU nothing says that the run does not fit"
    name, gpu = plan.gpu
    single = dict(_changes(plan.source, has_bf16=named_peak(gpu.peak, "bf16") is not None))
    found: list[WayOut] = []
    works = {}
    for group in (single, _pairs(single)):
        for change, alter in group.items():
            altered = alter(plan.source)
            works.setdefault(altered.build, None if altered.build is not plan.source.build else plan.work)
            other = make_plan(altered, prices, name, work=works[altered.build])
            works[altered.build] = other.work
            if other.fits:
                found.append(WayOut(change, other))
        if len(found) >= wanted:
            break
    return sorted(found, key=_step_seconds)[:wanted]


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
    if not engine.cpu_offload:
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
    return {f"{first} {other}": _both(single[first], single[other]) for other in single if other != first}


def _both(first: Change, second: Change) -> Change:
    return lambda plan: second(first(plan))


def _engine(plan: PlanInput, **changes: object) -> PlanInput:
    return replace(plan, engine=plan.engine.model_copy(update=changes))


def _step_seconds(way: WayOut) -> float:
    return way.plan.speed.step_seconds if way.plan.speed else float("inf")
