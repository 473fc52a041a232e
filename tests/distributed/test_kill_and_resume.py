"""A rank killed with SIGKILL at any moment of a chain changes nothing: the same command again ends in the same bits."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.runs import curves, delivered, rank_pids, run, started, wait_until
from trainer.hash import hash_run
from trainer.watch import Heartbeat, read_heartbeats

pytestmark = pytest.mark.distributed

_END_SECONDS = 30.0
"""By when a command whose rank was killed has ended; its launcher gives the other ranks ten seconds."""
_STOP_SECONDS = 30.0
_TRIES = 3


@dataclass(frozen=True)
class Moment:
    """What a rank is doing when it is killed, as its heartbeat and the chain's folder show."""

    holds: Callable[[Path, Heartbeat], bool]
    seconds: float
    """How long after it was first seen the kill comes at most; a case that is too late waits for the next such moment."""
    until: float = 0.9
    """The share of the chain's micro-batches within which the case begins to wait for it."""


@dataclass(frozen=True)
class Case:
    """A kill. Its seed chooses the rank, how far the chain has come, and how far the moment."""

    engine: str
    ranks: int
    moment: str
    seed: int
    workers: int = 0
    """Processes that read ahead for each rank, and outlive it."""

    def __str__(self) -> str:
        return "-".join([self.engine, f"{self.ranks}_ranks", self.moment, *(["read_ahead"] if self.workers else []), str(self.seed)])

    @property
    def overrides(self) -> tuple[str, ...]:
        """What its command adds to the chain's recipe."""
        return (f"engine.kind={self.engine}", f"data.workers={self.workers}")


def _phase(name: str) -> Callable[[Path, Heartbeat], bool]:
    return lambda _, beat: beat.phase == name


def _saving(name: str) -> Callable[[Path, Heartbeat], bool]:
    return lambda _, beat: beat.saving == name


def _exporting(run_dir: Path, beat: Heartbeat) -> bool:
    return beat.phase == "export" and not (_stages_begun(run_dir)[-1] / "export").exists()


def _handing_over(run_dir: Path, beat: Heartbeat) -> bool:
    """Between two stages: the export of one is there, and the next one has not begun."""
    stages, begun = sorted(run_dir.glob("stage_*")), _stages_begun(run_dir)
    return beat.phase in ("export", "restore") and len(begun) < len(stages) and (begun[-1] / "export").exists()


def _past_a_checkpoint(run_dir: Path, beat: Heartbeat) -> bool:
    """In a step of a stage that has a checkpoint: the next attempt will have something to restore."""
    return beat.phase in ("data", "compute", "reduce") and any((_stages_begun(run_dir)[-1] / "checkpoints").glob("step_??????"))


def _restoring_again(attempts: int) -> Callable[[Path, Heartbeat], bool]:
    """In an attempt that has not restored yet, after so many that had."""
    return lambda run_dir, beat: beat.phase == "restore" and _attempts(run_dir) == attempts


def _stages_begun(run_dir: Path) -> list[Path]:
    """The stages whose first attempt has passed its restore, in order."""
    return sorted(path.parent for path in run_dir.glob("stage_*/attempts.jsonl"))


def _attempts(run_dir: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in run_dir.glob("stage_*/attempts.jsonl"))


MOMENTS = {
    "rendezvous": Moment(_phase("rendezvous"), seconds=0.5, until=0.0),
    "data": Moment(_phase("data"), seconds=0.0003),
    "compute": Moment(_phase("compute"), seconds=0.01),
    "reduce": Moment(_phase("reduce"), seconds=0.001),
    "stage": Moment(_phase("stage"), seconds=0.0003, until=0.7),
    "write": Moment(_saving("write"), seconds=0.005),
    "commit": Moment(_saving("commit"), seconds=0.005),
    "sample": Moment(_phase("sample"), seconds=0.03),
    "export": Moment(_exporting, seconds=0.2),
    "hand_over": Moment(_handing_over, seconds=0.05, until=0.75),
    "restore": Moment(_past_a_checkpoint, seconds=0.01),
}
"""A case of `restore` kills twice: here, and while the attempt after that restores."""
_RESTORE_SECONDS = 0.05


def _cases(engine: str, ranks: int, counts: Mapping[str, int], *, first_seed: int) -> list[Case]:
    names = [name for name, count in counts.items() for _ in range(count)]
    return [Case(engine, ranks, name, first_seed + number) for number, name in enumerate(names)]


_STEPS = {"data": 2, "compute": 2, "reduce": 2}
_SAVES = {"stage": 3, "write": 2, "commit": 3}
_OTHERS = {"sample": 2, "export": 1, "hand_over": 2, "restore": 3, "rendezvous": 1}
CASES = [
    *_cases("replicated", 2, {**_STEPS, **_SAVES, **_OTHERS, "hand_over": 1}, first_seed=514),
    *_cases("fsdp", 2, {**_STEPS, **_SAVES, **_OTHERS}, first_seed=941),
    *_cases("replicated", 4, {"compute": 1, "commit": 1, "hand_over": 1}, first_seed=100),
    Case("replicated", 2, "data", 200, workers=1),
    Case("fsdp", 2, "data", 201, workers=1),
]
"""Seeds of which most moments are met on rank 0 and on another one; a commit, which is rank 0's, more often on rank 0."""
IN_MAKE_TEST = {516, 521, 531, 952, 962}
"""A step, the staging of a save, a hand-over; under FSDP2 a commit and a restore."""
_REFERENCES = {("replicated", 2): "two_ranks", ("replicated", 4): "four_ranks", ("fsdp", 2): "fsdp_two_ranks"}


