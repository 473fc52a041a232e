"""A thread that brings shards ahead of their use, one after the other."""

import logging
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from data_shards.remote.locations import Location
from data_shards.remote.retry import StoppedError

logger = logging.getLogger(__name__)
_PATIENCE_SECONDS = 2.0  # a thread that waits for the network ends within its stall limit; it is a daemon


@final
@dataclass(frozen=True)
class Wish:
    """A file to have here."""

    location: Location
    size_bytes: int
    sha256: str


@final
class Prefetcher:
    """Fulfils wishes with `bring` in the background; process: the one that the thread lives in, as a fork has no threads."""

    def __init__(self, bring: Callable[[Wish, "Prefetcher"], None], ahead: int) -> None:
        self.process = os.getpid()
        self._bring = bring
        self._wishes: queue.Queue[Wish | None] = queue.Queue(ahead)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shard-prefetch", daemon=True)
        self._thread.start()

    def ask(self, wish: Wish) -> None:
        """Adds a wish, or drops it if too many wait: whoever needs the file brings it then."""
        try:
            self._wishes.put_nowait(wish)
        except queue.Full:
            logger.debug("%s: not prefetched, %d others wait", wish.location, self._wishes.maxsize)

    def is_closing(self) -> bool:
        """Whether what is under way should end."""
        return self._closing.is_set()

    def close(self) -> None:
        """Ends the thread; wishes that wait are dropped."""
        self._closing.set()
        try:
            self._wishes.put_nowait(None)
        except queue.Full:
            logger.debug("closed with %d wishes", self._wishes.maxsize)  # it looks at `_closing` after each
        self._thread.join(_PATIENCE_SECONDS)

    def _run(self) -> None:
        while not self._closing.is_set():
            wish = self._wishes.get()
            if wish is None:
                return
            try:
                self._bring(wish, self)
            except StoppedError:
                return
            except (RuntimeError, OSError, ValueError) as error:
                logger.info("%s: not prefetched, opening it will try again: %s", wish.location, error)
