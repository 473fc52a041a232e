"""A run that leaves open how a step is computed measures once, freezes the choice, and is then that choice's run in every bit."""

import json
import logging
from pathlib import Path
from typing import NoReturn

import pytest
import torch

import trainer.auto_choice
import trainer.auto_measure
from data_shards.files import read_json_object
from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from launch.chain import freeze_chain
from launch.run_dir import freeze
from trainer.auto_choice import Choice, candidates
from trainer.chain import read_chain
from trainer.config import RunConfig
from trainer.config_io import load_recipe
from trainer.distill import distill_job
from trainer.stop import StopRequest
from trainer.train import train
from trainer.watch import Watch


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight faces."""
    out = tmp_path_factory.mktemp("shards")
    pack(FacesSource("open-peeps", 8), out, size=8, workers=1)
    return out


def _config(shards: Path, *, distill: dict[str, object] | None = None, **train_: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"shards": str(shards), "global_batch_size": 4, "micro_batch_size": 2},
            "model": {"channels": [8, 8], "attention": [False, False], "attention_heads": 1, "dropout": 0.1},
            "train": {"steps": 6, **train_},
            "checkpoint": {"every_steps": 3},
            "logging": {"sample_every_steps": 0, "sample_steps": 2},
            "distill": distill,
        }
    )


def _train(run_dir: Path, stop: StopRequest | None = None) -> int:
    watch = Watch(run_dir, rank=0, world_size=1, limit_seconds=300)
    try:
        return train(run_dir, stop or StopRequest(), watch)
    finally:
        watch.close()


def _losses(run_dir: Path) -> list[str]:
    return [json.loads(line)["loss_hex"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _ledger(run_dir: Path) -> str:
    return (run_dir / "ledger" / "rank_0.jsonl").read_text()


@pytest.fixture
def the_last_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured for real, and found to pay: the last candidate that was timed."""
    choose = lambda timings, *, micro_batches: Choice(timings[-1].candidate, ("the last",))  # noqa: E731
    monkeypatch.setattr(trainer.auto_measure, "choose", choose)


