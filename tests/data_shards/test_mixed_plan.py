"""Several data sets mixed by weight, and buckets of equal shape: the plan's promises hold for them too."""

from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_shards.reading.lines import apportioned, interleaved, passed
from data_shards.reading.plan import Plan

Place = tuple[int, int]


def lane(plan: Plan, epoch: int, index: int) -> list[Place]:
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return [place for step in steps for place in plan.places(step, index)]


def epoch_of(plan: Plan, epoch: int) -> list[Place]:
    return [place for index in range(plan.micro_batches) for place in lane(plan, epoch, index)]


@st.composite
def mixtures(draw: st.DrawFn, *, weighted: bool) -> Plan:
    """Plans of 2 to 4 sets of 1 to 5 shards of 1 to 30 samples."""
    sets = draw(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=5), min_size=2, max_size=4))
    micro_batch_size = draw(st.integers(1, 6))
    global_batch_size = micro_batch_size * draw(st.integers(1, 6))
    samples_per_shard = tuple(samples for one in sets for samples in one)
    assume(sum(samples_per_shard) >= global_batch_size)
    weights = tuple(draw(st.sampled_from([0.1, 0.25, 0.5, 1.0, 2.0, 7.5])) for _ in sets) if weighted else None
    shards_per_set = tuple(len(one) for one in sets)
    return Plan(samples_per_shard, draw(st.integers(0, 2**63)), global_batch_size, micro_batch_size, shards_per_set, weights)


def set_of(plan: Plan, shard: int) -> int:
    ends = np.cumsum(plan.shards_per_set or (len(plan.samples_per_shard),))
    return int(np.searchsorted(ends, shard, side="right"))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5))
def test_rows_are_merged_evenly_and_each_place_comes_once(counts: list[int]) -> None:
    total = sum(counts)
    merged = [interleaved(number, counts) for number in range(total)]
    assert sorted(merged) == [(row, place) for row, count in enumerate(counts) for place in range(count)]
    for number in range(total + 1):
        before = Counter(row for row, _ in merged[:number])
        assert passed(number, counts) == [before[row] for row in range(len(counts))]
        assert all(abs(before[row] - Fraction(number * count, total)) <= len(counts) for row, count in enumerate(counts) if total)


@given(st.integers(0, 1000), st.lists(st.integers(1, 100), min_size=1, max_size=6))
def test_apportioned_numbers_add_up_and_are_next_to_their_share(total: int, weights: list[int]) -> None:
    shares = apportioned(total, weights)
    assert sum(shares) == total
    assert all(abs(share - Fraction(total * weight, sum(weights))) < 1 for share, weight in zip(shares, weights, strict=True))


