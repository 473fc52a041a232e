"""What lets a part go on where it was: a time budget, rows that are kept, commands that are told to stop before it is spent."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, final

from data_shards.files import json_text, replace_file

Row = dict[str, Any]
"""What was measured once, as it stands in the JSON."""
CALL_AGAIN = 75
"""Exit code of a run that has committed a checkpoint and goes on by the same command."""
_POLL_SECONDS = 0.2
_TAIL = 3000


class TimeUp(Exception):
    """The budget is spent, or a signal came: the same command goes on from here."""


class CommandFailed(RuntimeError):
    """A command ended with an error; the text holds the end of its output."""


class OutOfMemory(CommandFailed):
    """It was that a GPU had too little memory."""


@final
class Budget:
    """Seconds of this call, of which the last `grace_seconds` are for what has been told to stop."""

    def __init__(self, minutes: float, *, grace_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + minutes * 60 - grace_seconds
        self.grace_seconds = grace_seconds

    @property
    def left(self) -> float:
        """Seconds in which something may go on."""
        return self._end - self._clock()

    def check(self) -> None:
        """Raises: TimeUp if none are left."""
        if self.left <= 0:
            raise TimeUp

    def end_at_signals(self) -> None:
        """From now on SIGTERM and SIGINT end the budget, as if it were spent."""

        def end(_: int, __: FrameType | None) -> None:
            self._end = min(self._end, self._clock())

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)


@final
class Store:
    """Rows by name, a file each: what is there is not measured again."""

    def __init__(self, folder: Path, budget: Budget, *, commit: str) -> None:
        self._folder, self._budget, self._commit = folder, budget, commit
        folder.mkdir(parents=True, exist_ok=True)

    def once(self, name: str, make: Callable[[], Row]) -> Row:
        """The row of that name; where there is none, what is measured now, with its commit. Raises: TimeUp if there is no time for it."""
        path = self._folder / f"{name}.json"
        if not path.exists():
            self._budget.check()
            replace_file(path, json_text({**make(), "commit": self._commit}))
        return json.loads(path.read_bytes())

    def rows(self, part: str) -> dict[str, Row]:
        """All rows whose names begin with the part's, by the rest of it, in the order in which they were measured."""
        paths = sorted(self._folder.glob(f"{part}_*.json"), key=lambda path: path.stat().st_mtime_ns)
        return {path.stem.removeprefix(f"{part}_"): json.loads(path.read_bytes()) for path in paths}


@final
class Commands:
    """`halfstep` commands under a budget, each in a session of its own, with their output in a log."""

    def __init__(self, root: Path, budget: Budget, *, environment: Mapping[str, str]) -> None:
        """environment: variables beside this process's own."""
        self._root, self._budget = root, budget
        self._environment = {**os.environ, **environment}
        (root / "logs").mkdir(parents=True, exist_ok=True)

    def run(self, name: str, words: Sequence[str]) -> str:
        """Run a command to its end and return what it wrote to standard output; told to stop in time where the budget ends before it.

        Raises: TimeUp if it was stopped, or stopped by itself and goes on by the same command; CommandFailed if it failed."""
        return self._until(name, words, lambda: False, environment={})

    def timed(self, name: str, words: Sequence[str]) -> Row:
        """Seconds of a command that goes on where it was, over all its calls, and how many these were; as `run`.

        A call that was killed counts among the calls, but not in the seconds."""
        path, began = self._root / f"{name}_seconds.json", time.monotonic()
        taken: Row = json.loads(path.read_bytes()) if path.exists() else {"seconds": 0.0, "calls": 0}
        taken["calls"] += 1
        replace_file(path, json_text(taken))
        try:
            self.run(name, words)
        finally:
            taken["seconds"] += time.monotonic() - began
            replace_file(path, json_text(taken))
        return {**taken, "seconds": round(taken["seconds"], 1)}

    def cut_short(self, name: str, words: Sequence[str], enough: Callable[[], bool], *, environment: Mapping[str, str]) -> None:
        """Run a command until `enough`, then kill it: what would come afterwards is not measured.

        Raises: as `run`; CommandFailed also if it ended before."""
        self._until(name, words, enough, environment=environment, cut=True)

    def _until(
        self, name: str, words: Sequence[str], enough: Callable[[], bool], *, environment: Mapping[str, str], cut: bool = False
    ) -> str:
        self._budget.check()
        _say(f"halfstep {' '.join(words)}")
        log, output = self._root / "logs" / f"{name}.log", self._root / "logs" / f"{name}.out"
        with log.open("wb") as errors, output.open("wb") as written:
            process = subprocess.Popen(
                [sys.executable, "-m", "launch", *words],
                env={**self._environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=errors,
                start_new_session=True,
            )
            try:
                code = self._wait(process, enough)
            finally:
                _kill_group(process)
        if code is None:
            return ""
        if code == 0 and not cut:
            return output.read_text(errors="replace")
        if code == CALL_AGAIN or self._budget.left <= 0:
            raise TimeUp
        text = f"{output.read_text(errors='replace')}{log.read_text(errors='replace')}"
        kind = OutOfMemory if "out of memory" in text.lower() else CommandFailed
        raise kind(f"halfstep {' '.join(words)}\nended with {code}{' too early' if code == 0 else ''}:\n{text[-_TAIL:]}")

    def _wait(self, process: subprocess.Popen[bytes], enough: Callable[[], bool]) -> int | None:
        """The exit code; None where there was enough before it ended. What outlives the budget is asked to stop, then killed."""
        asked = False
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(_POLL_SECONDS)
            if enough():
                return None
            if self._budget.left <= 0 and not asked:
                asked = True
                process.terminate()
            if self._budget.left <= -self._budget.grace_seconds:
                raise TimeUp


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a command, its ranks and their workers too, and wait for it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
