"""A run's folder is frozen at its first start; another run cannot slip into it."""

from pathlib import Path

import pytest

from data_shards.files import read_json_object
from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from launch.cluster import load_cluster
from launch.run_dir import freeze, write_surroundings
from trainer.auto_choice import Candidate, Measurement, Timing, choose, freeze_choice
from trainer.config import RunConfig, TrainConfig, identity
from trainer.config_io import load_recipe


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four faces."""
    out = tmp_path_factory.mktemp("shards")
    pack(FacesSource("open-peeps", 4), out, size=16, workers=1)
    return out


def _begin(run_dir: Path, config: RunConfig, shards: Path) -> None:
    """Freeze a run and give it a checkpoint, so that there is something to lose."""
    freeze(run_dir, config, shards=shards)
    manifest = run_dir / "checkpoints" / "step_000001" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.touch()


def _config(shards: Path, **changes: object) -> RunConfig:
    config = RunConfig.model_validate({"data": {"shards": str(shards)}, "train": {"steps": 10}})
    return config.model_copy(update=changes)


def test_the_frozen_recipe_is_complete_and_reads_back_equal(tmp_path: Path, shards: Path) -> None:
    config = _config(shards)
    freeze(tmp_path / "run", config, shards=shards)
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == config


def test_another_seed_is_refused_with_the_difference(tmp_path: Path, shards: Path) -> None:
    _begin(tmp_path / "run", _config(shards), shards)
    with pytest.raises(ValueError, match="seed: was 0, now 7"):
        freeze(tmp_path / "run", _config(shards, seed=7), shards=shards)


def test_before_the_first_checkpoint_a_recipe_may_be_mended(tmp_path: Path, shards: Path) -> None:
    freeze(tmp_path / "run", _config(shards), shards=shards)
    freeze(tmp_path / "run", _config(shards, seed=7), shards=shards)
    assert load_recipe(tmp_path / "run" / "recipe.yaml").seed == 7


def test_other_data_is_refused(tmp_path: Path, shards: Path) -> None:
    _begin(tmp_path / "run", _config(shards), shards)
    pack(FacesSource("open-peeps", 5), tmp_path / "others", size=16, workers=1)
    with pytest.raises(ValueError, match=r"data\.shards sha256: was"):
        freeze(tmp_path / "run", _config(tmp_path / "others"), shards=tmp_path / "others")


def test_moved_shards_are_the_same_data(tmp_path: Path, shards: Path) -> None:
    _begin(tmp_path / "run", _config(shards), shards)
    pack(FacesSource("open-peeps", 4), tmp_path / "moved", size=16, workers=1)
    freeze(tmp_path / "run", _config(tmp_path / "moved"), shards=tmp_path / "moved")


def test_a_longer_run_is_the_same_run_where_the_rate_does_not_depend_on_it(tmp_path: Path, shards: Path) -> None:
    _begin(tmp_path / "run", _config(shards), shards)
    freeze(tmp_path / "run", _config(shards, train=TrainConfig(steps=20)), shards=shards)
    assert load_recipe(tmp_path / "run" / "recipe.yaml").train.steps == 20


def test_a_longer_run_under_a_cosine_is_another_run(tmp_path: Path, shards: Path) -> None:
    cosine = load_cosine(shards)
    _begin(tmp_path / "run", cosine, shards)
    with pytest.raises(ValueError, match=r"train\.steps: was 10, now 20"):
        freeze(tmp_path / "run", cosine.model_copy(update={"train": TrainConfig(steps=20)}), shards=shards)


def load_cosine(shards: Path) -> RunConfig:
    """The same run under a cosine schedule."""
    return RunConfig.model_validate({"data": {"shards": str(shards)}, "train": {"steps": 10}, "lr_schedule": {"kind": "cosine"}})


@pytest.mark.parametrize("free", ["engine.kind", "checkpoint.every_steps", "logging.every_steps", "data.workers", "train.stop_after_steps"])
def test_how_a_run_is_run_is_not_its_identity(shards: Path, free: str) -> None:
    assert free not in identity(_config(shards))


@pytest.mark.parametrize("fixed", ["engine.precision", "engine.attention", "train.compile", "train.memory_format", "data.micro_batch_size"])
def test_what_a_run_computes_is_its_identity(shards: Path, fixed: str) -> None:
    assert fixed in identity(_config(shards))


def test_the_surroundings_say_versions_and_leave_the_devices_to_the_ranks(tmp_path: Path) -> None:
    write_surroundings(tmp_path, load_cluster("local", []))
    written = read_json_object(tmp_path / "environment.json")
    assert written.keys() == {"python", "platform", "processors", "git_commit", "packages"}
    assert isinstance(written["packages"], dict) and {"torch", "diffusers"} <= written["packages"].keys()


def _measured(run_dir: Path, shards: Path) -> None:
    """A run that began with auto and has measured: what rank 0 leaves behind before step 0."""
    config = _config(shards, train=TrainConfig(steps=10, memory_format="auto"))
    freeze(run_dir, config, shards=shards)
    measurement = Measurement((Timing(Candidate(False, "channels_last"), (1.0,)),), {})
    freeze_choice(run_dir, config, choose(measurement.timings, micro_batches=1), measurement, measured_in=".")


def test_the_same_command_finds_what_was_measured_before_the_first_checkpoint(tmp_path: Path, shards: Path) -> None:
    _measured(tmp_path / "run", shards)
    freeze(tmp_path / "run", _config(shards, train=TrainConfig(steps=10, memory_format="auto")), shards=shards)
    assert load_recipe(tmp_path / "run" / "recipe.yaml").train.memory_format == "channels_last"


def test_a_recipe_that_was_mended_is_measured_again(tmp_path: Path, shards: Path) -> None:
    _measured(tmp_path / "run", shards)
    freeze(tmp_path / "run", _config(shards, seed=7, train=TrainConfig(steps=10, memory_format="auto")), shards=shards)
    assert load_recipe(tmp_path / "run" / "recipe.yaml").train.memory_format == "auto"
    assert not (tmp_path / "run" / "auto.json").exists()


def test_auto_fits_any_run_that_has_begun(tmp_path: Path, shards: Path) -> None:
    told = _config(shards, train=TrainConfig(steps=10, memory_format="channels_last"))
    _begin(tmp_path / "run", told, shards)
    freeze(tmp_path / "run", _config(shards, train=TrainConfig(steps=10, memory_format="auto", compile="auto")), shards=shards)
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == told


def test_another_value_than_the_measured_one_is_refused_once_the_run_has_begun(tmp_path: Path, shards: Path) -> None:
    _measured(tmp_path / "run", shards)
    _begin(tmp_path / "run", _config(shards, train=TrainConfig(steps=10, memory_format="auto")), shards)
    with pytest.raises(ValueError, match=r'train\.memory_format: was "channels_last", now "contiguous"'):
        freeze(tmp_path / "run", _config(shards), shards=shards)
    assert (tmp_path / "run" / "auto.json").exists()
