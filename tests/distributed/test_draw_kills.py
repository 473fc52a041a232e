"""A model whose drawing is killed with SIGKILL goes on: the same bytes on 1 and 2 ranks, killed or not, and no batch is drawn twice."""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from data_shards.derive.request import DeriveJob, DrawRequest
from data_shards.tars.verify import verify
from tests.derive_runs import files, ledger
from tests.distributed.forked_ranks import ForkedRanks
from tests.trainer.conftest import _write_run as write_run

pytestmark = pytest.mark.distributed

_COUNT, _BATCH, _KILLS = 96, 4, 2
_LIMIT_SECONDS = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights."""
    root = tmp_path_factory.mktemp("drawn")
    write_run(root / "model", student_steps=16)
    return root


@pytest.fixture(scope="module")
def forked(folder: Path) -> Iterator[ForkedRanks]:
    ranks = ForkedRanks(["launch.worker", "trainer.draw_shards", "trainer.visible", "trainer.engines.engine"], folder / "forked.log")
    yield ranks
    ranks.close()


def prepared(folder: Path, out: Path) -> Path:
    """OUT/run with the request in it, as the command line leaves it for the ranks."""
    (out / "run").mkdir(parents=True)
    request = DrawRequest(str(folder / "model"), _COUNT, batch_size=_BATCH, samples_per_shard=12)
    DeriveJob.drawing(request).write(out / "run")
    return out / "run"


def test_one_rank_two_ranks_and_killed_ranks_draw_the_same_bytes(folder: Path, forked: ForkedRanks, tmp_path: Path) -> None:
    for ranks in (1, 2):
        forked.start("draw", prepared(folder, tmp_path / f"{ranks}"), ranks=ranks)
        assert forked.wait() == [0] * ranks, (folder / "forked.log").read_text()
    dice, out = random.Random(1), tmp_path / "killed"
    run_dir = prepared(folder, out)
    for kill in range(_KILLS):
        pids = forked.start("draw", run_dir, ranks=2)
        deadline, after = time.monotonic() + _LIMIT_SECONDS, (kill + 1) * (_COUNT // _BATCH) // (_KILLS + 2)
        while len(ledger(run_dir)) < after:
            assert time.monotonic() < deadline, (folder / "forked.log").read_text()
            time.sleep(0.001)
        time.sleep(dice.random() * 0.03)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert forked.wait() == [-signal.SIGKILL] * 2, "it was over before the kill came"
        assert not (out / "index.json").exists()
    forked.start("draw", run_dir, ranks=2)
    assert forked.wait() == [0, 0], (folder / "forked.log").read_text()
    assert files(out) == files(tmp_path / "1") == files(tmp_path / "2") and verify(out) == []
    batches = _COUNT // _BATCH
    assert batches - 2 * _KILLS <= len(ledger(run_dir)) <= batches  # ledger() finds what was drawn twice
