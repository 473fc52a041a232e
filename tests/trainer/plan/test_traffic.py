"""Bytes that a rank sends, against sums made by hand."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.trainer.plan.networks import Case
from trainer.config import EngineConfig
from trainer.plan import fake_step
from trainer.plan.live_bytes import LiveBytes
from trainer.plan.plan_input import PlanInput
from trainer.plan.traffic import Collective, Links, Part, bytes_sent, collectives
from trainer.plan.work import work_of

PARTS = (Part((64, 100), 4, trained=True), Part((64, 50), 2, trained=False))


def _plan(ranks: int, accumulation: int = 1, *, on_gpu: bool = True, **engine: object) -> PlanInput:
    return replace(Case(accumulation=accumulation).plan(ranks), engine=EngineConfig.model_validate(engine), on_gpu=on_gpu)


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


@pytest.mark.parametrize(("stage", "reductions"), [(1, 1), (2, 4)])
def test_zero_1_and_2_all_reduce_and_gather_once(stage: int, reductions: int) -> None:
    sent = bytes_sent(_plan(8, accumulation=4, kind="deepspeed", zero_stage=stage), PARTS[:1])
    assert sent == {"all-reduce of gradients": reductions * 2 * 22400, "all-gather of weights": 22400}


def test_zero_3_gathers_large_weights_for_every_micro_batch_and_small_ones_after_the_step() -> None:
    large, small, frozen = Part((800, 1000), 4, trained=True), PARTS[0], Part((800, 1000), 2, trained=False)
    sent = bytes_sent(_plan(8, accumulation=4, kind="deepspeed", zero_stage=3), (large, small, frozen, PARTS[1]))
    assert sent == {
        "all-gather of weights": (4 * (3_200_000 + 1_600_000) + 25_600) * 7 // 8,
        "reduce-scatter of gradients": 4 * 3_225_600 * 7 // 8,
    }


def test_zero_3_gathers_again_what_lies_far_from_its_second_use() -> None:
    plan, half = _plan(2, kind="deepspeed", zero_stage=3), Part((1000, 300_000), 4, trained=True)
    assert bytes_sent(plan, (half, half))["all-gather of weights"] == 2 * 1_200_000_000 // 2
    assert bytes_sent(plan, (half, half, half))["all-gather of weights"] == (2 + 1 + 1) * 1_200_000_000 // 2


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_gloos_reduce_scatter_sends_as_much_as_an_all_reduce(kind: str) -> None:
    on_gpu, on_cpu = (bytes_sent(_plan(8, on_gpu=gpu, kind=kind, zero_stage=3), PARTS[:1]) for gpu in (True, False))
    assert on_cpu["reduce-scatter of gradients"] == 2 * on_gpu["reduce-scatter of gradients"] == 2 * 22400
    assert on_cpu["all-gather of weights"] == on_gpu["all-gather of weights"]


LINKS = Links(
    ranks_per_node=8,
    node_gigabytes_per_second=400,
    node_latency_seconds=3e-6,
    network_gigabytes_per_second=10,
    network_latency_seconds=10e-6,
)


def test_a_group_of_whole_nodes_has_all_their_links_to_the_network() -> None:
    reduced = Collective("", 32 * 10**9, 32, passes=2)
    assert reduced.seconds(LINKS) == pytest.approx(2 * 31e9 / 80e9, rel=1e-3)
    assert replace(reduced, ranks=8).seconds(LINKS) == pytest.approx(2 * 28e9 / 400e9, rel=1e-3)
    # Copies of a node's shards: each rank with its like in other nodes, over its own link.
    assert replace(reduced, ranks=4, stride=8).seconds(LINKS) == pytest.approx(2 * 24e9 / 10e9, rel=1e-3)


def test_starting_a_collective_takes_a_latency_for_each_hop() -> None:
    gather = Collective("", 0, 32, count=5)
    assert gather.seconds(LINKS) == pytest.approx(5 * (28 * 3e-6 + 3 * 10e-6))
    tree = replace(gather, passes=2)
    assert tree.seconds(LINKS) == pytest.approx(5 * 2 * (7 * 3e-6 + 2 * 10e-6))
    assert replace(gather, ranks=1).seconds(LINKS) == 0


def test_a_bucket_of_all_gradients_hides_nothing_and_of_several_all_but_the_last() -> None:
    plan = _plan(8, kind="deepspeed", zero_stage=2)
    assert collectives(plan, PARTS)[0].hidden == 0
    reduced = collectives(plan, (Part((1000, 800_000), 4, trained=True),))[0]
    assert (reduced.count, reduced.hidden) == (2, 5 / 8)


def test_one_rank_sends_nothing() -> None:
    assert bytes_sent(_plan(1, kind="fsdp"), PARTS) == {}


def test_the_sums_are_those_of_the_collectives_that_the_engine_really_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    carried: dict[str, int] = {}
    calls: Counter[str] = Counter()

    def count(_: LiveBytes, operator: torch._ops.OpOverload, inputs: tuple, result: object) -> None:
        if operator in (torch.ops.c10d._allgather_base_.default, torch.ops.c10d._reduce_scatter_base_.default):
            whole = max(inputs[0].nbytes, inputs[1].nbytes)
            calls[operator.name()] += 1
            carried[operator.name()] = carried.get(operator.name(), 0) + whole

    monkeypatch.setattr(fake_step, "_kinds", count)
    plan = replace(Case("fsdp", "bf16", partly_frozen=True, accumulation=2).plan(200), on_gpu=True)
    fake_step.measure(plan)
    work = work_of(plan)
    gathers, scatters = collectives(plan, work.parts, units=work.units)[:2]
    assert gathers.count == calls["c10d::_allgather_base_"]
    assert scatters.count >= calls["c10d::_reduce_scatter_base_"]  # of a unit whose weights are all frozen there is none
    sent = bytes_sent(plan, work.parts)
    assert sent["all-gather of weights"] == pytest.approx(carried["c10d::_allgather_base_"] * 199 / 200)
    assert sent["reduce-scatter of gradients"] == pytest.approx(carried["c10d::_reduce_scatter_base_"] * 199 / 200)
