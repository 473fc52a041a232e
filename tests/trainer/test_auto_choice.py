"""Which way to compute a step is chosen, from times that are given."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from trainer.auto_choice import Candidate, Measurement, Timing, candidates, choose, freeze_choice, read_measurement, worth_compiling
from trainer.config import RunConfig
from trainer.config_io import dump_yaml, load_recipe

EAGER, LAST = Candidate(False, "contiguous"), Candidate(False, "channels_last")
COMPILED, COMPILED_LAST = Candidate(True, "contiguous"), Candidate(True, "channels_last")


def _timing(
    candidate: Candidate, milliseconds: float, *, jitter: Sequence[float] = (0, 0, 0, 0, 0), compile_seconds: float = 0.0
) -> Timing:
    return Timing(candidate, tuple((milliseconds + each) / 1000 for each in jitter), compile_seconds)


def _config(**train: object) -> RunConfig:
    return RunConfig.model_validate({"data": {"shards": "shards"}, "train": {"steps": 10, **train}})


def test_a_recipe_that_leaves_nothing_open_has_one_candidate() -> None:
    assert candidates(_config(compile=True)) == (COMPILED,)


def test_what_is_left_open_is_tried_simplest_first() -> None:
    assert candidates(_config(compile="auto", memory_format="auto")) == (EAGER, LAST, COMPILED, COMPILED_LAST)
    assert candidates(_config(compile="auto", memory_format="channels_last")) == (LAST, COMPILED_LAST)
    assert candidates(_config(memory_format="auto")) == (EAGER, LAST)


def test_latents_without_height_and_width_have_one_format() -> None:
    recipe = {
        "data": {"shards": "shards"},
        "model": {"kind": "kandinsky22_prior", "base": "base"},
        "train": {"steps": 10, "memory_format": "auto"},
    }
    assert candidates(RunConfig.model_validate(recipe)) == (EAGER,)


def test_the_faster_format_is_chosen() -> None:
    assert choose([_timing(EAGER, 10), _timing(LAST, 9)], micro_batches=1).candidate == LAST


def test_a_slower_one_is_left() -> None:
    assert choose([_timing(EAGER, 10), _timing(LAST, 11)], micro_batches=1).candidate == EAGER


def test_less_than_two_percent_is_noise_however_steady() -> None:
    assert choose([_timing(EAGER, 10), _timing(LAST, 9.85)], micro_batches=10**6).candidate == EAGER


def test_a_gain_within_the_scatter_of_its_rounds_is_noise() -> None:
    jitter = (-4, 2, -2, 4, 0)
    noisy = choose([_timing(EAGER, 10), _timing(LAST, 9, jitter=jitter)], micro_batches=1)
    assert noisy.candidate == EAGER and "noise" in noisy.reasons[1]
    # the same scatter in many rounds says more
    assert choose([_timing(EAGER, 10, jitter=(0,) * 100), _timing(LAST, 9, jitter=jitter * 20)], micro_batches=1).candidate == LAST


def test_a_drift_that_both_share_hides_no_gain() -> None:
    drift = (0, 5, 10, 15, 20)
    assert choose([_timing(EAGER, 10, jitter=drift), _timing(LAST, 9, jitter=drift)], micro_batches=1).candidate == LAST


def test_compiling_pays_only_where_what_it_saves_is_above_twice_its_time() -> None:
    timings = [_timing(EAGER, 10), _timing(COMPILED, 8, compile_seconds=60)]  # saves 2 ms: 60,000 micro-batches for 2 x 60 s
    short, long = choose(timings, micro_batches=59_999), choose(timings, micro_batches=60_001)
    assert (short.candidate, long.candidate) == (EAGER, COMPILED)
    assert "it would save 120 s in 59999 micro-batches, compiling takes 120 s" in short.reasons[1]


def test_of_two_compiled_ones_the_second_has_to_pay_for_the_difference_alone() -> None:
    timings = [
        _timing(EAGER, 10),
        _timing(LAST, 10),
        _timing(COMPILED, 8, compile_seconds=60),
        _timing(COMPILED_LAST, 7, compile_seconds=61),
    ]
    assert choose(timings, micro_batches=70_000).candidate == COMPILED_LAST


def test_a_compiled_one_is_compared_with_the_best_eager_one() -> None:
    timings = [_timing(EAGER, 10), _timing(LAST, 8), _timing(COMPILED, 8.1, compile_seconds=1)]
    assert choose(timings, micro_batches=10**9).candidate == LAST


def test_compilers_are_tried_in_long_runs_alone_and_for_a_twentieth_of_them() -> None:
    eager = [_timing(EAGER, 20), _timing(LAST, 10)]
    assert not worth_compiling(eager, micro_batches=59_000, spent_seconds=0)  # 590 s
    assert worth_compiling(eager, micro_batches=61_000, spent_seconds=0)
    assert worth_compiling(eager, micro_batches=100_000, spent_seconds=50)
    assert not worth_compiling(eager, micro_batches=100_000, spent_seconds=51)


def test_a_measurement_serves_another_stage_unless_a_compiler_would_be_worth_trying_there() -> None:
    wanted = (EAGER, LAST, COMPILED, COMPILED_LAST)
    short = Measurement((_timing(EAGER, 10), _timing(LAST, 10)), {})
    assert short.covers(wanted, micro_batches=1000) and not short.covers(wanted, micro_batches=100_000)
    failed = Measurement(short.timings, {}, {str(COMPILED): "no compiler", str(COMPILED_LAST): "no compiler"})
    assert failed.covers(wanted, micro_batches=100_000)
    assert not Measurement((_timing(EAGER, 10),), {}).covers(wanted, micro_batches=1)


def test_a_frozen_choice_replaces_auto_alone_and_its_figures_read_back(tmp_path: Path) -> None:
    config = _config(memory_format="auto", compile=True)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(config))
    measurement = Measurement(
        (_timing(COMPILED, 10, compile_seconds=3.0), _timing(COMPILED_LAST, 8)), {"device": "cpu"}, {str(EAGER): "why"}
    )
    frozen = freeze_choice(tmp_path, config, choose(measurement.timings, micro_batches=5), measurement, measured_in=".")
    assert frozen == load_recipe(tmp_path / "recipe.yaml") == _config(memory_format="channels_last", compile=True)
    assert read_measurement(tmp_path) == measurement


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "auto.json").write_text('{"schema_version": 1, "timings": [3], "conditions": {}, "failed": {}}')
    with pytest.raises(ValueError, match=r"auto\.json: a timing is 3, wanted candidate"):
        read_measurement(tmp_path)
