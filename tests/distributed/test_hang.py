"""A rank that stands still ends the run within its limit, and the run says which rank it was and what it did."""

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.distributed.runs import descendants, endless, rank_pids, started, wait_until
from trainer.lease import start_ticks
from trainer.watch import read_heartbeats

pytestmark = pytest.mark.distributed

_LIMIT_SECONDS = 6.0
_RANKS = 3


@pytest.mark.parametrize("stopped", [0, 2])
def test_a_stopped_rank_is_named_and_nothing_of_the_run_is_left(tmp_path: Path, stopped: int) -> None:
    run_dir, terminal = tmp_path / "run", tmp_path / "terminal"
    overrides = (*endless(tmp_path / "shards"), "data.workers=1", f"cluster.collective_timeout_seconds={_LIMIT_SECONDS}")
    overrides = (*overrides, "data.global_batch_size=12")
    with open(terminal, "wb") as stderr, started("train", run_dir, ranks=_RANKS, overrides=overrides, stderr=stderr) as process:
        assert wait_until(lambda: _steps(run_dir) >= 3, process), terminal.read_text()
        pids, all_pids = rank_pids(process.pid), descendants(process.pid)
        assert len(all_pids) >= 2 * _RANKS, "each rank has a loader process"
        os.kill(pids[stopped], signal.SIGSTOP)
        began = time.monotonic()
        heartbeat = (run_dir / "heartbeats" / f"rank_{stopped}.json").read_bytes()
        assert process.wait(60) == 70
        seconds = time.monotonic() - began
    assert seconds < _LIMIT_SECONDS + 5
    assert (run_dir / "heartbeats" / f"rank_{stopped}.json").read_bytes() == heartbeat
    last = read_heartbeats(run_dir)[stopped]
    place = f"phase {last.phase} of step {last.step} for "
    named = rf"rank {stopped} on {socket.gethostname()} \(pid {pids[stopped]}\) answers no more \(.*\): {place}"
    record = json.loads((run_dir / "exit.json").read_text())
    assert (record["code"], record["rank"]) == (70, stopped) and re.match(named, record["reason"])
    assert re.search(named, terminal.read_text())
    stacks = {path.name: path.read_text() for path in (run_dir / "logs").glob("stacks_*")}
    assert set(stacks) == {f"stacks_rank_{rank}.txt" for rank in range(_RANKS) if rank != stopped}
    assert all("all_reduce" in text or "barrier" in text for text in stacks.values()), stacks
    _wait_until_dead(all_pids, seconds=60)


def _steps(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def _wait_until_dead(pids: set[int], *, seconds: float) -> None:
    """Loader processes look after their rank every five seconds."""
    deadline = time.monotonic() + seconds
    while alive := {pid for pid in pids if start_ticks(pid) is not None}:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
