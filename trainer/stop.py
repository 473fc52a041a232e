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

    def install(self) -> None:
        """Let SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 set the flag from now on."""
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
