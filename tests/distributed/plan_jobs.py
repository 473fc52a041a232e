"""What a pool's ranks do in tests of plans: real steps of a small network, with the bytes of its live tensors counted."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tests.trainer.plan.networks import Case
from trainer.engines.deepspeed_zero import DeepSpeedZero
from trainer.engines.engine import Engine, LossPerImage
from trainer.engines.fsdp import FullySharded
from trainer.engines.replicated import Replicated
from trainer.models.network import Network
from trainer.plan.live_bytes import LiveBytes
from trainer.plan.plan_input import PlanInput

_STEPS = 2


def count_live_bytes(case: dict[str, object], ranks: int) -> list[int]:
    """The largest sum of live tensor bytes of each step on this rank. Collective."""
    plan = Case(**case).plan(ranks)  # type: ignore[arg-type]
    peaks = []
    with torch.random.fork_rng(), LiveBytes() as live:
        engine = _engine(plan)
        inputs = torch.randn(plan.micro_batch_size, *plan.shapes.x_t), torch.full((plan.micro_batch_size,), 500.0)
        cond = {name: torch.randn(plan.micro_batch_size, *shape) for name, shape in (plan.shapes.cond or {}).items()}
        for step in range(_STEPS):
            live.restart_peak()
            losses = _losses(inputs, cond, count=plan.accumulation)
            result = engine.step(step, losses, learning_rate=1e-4, votes=(0.0,), loss_limit=None)
            assert result.outcome == "applied", result
            peaks.append(live.tally.peak)
    return peaks


def _losses(inputs: tuple[Tensor, Tensor], cond: dict[str, Tensor], *, count: int) -> Iterator[LossPerImage]:
    def loss(network: Network) -> Tensor:
        return network(*inputs, cond).float().square().flatten(1).mean(1)

    for _ in range(count):
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
