"""One save is killed, or refused by the disk, at each of its system calls; what is left is always a whole checkpoint.

Torch is imported once, by a process that forks one child a trial. strace attaches to the child, which then saves."""

import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

import pytest
import torch
from torch import Tensor

from trainer.checkpoint import agree_on_pieces, read_tensors
from trainer.engines.engine import Shard
from trainer.manifest import Retention, committed, newest_checkpoint, sweep_leftovers
from trainer.save import Saver

ROOT = Path(__file__).parents[2]
SYSCALLS = ("write", "fsync", "mkdir", "rename", "unlink", "unlinkat", "rmdir")
REFUSED_SYSCALLS = ("write", "fsync", "mkdir", "rename")
LEAST_POINTS = 17
"""Of one save: a folder made; 3 files written, one of them in two parts; 6 fsyncs; 3 renames; an old folder of 2 files deleted."""
LEAST_REFUSED = 9
"""Of them those in front of the commit that can be refused: the folder, 3 writes, 4 fsyncs and the rename."""
IO_ERROR = 74
SAMPLE = 6


@final
@dataclass(frozen=True)
class Point:
    """The `number`-th call (from 1) of a system call in a save."""

    syscall: str
    number: int
    asynchronous: bool


@final
class Zygote:
    """A process that has imported torch, and forks a child for each save that it is told of."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.trainer.test_crash_points"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def save(self, run_dir: Path, log: Path, *, asynchronous: bool, inject: str | None) -> int:
        """Save step 2 in a child under strace, which writes its log and injects a fault; returns the child's exit code."""
        pid = int(self._ask({"run_dir": str(run_dir), "asynchronous": asynchronous}))
        fault = ["-e", f"inject={inject}"] if inject else []
        command = ["strace", "-f", "-p", str(pid), "-o", str(log), "-e", f"trace={','.join(SYSCALLS)}", *fault]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
            assert strace.stderr is not None
            said = strace.stderr.readline()
            assert "attached" in said, said
            code = int(self._ask({"go": True}))
            strace.wait(30)
        return code

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)

    def _ask(self, request: dict[str, object]) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().decode()


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """The process that forks; skips where there is no strace that may look into our own processes."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed (apt-get install strace)")
    tried = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"strace may not trace here: {tried.stderr.strip()}")
    started = Zygote()
    yield started
    started.close()


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 0 and 1; a save of step 2 will delete step 0."""
    run_dir = tmp_path_factory.mktemp("crash") / "run"
    run_dir.mkdir()
    for step in (0, 1):
        _saver(run_dir, asynchronous=False, step=step).start(step, {})
    return run_dir


@pytest.fixture(scope="module")
def points(zygote: Zygote, before: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Point]:
    """Every call that an undisturbed save makes, counted by running one under the same strace."""
    found = []
    for asynchronous in (False, True):
        log = tmp_path_factory.mktemp("dry_run") / "strace"
        with _copy(before, log.with_name("run")) as run_dir:
            assert zygote.save(run_dir, log, asynchronous=asynchronous, inject=None) == 0
            assert _check(run_dir) == 2 and [step for step, _ in committed(run_dir)] == [1, 2]
        calls = Counter(re.findall(r"^\d+ +(\w+)\(", log.read_text(), flags=re.MULTILINE))
        found += [Point(syscall, number + 1, asynchronous) for syscall in SYSCALLS for number in range(calls[syscall])]
    assert len(found) >= 2 * LEAST_POINTS, Counter((point.syscall, point.asynchronous) for point in found)
    return found


def test_a_sample_of_crashes_leaves_a_whole_checkpoint(zygote: Zygote, before: Path, points: Sequence[Point], tmp_path: Path) -> None:
    for point in random.Random(0).sample(points, SAMPLE):
        _crash(zygote, before, point, tmp_path)


