"""Requests to stop: a signal, a time limit or a file sets a flag, the loop asks for it at step boundaries."""

import os
import select
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import final

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""What asks a rank to stop. SIGHUP (a closed terminal) only where nobody had it ignored, as nohup does."""

_FILE = "stop_requested"


def request_stop(run_dir: Path) -> None:
    """Ask the job that runs in RUN_DIR, on whatever host, to commit a checkpoint and end. Raises: OSError."""
    (run_dir / _FILE).touch()


def is_stop_requested(run_dir: Path) -> bool:
    """Whether request_stop was called since the run was last started by hand."""
    return (run_dir / _FILE).exists()


def clear_stop_request(run_dir: Path) -> None:
    """Let the run be started again. Raises: OSError."""
    (run_dir / _FILE).unlink(missing_ok=True)


@final
class StopRequest:
    """Whether this process was asked to stop, and by what.

    A Python signal handler waits until the main thread is back from C++, 15 s late in a collective; so the interpreter's
    wakeup descriptor tells a thread of its own, which sets the flag at once."""

    def __init__(self) -> None:
        self.reason = ""
        """What asked first: a signal's name or "time limit"; empty while nothing has."""
        self.steps_left: int | None = None
        """Optimizer steps that this attempt may still take (train.stop_after_steps); None before the first run has said."""
        self._started = time.monotonic()
        self._limit_is_known = False
        self._deadline: float | None = None
        self._wakeup: int | None = None

    def install(self) -> None:
        """Let STOP_SIGNALS set the flag from now on, also those that were blocked and have come already; main thread only.

        Processes forked later (a loader's) leave them to this one."""
        signal.set_wakeup_fd(self._listen(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)
        os.register_at_fork(before=_block_signals, after_in_parent=unblock_signals, after_in_child=_leave_to_the_parent)
        unblock_signals()

    def limit_minutes(self, minutes: float | None) -> None:
        """Set the flag so many minutes after this object was made; the first call counts, a chain's later stages say it again."""
        if self._limit_is_known:
            return
        self._limit_is_known = True
        if minutes is not None:
            self._deadline = self._started + minutes * 60
            os.write(self._listen(), b"\0")

    def ask(self, reason: str) -> None:
        """Set the flag; from any thread."""
        self.reason = self.reason or reason

    def may_take(self, steps: int | None) -> int | None:
        """How many steps are left of the attempt's limit, which the attempt's first run gives; None without one."""
        if self.steps_left is None:
            self.steps_left = steps
        return self.steps_left

    def took(self, steps: int) -> None:
        """Count the steps of a run that has ended."""
        if self.steps_left is not None:
            self.steps_left -= steps

    def _note(self, number: int, _: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)

    def _listen(self) -> int:
        """The descriptor that wakes the thread, which is started with the first call."""
        if self._wakeup is None:
            reading, self._wakeup = os.pipe()
            os.set_blocking(self._wakeup, False)  # a full pipe loses signals, not time: one is enough
            threading.Thread(target=self._serve, args=(reading,), name="stop", daemon=True).start()
        return self._wakeup

    def _serve(self, reading: int) -> None:
        """Read signal numbers until the process ends; other numbers come from other handlers (SIGCHLD) or only wake."""
        poller = select.poll()
        poller.register(reading, select.POLLIN)
        while True:
            deadline = None if self.reason else self._deadline
            if not poller.poll(None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000):
                self.ask("time limit")
                continue
            for number in os.read(reading, 4096):
                if number in STOP_SIGNALS:
                    self._note(number, None)


def unblock_signals() -> None:
    """Let STOP_SIGNALS in, which launchers block in a rank until it can answer them."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _block_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _leave_to_the_parent() -> None:
    """In a forked child: the signals stay blocked, and none of its own wakes the parent's thread."""
    signal.set_wakeup_fd(-1)
