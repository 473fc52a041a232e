"""A rank killed at any moment changes nothing: the same command again ends in the same bits."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.distributed.runs import curves, delivered, rank_pids, run, started, wait_until
from trainer.hash import hash_run

pytestmark = pytest.mark.distributed

MOMENTS = ["inside a save", "between stages", "inside a save", *["anywhere"] * 7]


@pytest.mark.parametrize(("seed", "moment"), list(enumerate(MOMENTS)))
def test_a_rank_killed_at_a_random_moment_changes_no_bit_on_2_ranks(two_ranks: Path, tmp_path: Path, seed: int, moment: str) -> None:
    _kill_and_resume(two_ranks, tmp_path / "run", ranks=2, seed=seed, moment=moment)


@pytest.mark.parametrize("seed", range(3))
def test_a_rank_killed_at_a_random_moment_changes_no_bit_on_4_ranks(four_ranks: Path, tmp_path: Path, seed: int) -> None:
    _kill_and_resume(four_ranks, tmp_path / "run", ranks=4, seed=100 + seed, moment="anywhere")


def _kill_and_resume(reference: Path, run_dir: Path, *, ranks: int, seed: int, moment: str) -> None:
    dice = random.Random(seed)
    shutil.copytree(reference / "shards", run_dir / "shards")
    with started("distill", run_dir, ranks=ranks) as process:
        rank = _wait_for(moment, dice, reference, run_dir, process)
        os.kill(rank_pids(process.pid)[rank], signal.SIGKILL)
        assert process.wait(60) == 70
    _check_moment(moment, run_dir)
    resumed = run("distill", run_dir, ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr
    assert curves(run_dir) == curves(reference)
    assert hash_run(run_dir) == hash_run(reference)


def _wait_for(moment: str, dice: random.Random, reference: Path, run_dir: Path, process: subprocess.Popen[bytes]) -> int:
    """Wait for the moment and name the rank to kill."""
    match moment:
        case "inside a save":
            saves = dice.randrange(1, 5)
            last = run_dir / "stage_00_1000_steps" / "checkpoints"
            name = f"step_{saves * 6:06d}.tmp-*"
            assert wait_until(lambda: any(last.glob(name)), process)
            return 0
        case "between stages":
            assert wait_until((run_dir / "stage_00_1000_steps" / "export").exists, process)
            return 1
        case _:
            target = dice.randrange(1, delivered(reference))
            assert wait_until(lambda: delivered(run_dir) >= target, process)
            time.sleep(dice.random() * 0.05)  # lands anywhere within a step, not at the ledger's write
            return dice.randrange(len(rank_pids(process.pid)))


def _check_moment(moment: str, run_dir: Path) -> None:
    """What the killed run left behind shows that it died at the moment meant."""
    if moment == "inside a save":
        assert list(run_dir.glob("stage_00_1000_steps/checkpoints/*.tmp-*"))
    if moment == "between stages":
        assert not (run_dir / "stage_01_0004_steps" / "metrics.jsonl").exists()
