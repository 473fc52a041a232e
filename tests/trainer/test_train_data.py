"""Bad data in training: named and ended by default; skipped by the same rule everywhere, within a budget."""

import json
import logging
from pathlib import Path

import pytest

from data_shards.index import ShardIndex
from data_shards.packing.pack import pack
from data_shards.reading.sample import BadSampleError
from data_shards.sources.faces import FacesSource
from launch.run_dir import freeze
from trainer.config import RunConfig
from trainer.metrics import DataBudgetSpent
from trainer.stop import StopRequest
from trainer.train import train
from trainer.watch import Watch


def _run_dir(root: Path, **data: object) -> Path:
    """A run of 4 steps on 8 faces of which one has a flipped bit in its image."""
    shards = root / "shards"
    index = pack(FacesSource("open-peeps", 8), shards, size=16, workers=1)
    offset = index.shards[0].members["png"].offsets[3] + 40
    tar = shards / index.shards[0].name
    content = bytearray(tar.read_bytes())
    content[offset] ^= 1
    tar.write_bytes(content)
    config = RunConfig.model_validate(
        {
            "data": {"shards": str(shards), "global_batch_size": 4, "micro_batch_size": 2, **data},
            "model": {"channels": [8, 8], "attention": [False, False], "attention_heads": 1},
            "train": {"steps": 4},
            "logging": {"sample_every_steps": 0},
        }
    )
    freeze(root / "run", config, shards=shards)
    return root / "run"


def _train(run_dir: Path) -> int:
    watch = Watch(run_dir, rank=0, world_size=1, limit_seconds=300)
    try:
        return train(run_dir, StopRequest(), watch)
    finally:
        watch.close()


def test_a_bad_sample_ends_the_run_by_name(tmp_path: Path) -> None:
    with pytest.raises(BadSampleError, match=r"shard-000000\.tar: sample '.*' at byte \d+"):
        _train(_run_dir(tmp_path))


def test_a_skipped_sample_is_named_counted_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = _run_dir(tmp_path, on_bad_sample="skip")
    with caplog.at_level(logging.WARNING):
        assert _train(run_dir) == 0
    replaced = [line for line in map(json.loads, (run_dir / "ledger" / "rank_0.jsonl").read_text().splitlines()) if "replaced" in line]
    assert len(replaced) == 2, "4 steps of 4 are two epochs of 8 samples"
    assert "skipped shard-000000.tar" in caplog.text
    assert ShardIndex.load(tmp_path / "shards").samples == 8


def test_the_budget_for_bad_samples_is_kept(tmp_path: Path) -> None:
    run_dir = _run_dir(tmp_path, on_bad_sample="skip", max_bad_samples=1)
    with pytest.raises(DataBudgetSpent, match=r"2 samples were bad, data\.max_bad_samples allows 1"):
        _train(run_dir)
