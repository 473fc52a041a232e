"""Real runs of the command line, started, watched from outside and killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from launch.data import pack_faces
from trainer.config_io import load_recipe

RECIPE = Path(__file__).with_name("chain.yaml")
_LIMIT_SECONDS = 240.0


def command(verb: str, run_dir: Path, *, ranks: int, overrides: tuple[str, ...] = ()) -> list[str]:
    """The command line that starts, or resumes, the test's chain or its teacher alone."""
    return [sys.executable, "-m", "launch", verb, str(RECIPE), "--run-dir", str(run_dir), "--ranks", str(ranks), *overrides]


def run(verb: str, run_dir: Path, *, ranks: int, overrides: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    words = command(verb, run_dir, ranks=ranks, overrides=overrides)
    return subprocess.run(words, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False)


@contextmanager
def started(
    verb: str, run_dir: Path, *, ranks: int, overrides: tuple[str, ...] = (), stderr: int | IO[bytes] = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[bytes]]:
    """A command, in a process group of its own, that runs while the test looks at it; ended with all its ranks afterwards."""
    words = command(verb, run_dir, ranks=ranks, overrides=overrides)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            for pid in rank_pids(process.pid).values():
                os.kill(pid, signal.SIGKILL)
            process.wait(_LIMIT_SECONDS)


def rank_pids(launcher: int) -> dict[int, int]:
    """Process ids of the launcher's ranks by rank; a dead one is absent."""
    found = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        rank = next((value[5:] for value in variables if value.startswith(b"RANK=")), None)
        if rank is not None and b"launch.worker" in words:
            found[int(rank)] = int(pid)
    return found


def descendants(pid: int) -> set[int]:
    """Process ids of all that a process started, and of what those started: ranks and their loader processes."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | descendants(child)
    return found


def endless(shards_in: Path) -> tuple[str, ...]:
    """Overrides of a single run that only a signal or a fault ends, on shards in a folder (packed with the first call)."""
    faces = load_recipe(RECIPE, []).data.faces
    assert faces is not None
    shards = pack_faces(faces, shards_in)
    return (
        f"data.shards={shards}",
        "distill=null",
        "train.steps=1000000",
        "lr_schedule.kind=constant",
        "logging.sample_every_steps=0",
        "checkpoint.every_steps=9",
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    """Watch closely until the condition holds; False if the process ends before."""
    deadline = time.monotonic() + _LIMIT_SECONDS
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "the moment to kill at never came"
        time.sleep(0.0005)
    return True


def delivered(run_dir: Path) -> int:
    """Micro-batches in rank 0's ledgers of a chain."""
    return sum(path.read_bytes().count(b"\n") for path in run_dir.glob("stage_*/ledger/rank_0.jsonl"))


@dataclass(frozen=True)
class Curve:
    """Exact losses by step."""

    losses: dict[int, str]

    @property
    def values(self) -> list[float]:
        """As numbers, in step order."""
        return [float.fromhex(self.losses[step]) for step in sorted(self.losses)]


def curves(run_dir: Path) -> dict[str, Curve]:
    """The curve of each stage; a step that stands twice in metrics.jsonl is an error."""
    found = {}
    for path in sorted(run_dir.glob("**/metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        steps = [line["step"] for line in lines]
        assert steps == list(range(len(steps))), f"{path}: steps {steps}"
        found[path.parent.name] = Curve({line["step"]: line["loss_hex"] for line in lines})
    return found
