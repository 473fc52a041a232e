"""What a recipe leaves open is measured by rank 0, and every rank goes on with its choice."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from launch.run_dir import freeze
from tests.distributed.pool import RankPool
from trainer.config import RunConfig
from trainer.config_io import load_recipe

pytestmark = pytest.mark.distributed


def test_two_ranks_go_on_with_what_rank_0_has_frozen(pool: Callable[[int], RankPool], tmp_path: Path) -> None:
    pack(FacesSource("open-peeps", 8), tmp_path / "shards", size=8, workers=1)
    recipe = {
        "data": {"shards": str(tmp_path / "shards"), "global_batch_size": 4, "micro_batch_size": 2},
        "model": {"channels": [8, 8], "attention": [False, False], "attention_heads": 1},
        "train": {"steps": 4, "memory_format": "auto", "compile": "auto"},
    }
    freeze(tmp_path / "run", RunConfig.model_validate(recipe), shards=tmp_path / "shards")
    first, second = pool(2).run("tests.distributed.jobs:settle_run", {"run_dir": str(tmp_path / "run")})
    frozen = load_recipe(tmp_path / "run" / "recipe.yaml").train
    assert not frozen.to_measure
    assert first == second == frozen.model_dump(mode="json")
