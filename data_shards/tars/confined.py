"""Runs work on an untrusted file in a process that can open, write and start nothing, and dies when it takes too much."""

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, final

MAX_LINE_BYTES = 2**16
_ROOT = Path(__file__).resolve().parents[2]


class ConfinedError(ValueError):
    """What the confined process says of its file, or how it ended instead of saying it."""


@final
@dataclass(frozen=True)
class Limits:
    """What a confined process may take; memory_bytes: address space; output_bytes: of all its lines together."""

    memory_bytes: int
    cpu_seconds: int
    wall_seconds: int
    output_bytes: int


def confined_lines(module: str, file: BinaryIO, limits: Limits) -> Iterator[dict[str, object]]:
    """The JSON objects that `python -m MODULE` writes, one a line, with `file` as its standard input.

    It gets neither environment nor open files of ours. Its last line must be an object with "done"; one with "refused" is its word.
    Raises: ConfinedError if it refuses the file, goes beyond a limit or dies.
    """
    environment = {"PATH": os.defpath, "PYTHONPATH": str(_ROOT), "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    numbers = (limits.memory_bytes, limits.cpu_seconds, limits.wall_seconds)
    # -P: a file json.py in the working directory is nobody's json
    command = [sys.executable, "-P", "-m", module, *map(str, numbers)]
    process = subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, cwd="/")
    assert process.stdout is not None, "asked for"
    try:
        last: dict[str, object] = {}
        for line in _lines(process.stdout.fileno(), limits):
            last = _object(line)
            if "refused" in last:
                raise ConfinedError(str(last["refused"]))
            yield last
        code = process.wait(timeout=10)
        if code != 0 or "done" not in last:
            raise ConfinedError(_ended(code, limits))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def confine(limits: Limits) -> None:
    """Binds this process, for good: from now on it opens no file, writes only to pipes that are open, starts nothing, and ends in time."""
    with contextlib.suppress(OSError, ValueError):  # of a container that forbids it, while the others hold
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    signal.alarm(limits.wall_seconds)  # for a process whose parent died
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))  # 0, 1 and 2 are open


def write_line(entry: dict[str, object]) -> None:
    """What the confined process says to its parent: a line of JSON."""
    sys.stdout.write(json.dumps(entry, separators=(",", ":")) + "\n")


def arguments() -> Limits:
    """The limits that `confined_lines` hands over on the command line."""
    memory_bytes, cpu_seconds, wall_seconds = map(int, sys.argv[1:4])
    return Limits(memory_bytes, cpu_seconds, wall_seconds, 0)


def _lines(pipe: int, limits: Limits) -> Iterator[bytes]:
    """Lines as they come. Raises: ConfinedError at the end of the time, at a line or an output that is too long."""
    deadline = time.monotonic() + limits.wall_seconds
    begun, came = b"", 0
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise ConfinedError(f"reading it took more than {limits.wall_seconds} s")
        block = os.read(pipe, MAX_LINE_BYTES)
        if not block:
            break
        came += len(block)
        *whole, begun = (begun + block).split(b"\n")
        if came > limits.output_bytes or len(begun) > MAX_LINE_BYTES:
            raise ConfinedError(f"it has more to tell than {limits.output_bytes} bytes hold, or a line of more than {MAX_LINE_BYTES}")
        yield from whole
    if begun:
        yield begun


def _object(line: bytes) -> dict[str, object]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise ConfinedError(f"the process that read it was cut off or wrote no JSON: {line[:60]!r}") from None
    if not isinstance(entry, dict):
        raise ConfinedError(f"the process that read it wrote no object: {line[:60]!r}")
    return entry


def _ended(code: int, limits: Limits) -> str:
    match -code:
        case signal.SIGXCPU | signal.SIGKILL:
            return f"reading it took more than {limits.cpu_seconds} s of processor time"
        case signal.SIGALRM:
            return f"reading it took more than {limits.wall_seconds} s"
        case _:
            return f"the process that read it ended with {code} and without an answer"