@pytest.mark.engines
def test_a_crash_at_every_call_leaves_a_whole_checkpoint(
    zygote: Zygote, before: Path, points: Sequence[Point], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    steps = Counter(_crash(zygote, before, point, tmp_path) for point in points)
    record_property("points", len(points))
    assert set(steps) == {1, 2} and steps.total() == len(points), steps


def test_a_sample_of_refused_calls_leaves_the_older_checkpoint(
    zygote: Zygote, before: Path, points: Sequence[Point], tmp_path: Path
) -> None:
    refused = [point for point in points if point.syscall in REFUSED_SYSCALLS]
    for point, error in zip(random.Random(1).sample(refused, 2), ("ENOSPC", "EIO"), strict=True):
        _refuse(zygote, before, point, error, tmp_path)


@pytest.mark.engines
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_refusal_of_every_call_leaves_the_older_checkpoint(
    zygote: Zygote, before: Path, points: Sequence[Point], tmp_path: Path, error: str
) -> None:
    codes = Counter(_refuse(zygote, before, point, error, tmp_path) for point in points if point.syscall in REFUSED_SYSCALLS)
    assert codes[IO_ERROR] >= 2 * LEAST_REFUSED, codes


def _crash(zygote: Zygote, before: Path, point: Point, folder: Path) -> int:
    """Kill a save at a point; returns the step that is then the newest, after checking that it is whole."""
    with _copy(before, folder / "run") as run_dir:
        inject = f"{point.syscall}:signal=KILL:when={point.number}"
        code = zygote.save(run_dir, folder / "strace", asynchronous=point.asynchronous, inject=inject)
        assert code == -signal.SIGKILL, f"{point} was never reached: exit code {code}"
        step = _check(run_dir)
        sweep_leftovers(run_dir)
        left = os.listdir(run_dir / "checkpoints")
        assert all(re.fullmatch(r"step_\d{6}", name) for name in left), left
        assert _check(run_dir) == step
    return step


def _refuse(zygote: Zygote, before: Path, point: Point, error: str, folder: Path) -> int:
    """Let a call of a save fail: it says so, and leaves a whole checkpoint and nothing half done. Returns the exit code."""
    with _copy(before, folder / "run") as run_dir:
        inject = f"{point.syscall}:error={error}:when={point.number}"
        code = zygote.save(run_dir, folder / "strace", asynchronous=point.asynchronous, inject=inject)
        if code == 0:  # only the tidying up behind the commit was refused
            assert _check(run_dir) == 2, f"{point} refused with {error}"
        else:
            assert code == IO_ERROR, f"{point} refused with {error}: exit code {code}"
            number, needed = getattr(errno, error), r" \(\d+ bytes are needed, \d+ are free\)" if error == "ENOSPC" else ""
            message = rf"{number} rank 0 cannot save {run_dir / 'checkpoints' / 'step_000002'}: {os.strerror(number)}{needed}; older"
            assert re.match(message, (run_dir / "error.txt").read_text())
            assert _check(run_dir) in (1, 2)
        left = os.listdir(run_dir / "checkpoints")
        assert "step_000001" in left and all(re.fullmatch(r"step_\d{6}", name) for name in left), f"{point}: {left}"
    return code


def _check(run_dir: Path) -> int:
    """The step of the newest checkpoint, whose tensors are those of that step."""
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None
    for part, tensors in _tensors(checkpoint.step).items():
        read = read_tensors(checkpoint, part)
        assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    return checkpoint.step


@contextmanager
def _copy(source: Path, run_dir: Path) -> Iterator[Path]:
    shutil.copytree(source, run_dir)
    yield run_dir
    shutil.rmtree(run_dir)


def _tensors(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {part: {"a": torch.randn(20_000, generator=generator), "b": torch.randn(8, 9, generator=generator)} for part in ("model", "ema")}


def _saver(run_dir: Path, *, asynchronous: bool, step: int) -> Saver:
    parts = _tensors(step)
    state = {part: {name: Shard(tuple(each.shape), 0, each) for name, each in tensors.items()} for part, tensors in parts.items()}
    retention = Retention(keep_last=2, keep_every_steps=None, keep_best=0, good=[1])
    return Saver(run_dir, state, agree_on_pieces(state), retention=retention, asynchronous=asynchronous, timeout_seconds=60.0)


def _serve() -> None:
    """The zygote: for each request fork a child that waits for the word to go; answer with its id, then with its exit code."""
    torch.set_num_threads(1)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        own, childs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            own.close()
            _save_when_told(Path(request["run_dir"]), childs, asynchronous=request["asynchronous"])
        childs.close()
        own.recv(1)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        sys.stdin.readline()
        own.sendall(b"!")
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        own.close()
        sys.stdout.write(f"{code}\n")
        sys.stdout.flush()


def _save_when_told(run_dir: Path, zygote: socket.socket, *, asynchronous: bool) -> None:
    """The child: its main thread makes none of the calls that are counted, until the save has ended."""
    code = 1
    try:
        saver = _saver(run_dir, asynchronous=asynchronous, step=2)
        zygote.sendall(b"!")  # strace attaches now
        zygote.recv(1)
        code = _save(saver, run_dir)
    finally:
        os._exit(code)


def _save(saver: Saver, run_dir: Path) -> int:
    try:
        saver.start(2, {"world_size": 1})
        saver.finish()
    except OSError as error:
        # pwrite: the counts of `write` are each thread's own, so that this thread's first one would be refused too.
        descriptor = os.open(run_dir / "error.txt", os.O_WRONLY | os.O_CREAT)
        os.pwrite(descriptor, f"{error.errno} {error.strerror}".encode(), 0)
        return IO_ERROR
    return 0


if __name__ == "__main__":
    _serve()
