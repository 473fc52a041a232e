"""Bytes that a rank sends, against sums made by hand."""

from dataclasses import replace

import pytest
import torch

from tests.trainer.plan.networks import Case
from trainer.config import EngineConfig
from trainer.plan import fake_step
from trainer.plan.live_bytes import LiveBytes
from trainer.plan.plan_input import PlanInput
from trainer.plan.traffic import Part, bytes_sent
from trainer.plan.work import work_of

PARTS = (Part((64, 100), 4, trained=True), Part((64, 50), 2, trained=False))


def _plan(ranks: int, accumulation: int = 1, **engine: object) -> PlanInput:
    return replace(Case(accumulation=accumulation).plan(ranks), engine=EngineConfig.model_validate(engine))


def test_replicas_reduce_what_is_trained_once_a_step() -> None:
    assert bytes_sent(_plan(8, accumulation=4), PARTS) == {"all-reduce of gradients": 2 * 7 * 25600 // 8}


def test_fsdp_gathers_twice_and_reduces_for_every_micro_batch() -> None:
    plan = _plan(8, accumulation=4, kind="fsdp", precision="bf16")
    assert bytes_sent(plan, PARTS) == {
        "all-gather of weights": 4 * 2 * (9600 * 2 * 7 // 8),
        "reduce-scatter of gradients": 4 * (25600 * 7 // 8),
    }


def test_rows_are_filled_up_where_there_are_more_ranks() -> None:
    sent = bytes_sent(_plan(128, kind="fsdp"), PARTS[:1])
    assert sent["reduce-scatter of gradients"] == 128 * 100 * 4 * 127 // 128


def test_copies_of_the_shards_reduce_among_themselves() -> None:
    sent = bytes_sent(_plan(8, kind="fsdp", replicas=2), PARTS[:1])
    assert sent["all-reduce among replicas"] == 2 * (25600 // 4) // 2
    assert sent["reduce-scatter of gradients"] == 25600 * 3 // 4


@pytest.mark.parametrize(("stage", "reductions", "gathers"), [(1, 1, 1), (2, 4, 1), (3, 4, 8)])
def test_zero_gathers_and_reduces_by_its_stage(stage: int, reductions: int, gathers: int) -> None:
    sent = bytes_sent(_plan(8, accumulation=4, kind="deepspeed", zero_stage=stage), PARTS[:1])
    assert sent == {"all-gather of weights": gathers * 22400, "reduce of gradients": reductions * 22400}


def test_one_rank_sends_nothing() -> None:
    assert bytes_sent(_plan(1, kind="fsdp"), PARTS) == {}


def test_the_sums_are_those_of_the_collectives_that_the_engine_really_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    carried: dict[str, int] = {}

    def count(_: LiveBytes, operator: torch._ops.OpOverload, inputs: tuple, result: object) -> None:
        if operator in (torch.ops.c10d._allgather_base_.default, torch.ops.c10d._reduce_scatter_base_.default):
            whole = max(inputs[0].nbytes, inputs[1].nbytes)
            carried[operator.name()] = carried.get(operator.name(), 0) + whole

    monkeypatch.setattr(fake_step, "_kinds", count)
    plan = Case("fsdp", "bf16", partly_frozen=True, accumulation=2).plan(200)
    fake_step.measure(plan)
    sent = bytes_sent(plan, work_of(plan).parts)
    assert sent["all-gather of weights"] == pytest.approx(carried["c10d::_allgather_base_"] * 199 / 200)
    assert sent["reduce-scatter of gradients"] == pytest.approx(carried["c10d::_reduce_scatter_base_"] * 199 / 200)