@pytest.mark.usefixtures("the_last_pays")
def test_a_run_that_measures_is_the_run_of_its_choice_and_a_resume_measures_no_more(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    explicit, auto = tmp_path / "explicit", tmp_path / "auto"
    freeze(explicit, _config(shards, memory_format="channels_last"), shards=shards)
    assert _train(explicit) == 0
    open_ = _config(shards, memory_format="auto", compile="auto", stop_after_steps=3)
    freeze(auto, open_, shards=shards)
    with caplog.at_level(logging.INFO):
        assert _train(auto) == 75
    assert "compiled, contiguous: not tried, this run is too short" in caplog.text
    assert "train.compile=false, train.memory_format=channels_last" in caplog.text
    assert load_recipe(auto / "recipe.yaml") == _config(shards, memory_format="channels_last", stop_after_steps=3)
    record = read_json_object(auto / "identity.json")
    assert (record["train.compile"], record["train.memory_format"]) == (False, "channels_last")
    figures = (auto / "auto.json").read_bytes()

    def measured_again(*_: object, **__: object) -> NoReturn:
        raise AssertionError("measured again")

    monkeypatch.setattr(trainer.auto_measure, "_measure", measured_again)
    freeze(auto, _config(shards, memory_format="auto", compile="auto"), shards=shards)  # the same command again
    assert _train(auto) == 0
    assert (auto / "auto.json").read_bytes() == figures
    assert _losses(auto) == _losses(explicit) and len(_losses(auto)) == 6
    assert _ledger(auto) == _ledger(explicit)


def test_measuring_leaves_the_processs_randomness_as_it_was(shards: Path, tmp_path: Path) -> None:
    freeze(tmp_path / "run", _config(shards, memory_format="auto"), shards=shards)
    config, before = load_recipe(tmp_path / "run" / "recipe.yaml"), torch.get_rng_state()
    data = trainer.auto_measure.TrainingData.open(config, tmp_path / "run")
    watch = Watch(tmp_path / "run", rank=0, world_size=1, limit_seconds=300)
    try:
        settled = trainer.auto_measure.settle(config, tmp_path / "run", data, start_step=0, stop=StopRequest(), watch=watch)
    finally:
        watch.close()
    assert settled is not None and not settled.train.to_measure
    assert torch.equal(torch.get_rng_state(), before)
    assert not (tmp_path / "run" / "ledger").exists()


def test_a_stop_while_it_measures_leaves_the_recipe_open(shards: Path, tmp_path: Path) -> None:
    freeze(tmp_path / "run", _config(shards, memory_format="auto"), shards=shards)
    stop = StopRequest()
    stop.ask("test")
    assert _train(tmp_path / "run", stop) == 75
    assert load_recipe(tmp_path / "run" / "recipe.yaml").train.memory_format == "auto"
    assert not (tmp_path / "run" / "auto.json").exists()


def test_without_a_compiler_the_run_goes_on_without_it(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.auto_choice, "_LEAST_SECONDS", 0.0)
    monkeypatch.setenv("CXX", "no-such-compiler")
    freeze(tmp_path / "run", _config(shards, compile="auto"), shards=shards)
    assert _train(tmp_path / "run") == 0
    assert load_recipe(tmp_path / "run" / "recipe.yaml").train.compile is False
    failed = read_json_object(tmp_path / "run" / "auto.json")["failed"]
    assert failed == {"compiled, contiguous": "RuntimeError: no compiler: none of no-such-compiler is on the PATH"}


@pytest.mark.all_cases  # compiling takes from half a minute to several
@pytest.mark.usefixtures("the_last_pays")
def test_a_compiled_run_that_measured_has_the_losses_of_one_that_was_told(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.auto_choice, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(trainer.auto_choice, "_TRYING", 1e9)
    told = _config(shards, compile=True, memory_format="channels_last")
    for name, config in (("auto", _config(shards, compile="auto", memory_format="auto")), ("told", told)):
        freeze(tmp_path / name, config, shards=shards)
        assert _train(tmp_path / name) == 0
    frozen = load_recipe(tmp_path / "auto" / "recipe.yaml").train
    assert (frozen.compile, frozen.memory_format) == (True, "channels_last")
    [*_, last] = trainer.auto_choice.read_measurement(tmp_path / "auto").timings  # type: ignore[union-attr]
    assert last.candidate.compile and last.compile_seconds > 1 > max(last.seconds), "the compilation is no part of the timed rounds"
    assert _losses(tmp_path / "auto") == _losses(tmp_path / "told")


def test_a_chain_measures_once_for_all_stages_of_one_batch(shards: Path, tmp_path: Path) -> None:
    config = _config(shards, memory_format="auto", distill={"start_steps": 4, "end_steps": 1, "updates": 2})
    assert config.distill is not None
    freeze_chain(tmp_path, config, config.distill, shards=shards)
    watch = Watch(tmp_path, rank=0, world_size=1, limit_seconds=300)
    try:
        assert distill_job(tmp_path, {}, StopRequest(), watch) == 0
    finally:
        watch.close()
    records = [read_json_object(stage.run_dir / "auto.json") for stage in read_chain(tmp_path)]
    assert [record["measured_in"] for record in records] == [".", "../stage_00_1000_steps", "../stage_01_0002_steps"]
    assert records[0]["timings"] == records[1]["timings"] == records[2]["timings"]
    student, conditions = tmp_path / "stage_02_0001_steps", records[0]["conditions"]
    assert isinstance(conditions, dict)
    for other in ({"micro_batch_size": 4}, {"precision": "bf16"}, {"device": {"kind": "cuda"}}):
        found = trainer.auto_measure._of_an_earlier_stage(student, candidates(config), {**conditions, **other}, micro_batches=1)
        assert found is None, f"these times do not hold for {other}"
    freeze_chain(tmp_path, config, config.distill, shards=shards)  # the same command again: nothing is another run
    assert load_recipe(tmp_path / "stage_01_0002_steps" / "recipe.yaml").train.memory_format != "auto"
