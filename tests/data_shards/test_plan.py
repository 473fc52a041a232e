"""The plan's promises: every sample once an epoch, few shards a lane, another order each epoch, nothing but its arguments."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_shards.keyed import permutation, random_bits
from data_shards.reading.plan import Plan

Place = tuple[int, int]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans of up to 12 shards of up to 40 samples, with 1 to 8 lanes."""
    samples_per_shard = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=12)))
    micro_batch_size = draw(st.integers(1, 6))
    global_batch_size = micro_batch_size * draw(st.integers(1, 8))
    assume(sum(samples_per_shard) >= global_batch_size)
    return Plan(samples_per_shard, draw(st.integers(0, 2**63)), global_batch_size, micro_batch_size)


def micro_batch(plan: Plan, step: int, index: int) -> list[Place]:
    refs = plan.micro_batch(step, index)
    return list(zip(refs.shards.tolist(), refs.positions.tolist(), strict=True))


def epoch_of(plan: Plan, epoch: int) -> list[list[Place]]:
    """All samples of an epoch, a list a lane."""
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return [[place for step in steps for place in micro_batch(plan, step, index)] for index in range(plan.micro_batches)]


@given(plans(), st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_every_sample_comes_once_an_epoch_but_for_a_remainder_under_one_global_batch(plan: Plan, epoch: int) -> None:
    places = Counter(place for lane in epoch_of(plan, epoch) for place in lane)
    assert max(places.values()) == 1
    assert all(0 <= position < plan.samples_per_shard[shard] for shard, position in places)
    assert 0 <= plan.samples - len(places) < plan.global_batch_size


@given(plans(), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_a_shard_is_fetched_by_few_lanes(plan: Plan, epoch: int) -> None:
    lanes = Counter(shard for lane in epoch_of(plan, epoch) for shard in {shard for shard, _ in lane})
    for shard, count in lanes.items():
        assert count <= 1 + -(-plan.samples_per_shard[shard] // plan.lane_samples)


@given(plans(), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_a_lane_runs_through_its_shards_in_sequence(plan: Plan, epoch: int) -> None:
    for index, lane in enumerate(epoch_of(plan, epoch)):
        visits = [shard for at, (shard, _) in enumerate(lane) if at == 0 or lane[at - 1][0] != shard]
        assert tuple(visits) == plan.lane_shards(epoch, index)
        assert len(set(visits)) == len(visits)


@given(plans(), st.integers(0, 60))
@settings(deadline=None, max_examples=40)
def test_the_order_does_not_depend_on_what_was_asked_before(plan: Plan, first: int) -> None:
    keys = [(step, index) for step in range(first, first + 3) for index in range(plan.micro_batches)]
    in_order = {key: micro_batch(plan, *key) for key in keys}
    fresh = Plan(plan.samples_per_shard, plan.seed, plan.global_batch_size, plan.micro_batch_size)
    assert {key: micro_batch(fresh, *key) for key in reversed(keys)} == in_order


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_deliver_the_same_samples_whatever_the_world_size(world_size: int) -> None:
    plan = Plan((20, 7, 13), 0, 16, 2)
    share = plan.micro_batches // world_size
    by_rank = [[micro_batch(plan, 5, index) for index in range(rank * share, (rank + 1) * share)] for rank in range(world_size)]
    assert [batch for rank in by_rank for batch in rank] == [micro_batch(plan, 5, index) for index in range(8)]


def test_composition_differs_between_epochs_and_seeds() -> None:
    def batches(seed: int, epoch: int) -> set[frozenset[Place]]:
        plan = Plan((50, 50, 50, 50), seed, 20, 10)
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        return {frozenset(micro_batch(plan, step, index)) for step in steps for index in range(2)}

    seen = [batches(0, 0), batches(0, 1), batches(1, 0)]
    assert len(set.union(*seen)) == sum(len(one) for one in seen)


def test_the_remainder_is_not_the_same_samples_each_epoch() -> None:
    plan = Plan((10, 10, 13), 0, 16, 4)
    everything = {(shard, position) for shard, samples in enumerate(plan.samples_per_shard) for position in range(samples)}
    left = [frozenset(everything - {place for lane in epoch_of(plan, epoch) for place in lane}) for epoch in range(6)]
    assert len(set(left)) > 1


def test_the_first_micro_batch_is_the_one_that_was_always_first() -> None:
    """Golden: another order would silently break the resume of every run that is under way."""
    plan = Plan((5, 4, 3), 7, 4, 2)
    assert [micro_batch(plan, step, index) for step in (0, 4) for index in (0, 1)] == [
        [(0, 2), (0, 1)],
        [(2, 2), (2, 1)],
        [(0, 0), (0, 4)],
        [(1, 1), (2, 0)],
    ]


def test_a_late_step_costs_no_more_than_an_early_one() -> None:
    plan = Plan((1000,) * 1000, 0, 256, 16)
    assert len(micro_batch(plan, 10**9, 3)) == 16


def test_the_replacement_of_a_bad_sample_is_a_rule() -> None:
    plan = Plan((5, 1, 9), 0, 4, 2)
    drawn = [plan.replacement(3, 1, position, attempt=attempt) for position in range(20) for attempt in range(10)]
    assert drawn == [plan.replacement(3, 1, position, attempt=attempt) for position in range(20) for attempt in range(10)]
    assert all(0 <= position < plan.samples_per_shard[shard] for shard, position in drawn)
    assert len(set(drawn)) == plan.samples


@pytest.mark.parametrize(
    ("samples_per_shard", "sizes", "message"),
    [
        ((8, 8), (6, 4), "global_batch_size=6 is not a multiple of micro_batch_size=4"),
        ((8, 0), (4, 2), "shard 1 of 2 is empty"),
        ((3, 4), (8, 4), "hold 7 samples, less than one global batch of 8"),
    ],
)
def test_a_plan_that_can_not_be_is_refused(samples_per_shard: tuple[int, ...], sizes: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(samples_per_shard, 0, *sizes)


@pytest.mark.parametrize(("step", "index"), [(-1, 0), (0, 2), (0, -1)])
def test_a_micro_batch_that_is_not_there_is_an_index_error(step: int, index: int) -> None:
    with pytest.raises(IndexError, match="0 <= index < 2"):
        Plan((8,), 0, 4, 2).micro_batch(step, index)


def test_permutations_are_permutations_and_differ_by_every_part_of_their_path() -> None:
    paths = [(0, "a", 0), (0, "a", 1), (0, "b", 0), (1, "a", 0)]
    orders = [tuple(permutation(100, *path)) for path in paths]
    assert len(set(orders)) == len(paths)
    assert all(sorted(order) == list(range(100)) for order in orders)


def test_random_bits_are_philox_words() -> None:
    """An independent value: the stream numpy promises for a key, here sha256("0/x")[:16] read as little-endian."""
    key = sum(byte << 8 * place for place, byte in enumerate(hashlib.sha256(b"0/x").digest()[:16]))
    assert random_bits(4, 0, "x").tolist() == np.random.Philox(key=key).random_raw(8).tolist()[:4]
