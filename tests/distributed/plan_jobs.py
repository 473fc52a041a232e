"""What a pool's ranks do in tests of plans: real steps of a small network, with the bytes counted of its live tensors, or on sockets."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.sockets import sent_bytes
from data_shards.ranks import barrier
from tests.trainer.plan.networks import Case
from trainer.engines.deepspeed_zero import DeepSpeedZero
from trainer.engines.engine import Engine, LossPerImage
from trainer.engines.fsdp import FullySharded
from trainer.engines.replicated import Replicated
from trainer.models.network import Network
from trainer.plan.live_bytes import LiveBytes
from trainer.plan.plan_input import PlanInput

_STEPS = 2


def count_sent_bytes(case: dict[str, object], ranks: int) -> float:
    """What this rank's sockets send in a step; the first one, which makes what later ones keep, does not count. Collective."""
    plan = Case(**case).plan(ranks)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        engine = _engine(plan)
        before = 0
        for step in range(1 + _STEPS):
            if step == 1:
                barrier()
                before = sent_bytes()
            engine.step(step, _batches(plan), learning_rate=1e-4, votes=(0.0,), loss_limit=None)
        barrier()
    return (sent_bytes() - before) / _STEPS


def count_live_bytes(case: dict[str, object], ranks: int) -> list[int]:
    """The largest sum of live tensor bytes of each step on this rank. Collective."""
    plan = Case(**case).plan(ranks)  # type: ignore[arg-type]
    peaks = []
    with torch.random.fork_rng(), LiveBytes() as live:
        engine = _engine(plan)
        for step in range(_STEPS):
            live.restart_peak()
            result = engine.step(step, _batches(plan), learning_rate=1e-4, votes=(0.0,), loss_limit=None)
            assert result.outcome == "applied", result
            peaks.append(live.tally.peak)
    return peaks


def _batches(plan: PlanInput) -> Iterator[LossPerImage]:
    inputs = torch.randn(plan.micro_batch_size, *plan.shapes.x_t), torch.full((plan.micro_batch_size,), 500.0)
    cond = {name: torch.randn(plan.micro_batch_size, *shape) for name, shape in (plan.shapes.cond or {}).items()}

    def loss(network: Network) -> Tensor:
        return network(*inputs, cond).float().square().flatten(1).mean(1)

    for _ in range(plan.accumulation):
        yield loss


def _engine(plan: PlanInput) -> Engine:
    module = plan.build()
    if plan.activation_checkpointing:
        plan.enable_checkpointing(module)
    engine, micro_batches = plan.engine, plan.micro_batches
    optim, ema, precision, memory_format = plan.optim, plan.ema, engine.precision, plan.memory_format
    match engine.kind:
        case "replicated":
            return Replicated(module, optim=optim, ema=ema, precision=precision, memory_format=memory_format, micro_batches=micro_batches)
        case "fsdp":
            return FullySharded(
                module,
                plan.units(module),
                optim=optim,
                ema=ema,
                precision=precision,
                memory_format=memory_format,
                micro_batches=micro_batches,
            )
        case "deepspeed":
            return DeepSpeedZero(
                module,
                stage=engine.zero_stage,
                optim=optim,
                ema=ema,
                precision=precision,
                memory_format=memory_format,
                micro_batches=micro_batches,
                micro_batch_size=plan.micro_batch_size,
            )
