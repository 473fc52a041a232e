"""The halving rule: which levels a student keeps, and what a chain's stages are called."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.stages import grid, halve, halving_counts, stage_name

schedule_steps = st.integers(1, 5000)


def test_a_thousand_steps_halve_down_to_one() -> None:
    assert halving_counts(1000, 1) == (1000, 500, 250, 125, 63, 32, 16, 8, 4, 2, 1)
    assert halving_counts(64, 8) == (64, 32, 16, 8)


def test_eight_steps_and_one_step_of_a_thousand_are_those_of_the_design() -> None:
    assert grid(1000, 8) == (103, 231, 359, 487, 615, 743, 871, 999)
    assert grid(1000, 1) == (999,)


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=200, unique=True).map(sorted))
def test_a_student_keeps_the_noisiest_level_and_every_second_one_below(teacher: list[int]) -> None:
    student = halve(teacher)
    assert len(student) == (len(teacher) + 1) // 2
    assert student[-1] == teacher[-1]
    positions = [teacher.index(timestep) for timestep in student]
    assert {after - before for before, after in pairwise(positions)} <= {2}
    assert positions[0] == 1 - len(teacher) % 2, "an odd teacher's least noisy step stays a single one"


@given(schedule_steps)
def test_halving_again_and_again_walks_through_the_grids_of_the_counts(steps: int) -> None:
    levels = tuple(range(steps))
    for j, count in enumerate(halving_counts(steps, 1)):
        assert levels == grid(steps, count)
        assert levels == tuple(sorted(steps - 1 - k * 2**j for k in range(count)))
        levels = halve(levels) if count > 1 else levels
    assert levels == (steps - 1,)


@given(schedule_steps, st.data())
def test_a_grid_has_the_wanted_number_of_levels_and_ends_with_the_noisiest(steps: int, draw: st.DataObject) -> None:
    count = draw.draw(st.integers(1, steps))
    levels = grid(steps, count)
    assert len(levels) == count
    assert list(levels) == sorted(set(levels))
    assert levels[0] >= 0 and levels[-1] == steps - 1


@pytest.mark.parametrize("count", [5, 10, 20, 30, 50, 100, 200, 250, 333, 500, 1000])
def test_other_counts_take_the_trailing_grid_of_diffusers(count: int) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")
    scheduler.set_timesteps(count)
    assert grid(1000, count) == tuple(reversed(scheduler.timesteps.tolist()))


@given(schedule_steps, st.data())
def test_a_chain_from_a_student_on_is_the_rest_of_the_whole_chain(steps: int, draw: st.DataObject) -> None:
    counts = halving_counts(steps, 1)
    first = draw.draw(st.integers(0, len(counts) - 1))
    last = draw.draw(st.integers(first, len(counts) - 1))
    assert halving_counts(counts[first], counts[last]) == counts[first : last + 1]


def test_counts_that_no_halving_reaches_are_refused_with_those_it_does() -> None:
    with pytest.raises(ValueError, match=r"halving 1000 steps never gives 100; wanted one of 1000, 500, 250, 125, 63"):
        halving_counts(1000, 100)
    with pytest.raises(ValueError, match="wanted at least 1"):
        halving_counts(0, 0)
    with pytest.raises(ValueError, match="wanted at least 2"):
        halve((999,))
    with pytest.raises(ValueError, match="wanted 1 to 1000"):
        grid(1000, 1001)
    with pytest.raises(ValueError, match="wanted 1 to 1000"):
        grid(1000, 0)


def test_stage_names_sort_in_the_order_of_the_chain() -> None:
    names = [stage_name(index, steps) for index, steps in enumerate(halving_counts(1000, 1))]
    assert names[:2] == ["stage_00_1000_steps", "stage_01_0500_steps"]
    assert names == sorted(names)
