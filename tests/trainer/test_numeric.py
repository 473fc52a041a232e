"""Bad steps are written down with their samples, and the policy that the recipe names follows."""

import json
import math
from pathlib import Path

import pytest

from trainer.engines.engine import NumericError, StepResult, clip_factor, judge
from trainer.numeric import Action, BadSteps, LossAverage, RollBack

KEYS = {0: ["a", "b"], 1: ["c", "d", "e", "f", "g"]}


def _result(*losses: float, norm: float = 1.0) -> StepResult:
    return StepResult("bad", losses, norm, ())


def _bad_steps(run_dir: Path, action: Action, *, start_step: int = 0, budget: int = 10) -> BadSteps:
    return BadSteps(run_dir, start_step=start_step, action=action, budget=budget)


def _lines(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "bad_steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("losses", "norm", "limit", "scaled", "outcome"),
    [
        ((1.0, 2.0), 3.0, None, False, "applied"),
        ((1.0, 2.0), 3.0, 1.5, False, "applied"),
        ((1.0, 2.0), 3.0, 1.4, False, "bad"),
        ((1.0, math.nan), 3.0, None, False, "bad"),
        ((math.inf, -math.inf), 3.0, None, True, "bad"),
        ((1.0, 2.0), math.inf, None, False, "bad"),
        ((1.0, 2.0), math.nan, None, False, "bad"),
        ((1.0, 2.0), math.inf, None, True, "overflow"),
        ((1.0, 2.0), math.nan, 1.4, True, "bad"),
    ],
)
def test_judgement(losses: tuple[float, ...], norm: float, limit: float | None, scaled: bool, outcome: str) -> None:
    assert judge(losses, norm, loss_limit=limit, scaled=scaled) == outcome


def test_clipping_leaves_small_gradients_alone() -> None:
    assert clip_factor(2.0, max_gradient_norm=None) == clip_factor(2.0, max_gradient_norm=2.0) == 1.0
    assert clip_factor(8.0, max_gradient_norm=2.0) == 0.25


def test_stop_names_the_step_the_micro_batch_and_its_samples(tmp_path: Path) -> None:
    message = (
        r"step 7: the loss of micro-batches \[1\] is not finite; no weight was changed. Samples by micro-batch: 1: c, d, e, f, ... "
        rf"\(all in {tmp_path / 'bad_steps.jsonl'}\). .*numeric.on_bad_step=skip"
    )
    with pytest.raises(NumericError, match=message):
        _bad_steps(tmp_path, "stop").add(7, _result(1.0, math.nan), loss_limit=None, keys=KEYS)
    reason = "the loss of micro-batches [1] is not finite"
    assert _lines(tmp_path) == [{"step": 7, "action": "stop", "reason": reason, "samples": {"1": KEYS[1]}}]


def test_skipped_steps_are_counted_against_the_budget(tmp_path: Path) -> None:
    bad = _bad_steps(tmp_path, "skip", budget=2)
    for step in (3, 5):
        bad.add(step, _result(math.nan, 1.0), loss_limit=None, keys=KEYS)
    with pytest.raises(NumericError, match=r"step 8: .* 3 steps were bad, numeric.max_bad_steps allows 2"):
        bad.add(8, _result(math.nan, 1.0), loss_limit=None, keys=KEYS)
    assert [(line["step"], line["action"]) for line in _lines(tmp_path)] == [(3, "skip"), (5, "skip"), (8, "stop")]
    assert bad.left_out == frozenset()


def test_a_spike_and_an_infinite_gradient_are_told_apart_and_blamed_on_all(tmp_path: Path) -> None:
    bad = _bad_steps(tmp_path, "skip")
    bad.add(1, _result(9.0, 9.0), loss_limit=3.0, keys=KEYS)
    bad.add(2, _result(1.0, 1.0, norm=math.inf), loss_limit=3.0, keys=KEYS)
    first, second = _lines(tmp_path)
    assert first["reason"] == "the loss 9 is above 3, numeric.spike_factor times its average"
    assert second["reason"] == "the gradient is not finite (all losses are)"
    assert first["samples"] == second["samples"] == {"0": KEYS[0], "1": KEYS[1]}


def test_a_roll_back_leaves_its_step_out_ever_after(tmp_path: Path) -> None:
    with pytest.raises(RollBack, match="step 7"):
        _bad_steps(tmp_path, "roll_back").add(7, _result(math.nan), loss_limit=None, keys=KEYS)
    again = _bad_steps(tmp_path, "roll_back", start_step=5, budget=1)
    assert again.left_out == {7} and again.count == 1
    with pytest.raises(NumericError, match="2 steps were bad"):
        again.add(9, _result(math.nan), loss_limit=None, keys=KEYS)
    # the step whose budget was spent was not left out: with a larger budget it is tried again
    assert _bad_steps(tmp_path, "roll_back", start_step=5, budget=9).left_out == {7}


def test_a_resume_judges_later_skipped_steps_anew(tmp_path: Path) -> None:
    bad = _bad_steps(tmp_path, "skip")
    for step in (3, 5):
        bad.add(step, _result(math.nan), loss_limit=None, keys=KEYS)
    again = _bad_steps(tmp_path, "skip", start_step=5)
    assert again.count == 1 and [line["step"] for line in _lines(tmp_path)] == [3]


def test_a_half_written_last_line_is_dropped(tmp_path: Path) -> None:
    _bad_steps(tmp_path, "skip").add(3, _result(math.nan), loss_limit=None, keys=KEYS)
    whole = (tmp_path / "bad_steps.jsonl").read_text()
    (tmp_path / "bad_steps.jsonl").write_text(whole + '{"step": 5, "act')
    assert _bad_steps(tmp_path, "skip", start_step=9).count == 1
    assert (tmp_path / "bad_steps.jsonl").read_text() == whole


def test_the_average_gives_no_limit_before_it_is_one_and_none_where_none_is_asked_for() -> None:
    average, unasked = LossAverage(spike_factor=3.0), LossAverage(spike_factor=None)
    for number in range(20):
        assert average.limit is None
        average.add(1.0 + number % 2)
        unasked.add(1.0)
    value = 1.0
    for number in range(1, 20):
        value += 0.02 * (1.0 + number % 2 - value)
    assert average.limit == pytest.approx(3.0 * value) and unasked.limit is None


def test_the_average_goes_on_exactly_after_a_resume() -> None:
    average = LossAverage(spike_factor=3.0)
    for number in range(25):
        average.add(0.1 * number)
    again = LossAverage(spike_factor=3.0, saved=json.loads(json.dumps(average.to_json())))
    for each in (average, again):
        each.add(0.7)
    assert again.limit == average.limit is not None
    assert LossAverage(spike_factor=3.0, saved={"value": 3}).steps == 0
