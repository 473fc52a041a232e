"""Runs of the command line on clusters, and what is compared of them."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.submitted import submissions
from tests.cluster.slurm_cluster import Slurm
from tests.distributed.runs import RECIPE

_LIMIT_SECONDS = 400.0
_COMPARED = ("step", "loss_hex", "gradient_norm", "learning_rate")


def halfstep(*words: str | Path, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command, to its end."""
    command = [sys.executable, "-m", "launch", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False)


def local_run(run_dir: Path, ranks: int, overrides: Sequence[str]) -> None:
    """A run of this machine's own ranks, to its end."""
    done = halfstep("train", RECIPE, "--run-dir", run_dir, "--ranks", str(ranks), "distill=null", *overrides)
    assert done.returncode == 0, done.stderr


@dataclass
class Reference:
    """Undisturbed runs, each made when it is first asked for."""

    folder: Path
    shards: Path
    make: Callable[[Path, int, Sequence[str]], None]
    made: dict[tuple[int, tuple[str, ...]], Path] = field(default_factory=dict)

    def of(self, ranks: int, *overrides: str) -> Path:
        """The RUN_DIR of a finished run with these overrides."""
        key = (ranks, overrides)
        if key not in self.made:
            run_dir = self.folder / f"run_{len(self.made)}"
            self.make(run_dir, ranks, [f"data.shards={self.shards}", *overrides])
            self.made[key] = run_dir
        return self.made[key]


@dataclass(frozen=True)
class SlurmRun:
    """A run that was submitted to the tests' Slurm."""

    slurm: Slurm
    run_dir: Path
    words: tuple[str, ...]

    @classmethod
    def submit(cls, slurm: Slurm, run_dir: Path, *overrides: str, verb: str = "train") -> "SlurmRun":
        """Submit the test's recipe; returns when it is queued."""
        without = ("distill=null",) if verb == "train" else ()
        run = cls(slurm, run_dir, (verb, str(RECIPE), "--cluster", "slurm", "--run-dir", str(run_dir), *without, *overrides))
        done = run.again()
        assert done.returncode == 0, done.stderr
        return run

    def again(self, *more: str) -> subprocess.CompletedProcess[str]:
        """Give the command again."""
        return halfstep(*self.words, *more, environment=self.slurm.environment)

    @property
    def job_id(self) -> str:
        """Of the newest job of the run's folder."""
        return submissions(self.run_dir)[-1].job_id

    def wait_for(self, *states: str, seconds: float = 240) -> str:
        """Return when the job is in one of Slurm's states; pauses of a job that was queued again are cut short."""
        return self.slurm.wait_for(self.job_id, *states, seconds=seconds)

    def wait_for_step(self, step: int) -> None:
        """Return when the run has logged so many steps."""
        self.slurm.wait_until(self.job_id, lambda: logged_steps(self.run_dir) >= step, f"step {step} of {self.run_dir}")

    def finish(self, seconds: float = 240) -> None:
        """Return when the job has ended well."""
        state = self.wait_for("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", seconds=seconds)
        assert state == "COMPLETED", f"{state}\n{self.log()}"

    def log(self) -> str:
        """All that the run's jobs have said."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.run_dir.glob("job/*.out")))

    def ends(self) -> list[dict[str, object]]:
        """How its attempts ended and what was decided."""
        return lines(self.run_dir / "job" / "ends.jsonl")


def preempt(slurm: Slurm, run: SlurmRun) -> None:
    """Take the nodes away with a job of the high partition, and wait until that has ended."""
    before = int(slurm.facts(run.job_id)["Restarts"])
    other = slurm.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    ).strip()
    slurm.wait_for(other, "COMPLETED")
    slurm.wait_until(run.job_id, lambda: int(slurm.facts(run.job_id)["Restarts"]) > before, "the preempted job to be queued again")


def lines(path: Path) -> list[dict[str, object]]:
    """Objects of a JSON-lines file; none where it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logged_steps(run_dir: Path) -> int:
    """How many steps a run has logged."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def curve(run_dir: Path) -> list[tuple[object, ...]]:
    """What must be equal bit for bit of every step; a step that stands twice or is missing is an error."""
    found = [tuple(line[key] for key in _COMPARED) for line in lines(run_dir / "metrics.jsonl")]
    assert [row[0] for row in found] == list(range(len(found))), f"{run_dir}: steps {[row[0] for row in found]}"
    return found


def hashes(run_dir: Path) -> str:
    """`halfstep hash`: weights, EMA weights, samples delivered."""
    done = halfstep("hash", run_dir)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_same(run_dir: Path, reference: Path, *, with_hashes: bool = False) -> None:
    """Two runs are equal bit for bit."""
    assert curve(run_dir) == curve(reference)
    if with_hashes:
        assert hashes(run_dir) == hashes(reference)