@pytest.fixture(scope="session")
def fsdp_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test's chain under FSDP2, undisturbed, on 2 ranks."""
    run_dir = tmp_path_factory.mktemp("reference_fsdp_2_ranks") / "run"
    finished = run("distill", run_dir, ranks=2, overrides=("engine.kind=fsdp",))
    assert finished.returncode == 0, finished.stderr
    return run_dir


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=[] if case.seed in IN_MAKE_TEST else [pytest.mark.all_kills]) for case in CASES]
)
def test_a_rank_killed_at_any_moment_changes_no_bit(case: Case, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    reference: Path = request.getfixturevalue(_REFERENCES[case.engine, case.ranks])
    dice = random.Random(case.seed)
    run_dir = _killed_run(case, dice, reference, tmp_path)
    resumed = run("distill", run_dir, ranks=case.ranks, overrides=case.overrides)
    assert resumed.returncode == 0, resumed.stderr
    assert curves(run_dir) == curves(reference)
    assert hash_run(run_dir) == hash_run(reference)
    assert not [*run_dir.glob("stage_*/checkpoints/*.tmp-*"), *run_dir.glob("stage_*/.export.tmp-*")]


def test_there_are_fifty_moments_and_five_of_them_are_in_make_test() -> None:
    assert len({case.seed for case in CASES}) == len(CASES) == 50
    assert len(IN_MAKE_TEST & {case.seed for case in CASES}) == 5


def _killed_run(case: Case, dice: random.Random, reference: Path, folder: Path) -> Path:
    """A chain that was killed at the case's moment; one that the moment did not come in is begun anew."""
    moment = MOMENTS[case.moment]
    for number in range(_TRIES):
        run_dir = folder / f"try_{number}"
        shutil.copytree(reference / "shards", run_dir / "shards")
        after = int(dice.random() * moment.until * delivered(reference))
        if _kill(case, moment, dice, run_dir, after=after) and (case.moment != "restore" or _kill_while_restoring(case, dice, run_dir)):
            return run_dir
    raise AssertionError(f"in {_TRIES} chains no rank was caught in the moment {case.moment}")


def _kill_while_restoring(case: Case, dice: random.Random, run_dir: Path) -> bool:
    """Kill the attempt after a kill, too, before it has restored; False if that was over before the kill came."""
    return _kill(case, Moment(_restoring_again(_attempts(run_dir)), seconds=_RESTORE_SECONDS), dice, run_dir)


def _kill(case: Case, moment: Moment, dice: random.Random, run_dir: Path, *, after: int = 0) -> bool:
    """Start or resume the chain, and kill a rank at a moment after so many of rank 0's micro-batches; False if it does not come."""
    rank, seen = dice.randrange(case.ranks), list[Heartbeat]()
    with started("distill", run_dir, ranks=case.ranks, overrides=case.overrides) as process:
        if not wait_until(lambda: delivered(run_dir) >= after and rank in rank_pids(process.pid), process):
            return False
        pid = rank_pids(process.pid)[rank]

        def is_there() -> bool:
            beat = read_heartbeats(run_dir).get(rank)
            if beat is None or beat.pid != pid or not moment.holds(run_dir, beat):
                return False
            seen.append(beat)
            return True

        def is_killed() -> bool:
            if not is_there():
                return False
            time.sleep(dice.random() * moment.seconds)
            return _kill_if(is_there, pid)

        if not wait_until(is_killed, process):
            return False
        assert process.wait(_END_SECONDS) == 70
    assert read_heartbeats(run_dir)[rank] == seen[-1], "it went on after it was killed"
    record = json.loads((run_dir / "exit.json").read_text())
    assert (record["code"], record["rank"]) == (70, rank), record
    return True


def _kill_if(condition: Callable[[], bool], pid: int) -> bool:
    """Hold a process, so that the condition is about the very place where it dies; kill it if it holds, else let it go on.

    Returns whether it was killed; False too where it has ended by itself."""
    try:
        os.kill(pid, signal.SIGSTOP)
        deadline = time.monotonic() + _STOP_SECONDS
        while not _stands_still(pid):
            assert time.monotonic() < deadline, f"process {pid} does not stop"
            time.sleep(0.0002)  # a thread that the disk keeps waiting stops when it has been served
        if condition():
            os.kill(pid, signal.SIGKILL)
            return True
        os.kill(pid, signal.SIGCONT)
    except (FileNotFoundError, ProcessLookupError):
        pass
    return False


def _stands_still(pid: int) -> bool:
    """Whether each thread of a process is stopped or has ended."""
    stats = [path.read_text(errors="replace") for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] in "TZX" for stat in stats)
