"""A stage that learns no more: decided by the measured errors alone."""

import pytest

from trainer.plateau import stopped_falling


@pytest.mark.parametrize(
    ("errors", "stopped"),
    [
        ([], False),
        ([1.0], False),
        ([1.0, 1.0], False),
        ([1.0, 1.0, 1.0], True),
        ([1.0, 0.9, 0.9], False),
        ([1.0, 0.9, 0.9, 0.95], True),
        ([1.0, 0.995, 0.991], True),
        ([1.0, 1.2, 0.5, 0.6], False),
        ([0.0, 0.0, 0.0], True),
    ],
)
def test_two_measurements_without_a_fall_of_a_hundredth_are_enough(errors: list[float], stopped: bool) -> None:
    assert stopped_falling(errors, least_gain=0.01, patience=2) is stopped


def test_a_slow_fall_is_measured_against_the_lowest_so_far_not_the_first() -> None:
    slow = [0.995**k for k in range(10)]
    assert stopped_falling(slow, least_gain=0.01, patience=3)
