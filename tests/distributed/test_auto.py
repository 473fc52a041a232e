"""What a recipe leaves open is measured by rank 0, and every rank goes on with its choice."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from launch.run_dir import freeze
from tests.distributed.pool import RankPool
from trainer.auto_choice import AUTO_FILE
from trainer.config import RunConfig
from trainer.config_io import dump_yaml, load_recipe

pytestmark = pytest.mark.distributed


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    pack(FacesSource("open-peeps", 8), tmp_path / "shards", size=8, workers=1)
    recipe = {
        "data": {"shards": str(tmp_path / "shards"), "global_batch_size": 4, "micro_batch_size": 2},
        "model": {"channels": [8, 8], "attention": [False, False], "attention_heads": 1},
        "train": {"steps": 4, "memory_format": "auto", "compile": "auto"},
    }
    freeze(tmp_path / "run", RunConfig.model_validate(recipe), shards=tmp_path / "shards")
    return tmp_path / "run"


def test_two_ranks_go_on_with_what_rank_0_has_frozen(pool: Callable[[int], RankPool], run_dir: Path) -> None:
    recipe = run_dir / "recipe.yaml"
    first, second = pool(2).run("tests.distributed.jobs:settle_run", {"run_dir": str(run_dir), "recipes": [str(recipe)] * 2})
    frozen = load_recipe(recipe).train
    assert not frozen.to_measure and frozen.layout == "channels_last"
    assert first == second == frozen.model_dump(mode="json")


def test_what_one_rank_knows_is_not_measured_again(pool: Callable[[int], RankPool], run_dir: Path, tmp_path: Path) -> None:
    late, frozen = run_dir / "recipe.yaml", tmp_path / "frozen.yaml"
    config = load_recipe(late)
    known = config.train.model_copy(update={"memory_format": "contiguous", "compile": False})
    frozen.write_text(dump_yaml(config.model_copy(update={"train": known})))
    first, second = pool(2).run("tests.distributed.jobs:settle_run", {"run_dir": str(run_dir), "recipes": [str(late), str(frozen)]})
    assert first == second == known.model_dump(mode="json")
    assert not (run_dir / AUTO_FILE).exists()
