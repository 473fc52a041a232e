"""Requests to stop: a signal sets a flag, the loop asks for it at step boundaries."""

import signal
from types import FrameType
from typing import final

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@final
class StopRequest:
    """Whether this process was asked to stop, and by what."""

    def __init__(self) -> None:
        self.reason = ""
        self.steps_left: int | None = None
        """Optimizer steps that this attempt may still take (train.stop_after_steps); None before the first run has said."""

    def install(self) -> None:
        """Let SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 set the flag from now on."""
        for number in _SIGNALS:
            signal.signal(number, self._note)

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
        self.reason = signal.Signals(number).name
