"""When a measured error has stopped falling: a pure function of what was measured so far."""

from collections.abc import Sequence


def stopped_falling(errors: Sequence[float], *, least_gain: float, patience: int) -> bool:
    """Whether the last `patience` errors were no fall: none below the lowest one before it by the share `least_gain` of that.

    errors: in the order in which they were measured, the first one before the first update; that one alone decides nothing."""
    lowest, since = float("inf"), 0
    for error in errors:
        fell = error < lowest * (1 - least_gain)
        since = 0 if fell else since + 1
        lowest = min(lowest, error)
    return since >= patience
