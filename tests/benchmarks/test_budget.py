"""Parts of benchmarks/gpu.py go on where they were: rows are kept, what runs when time is up is told to stop, then ended."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.gpu_parts.budget import Budget, CommandFailed, Commands, OutOfMemory, Row, Store, TimeUp

# Stands where `halfstep` does: a command of which the first word says how it ends.
COMMAND = """
import os, signal, subprocess, sys, time
from pathlib import Path

match sys.argv[1]:
    case "works":
        print("done")
    case "fails":
        sys.exit(f"{sys.argv[2]} and no more")
    case "goes on later" | "never stops" as how:
        def stop(*_):
            Path("told").touch()
            sys.exit(75)

        signal.signal(signal.SIGTERM, stop if how == "goes on later" else signal.SIG_IGN)
        worker = subprocess.Popen(["sleep", "60"])
        Path("begun").write_text(str(worker.pid))
        Path("begun").rename("worker")
        time.sleep(60)
"""


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def commands(folder: Path, budget: Budget, monkeypatch: pytest.MonkeyPatch) -> Commands:
    (folder / "launch").mkdir()
    (folder / "launch" / "__init__.py").touch()
    (folder / "launch" / "__main__.py").write_text(COMMAND)
    monkeypatch.chdir(folder)  # python -m looks here first
    return Commands(folder, budget, environment={})


def counted(calls: list[int]) -> Callable[[], Row]:
    def make() -> Row:
        calls.append(1)
        return {"number": len(calls)}

    return make


def test_a_row_is_measured_once_and_keeps_its_commit(tmp_path: Path) -> None:
    calls: list[int] = []
    first = Store(tmp_path, Budget(1, grace_seconds=0, clock=Clock()), commit="one")
    assert first.once("a_training", counted(calls)) == {"number": 1, "commit": "one"}
    later = Store(tmp_path, Budget(1, grace_seconds=0, clock=Clock()), commit="two")
    assert later.once("a_training", counted(calls)) == {"number": 1, "commit": "one"}
    assert later.once("b_full", counted(calls)) == {"number": 2, "commit": "two"}
    assert later.rows("a") == {"training": {"number": 1, "commit": "one"}}


def test_without_time_nothing_is_begun_but_what_is_there_is_given(tmp_path: Path) -> None:
    clock, calls = Clock(), list[int]()
    budget = Budget(2, grace_seconds=30, clock=clock)
    store = Store(tmp_path, budget, commit="one")
    store.once("a_training", counted(calls))
    clock.now = 89.9
    assert budget.left == pytest.approx(0.1)
    clock.now = 90.0
    assert store.once("a_training", counted(calls))["number"] == 1
    with pytest.raises(TimeUp):
        store.once("a_quality", counted(calls))
    assert len(calls) == 1 and list(store.rows("a")) == ["training"]


def test_a_step_that_fails_leaves_no_row(tmp_path: Path) -> None:
    store = Store(tmp_path, Budget(1, grace_seconds=0, clock=Clock()), commit="one")

    def fail() -> Row:
        raise CommandFailed("no kernel")

    with pytest.raises(CommandFailed):
        store.once("e_shape", fail)
    assert store.rows("e") == {}
    assert store.once("e_shape", lambda: {"number": 1})["number"] == 1


def test_a_command_gives_its_output_or_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = commands(tmp_path, Budget(1, grace_seconds=5), monkeypatch)
    assert run.run("works", ["works"]) == "done\n"
    with pytest.raises(CommandFailed, match=r"halfstep fails bad key\nended with 1:\nbad key and no more") as plain:
        run.run("fails", ["fails", "bad key"])
    assert not isinstance(plain.value, OutOfMemory)
    with pytest.raises(OutOfMemory):
        run.run("fails", ["fails", "CUDA out of memory"])
    with pytest.raises(CommandFailed, match="ended with 0 too early"):
        run.cut_short("works", ["works"], lambda: False, environment={})


def test_a_command_is_told_to_stop_when_time_is_up_and_its_calls_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    # the budget ends once the command has begun its work; the grace does not
    run = commands(tmp_path, Budget(1, grace_seconds=30, clock=lambda: 40.0 if (tmp_path / "worker").exists() else 0.0), monkeypatch)
    with pytest.raises(TimeUp):
        run.timed("training", ["goes on later"])
    assert (tmp_path / "told").exists()
    wait_for_the_end_of((tmp_path / "worker").read_text())
    (tmp_path / "worker").unlink()
    taken = run.timed("training", ["works"])
    assert taken["calls"] == 2 and 0 < taken["seconds"] <= round(time.monotonic() - began, 1)


def test_a_command_that_does_not_stop_is_ended_with_all_that_it_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = commands(tmp_path, Budget(1, grace_seconds=30, clock=lambda: 61.0 if (tmp_path / "worker").exists() else 0.0), monkeypatch)
    with pytest.raises(TimeUp):
        run.run("training", ["never stops"])
    wait_for_the_end_of((tmp_path / "worker").read_text())


def test_a_short_run_is_ended_as_soon_as_there_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = commands(tmp_path, Budget(1, grace_seconds=5), monkeypatch)
    run.cut_short("short", ["never stops"], (tmp_path / "worker").exists, environment={})
    wait_for_the_end_of((tmp_path / "worker").read_text())


def wait_for_the_end_of(pid: str) -> None:
    """Until a process is gone, or only its name is left; fails after ten seconds."""
    deadline = time.monotonic() + 10
    while (state := _state(pid)) not in ("", "Z"):
        assert time.monotonic() < deadline, f"process {pid} is in state {state}, and should have been ended"
        os.sched_yield()


def _state(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