@given(mixtures(weighted=False), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_without_weights_every_sample_of_every_set_comes_once_an_epoch(plan: Plan, epoch: int) -> None:
    places = Counter(epoch_of(plan, epoch))
    assert max(places.values()) == 1
    assert 0 <= plan.samples - len(places) < plan.global_batch_size


@given(mixtures(weighted=True), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_weights_are_exact_over_an_epoch(plan: Plan, epoch: int) -> None:
    """To the sample: the share of each set is its weight's, rounded, and exact where it is a whole number."""
    places = epoch_of(plan, epoch)
    counts = Counter(set_of(plan, shard) for shard, _ in places)
    assert len(places) == plan.samples // plan.global_batch_size * plan.global_batch_size
    assert plan.weights is not None
    whole = sum(map(Fraction, plan.weights))
    for number, weight in enumerate(plan.weights):
        share = Fraction(weight) * len(places) / whole
        assert abs(counts[number] - share) < 1
        assert share.denominator > 1 or counts[number] == share


@given(mixtures(weighted=True))
@settings(deadline=None, max_examples=60)
def test_a_set_goes_on_in_the_next_epoch_where_it_was(plan: Plan) -> None:
    """Over any number of epochs no sample of a set comes twice more often than another one of it."""
    seen = Counter(place for epoch in range(4) for place in epoch_of(plan, epoch))
    by_set: dict[int, list[int]] = defaultdict(list)
    for shard, samples in enumerate(plan.samples_per_shard):
        by_set[set_of(plan, shard)] += [seen[shard, position] for position in range(samples)]
    assert all(max(counts) - min(counts) <= 1 for counts in by_set.values())


@given(mixtures(weighted=True), st.integers(0, 2))
@settings(deadline=None, max_examples=40)
def test_a_lane_reads_each_set_in_sequence_and_is_told_what_is_coming(plan: Plan, epoch: int) -> None:
    for index in range(plan.micro_batches):
        announced: set[int] = set()
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            coming = plan.coming(step, index)
            now = {shard for shard, _ in plan.places(step, index)}
            assert now <= set(coming[: len(now)])
            announced |= set(coming)
        visited = dict.fromkeys(shard for shard, _ in lane(plan, epoch, index))
        assert set(visited) == set(plan.lane_shards(epoch, index)) == announced


def bucketed(sets: int = 1, weights: tuple[float, ...] | None = None) -> Plan:
    samples_per_shard = (40, 1, 60, 25, 33, 9)
    shapes = np.random.default_rng(0)
    buckets = tuple(shapes.choice(3, samples, p=(0.6, 0.3, 0.1)) for samples in samples_per_shard)
    per_set = (4, 2) if sets == 2 else None
    return Plan(samples_per_shard, 5, 12, 3, per_set, weights, buckets)


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_a_micro_batch_is_of_one_bucket_and_no_sample_comes_twice(sets: int, epoch: int) -> None:
    plan = bucketed(sets)
    assert plan.buckets is not None
    places = Counter(epoch_of(plan, epoch))
    assert max(places.values()) == 1
    assert plan.samples - len(places) < plan.global_batch_size + 3 * (plan.micro_batch_size - 1)
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        for index in range(plan.micro_batches):
            bucket = plan.bucket(step, index)
            assert {plan.buckets[shard][position] for shard, position in plan.places(step, index)} == {bucket}
            shard, position = plan.replacement(step, index, 1, attempt=0)
            assert plan.buckets[shard][position] == bucket


def test_buckets_run_through_the_shards_side_by_side() -> None:
    """A lane of a bucketed plan needs few shards at a time: all its lines are about as far in the same shard order."""
    plan = Plan((50,) * 40, 0, 40, 10, buckets=tuple(np.arange(50) % 3 for _ in range(40)))
    for index in range(plan.micro_batches):
        assert len(set(plan.lane_shards(0, index))) <= 40 / plan.micro_batches + 3


def test_weights_hold_in_buckets_too() -> None:
    plan = bucketed(2, (3.0, 1.0))
    counts = Counter(set_of(plan, shard) for epoch in range(20) for shard, _ in epoch_of(plan, epoch))
    assert counts[0] / counts[1] == pytest.approx(3, rel=0.05)


def test_the_first_micro_batches_of_a_mixture_are_those_that_were_always_first() -> None:
    """Golden: another order would silently break the resume of every run that is under way."""
    plan = Plan((5, 4, 3), 7, 4, 2, (2, 1), (3.0, 1.0))
    assert [plan.places(step, index) for step in (0, 4) for index in (0, 1)] == [
        [(0, 2), (0, 1)],
        [(2, 2), (1, 2)],
        [(2, 0), (0, 0)],
        [(1, 0), (1, 3)],
    ]
    assert [bucketed().places(step, 2) for step in (0, 30)] == [[(0, 29), (0, 14), (3, 13)], [(0, 33), (0, 22), (0, 7)]]


def test_a_late_step_of_a_mixture_costs_no_more_than_an_early_one() -> None:
    plan = Plan((1000,) * 1000, 0, 256, 16, (600, 300, 100), (1.0, 2.0, 0.3))
    assert len(plan.places(10**9, 3)) == 16


def test_too_few_samples_in_buckets_are_refused() -> None:
    with pytest.raises(ValueError, match="in micro-batches of one of 3 buckets each"):
        Plan((6,), 0, 4, 4, buckets=(np.array([0, 0, 1, 1, 2, 2]),))
