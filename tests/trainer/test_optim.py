"""Learning rates are pure functions of the step."""

import pytest

from trainer.config import ConstantLRSchedule, CosineLRSchedule, LinearLRSchedule, StepDecayLRSchedule
from trainer.ema import ema_decay
from trainer.optim import learning_rate


def _rates(schedule: ConstantLRSchedule | LinearLRSchedule | CosineLRSchedule | StepDecayLRSchedule) -> list[float]:
    return [learning_rate(step, peak=1.0, total_steps=10, schedule=schedule) for step in range(10)]


def test_constant_stays() -> None:
    assert _rates(ConstantLRSchedule()) == [1.0] * 10


def test_linear_falls_to_one_step_above_zero() -> None:
    assert _rates(LinearLRSchedule()) == pytest.approx([1 - step / 10 for step in range(10)])


def test_cosine_falls_by_half_in_the_middle() -> None:
    rates = _rates(CosineLRSchedule())
    assert rates[0] == 1.0 and rates[5] == pytest.approx(0.5) and rates == sorted(rates, reverse=True) and rates[-1] > 0


def test_step_decay_takes_its_factor_every_so_many_steps() -> None:
    assert _rates(StepDecayLRSchedule(every_steps=4, factor=0.5)) == [1.0] * 4 + [0.5] * 4 + [0.25] * 2


@pytest.mark.parametrize("kind", [ConstantLRSchedule, LinearLRSchedule, CosineLRSchedule])
def test_warm_up_is_a_line_up_to_the_peak(kind: type[ConstantLRSchedule]) -> None:
    rates = _rates(kind(warmup_steps=4))
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0]) and rates[4] == pytest.approx(1.0)


def test_the_average_follows_closely_at_first() -> None:
    assert ema_decay(0, decay=0.999, warmup=True) == pytest.approx(2 / 11)
    assert ema_decay(10**6, decay=0.999, warmup=True) == 0.999
    assert ema_decay(0, decay=0.999, warmup=False) == 0.999
