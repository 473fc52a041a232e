"""How often and how long a store is asked again, and the errors that remain."""

import itertools
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, final

logger = logging.getLogger(__name__)
_MEND_CONTENT = "upload the file again, or give a location (for hf:// a revision) that still holds what was packed"
Result = TypeVar("Result")


class FetchError(RuntimeError):
    """A file that did not come from its store; says where, why and how to mend it."""


@final
class RefusedError(FetchError):
    """The store, or our own rules, said no: asking again would not help."""


@final
class UnreachableError(FetchError):
    """The store could not be reached, or answered with errors, until attempts or time were used up."""


@final
class WrongContentError(FetchError):
    """What came is not what the index says, again and again."""


@final
class OfflineError(FetchError):
    """Nothing was tried, because an environment variable says that there is no network."""


@final
class StoppedError(FetchError):
    """The caller no longer wants the file; what has come of it stays."""


@final
class TryAgainError(Exception):
    """One attempt failed in a way that may pass.

    after_seconds: the shortest wait that the store asks for. from_zero: what has come so far is of no use.
    wrong_content: a whole answer came, but not the file.
    """

    def __init__(self, reason: str, *, after_seconds: float = 0.0, from_zero: bool = False, wrong_content: bool = False) -> None:
        super().__init__(reason)
        self.after_seconds = after_seconds
        self.from_zero = from_zero
        self.wrong_content = wrong_content


def _own_random() -> float:
    """In [0, 1), from the system: ranks of one seed must not wait alike, nor training's random numbers move."""
    return secrets.randbelow(2**53) / 2**53


def _never() -> bool:
    return False


@final
@dataclass(frozen=True)
class RetryPolicy:
    """Limits of one file's fetch, all attempts together.

    stall_seconds: longest silence of a connection. stop: asked between blocks; true ends the fetch. The rest is for tests.
    """

    attempts: int = 8
    wrong_content_attempts: int = 4
    first_wait_seconds: float = 1.0
    longest_wait_seconds: float = 60.0
    deadline_seconds: float = 1800.0
    stall_seconds: float = 30.0
    stop: Callable[[], bool] = _never
    sleep: Callable[[float], object] = time.sleep
    clock: Callable[[], float] = time.monotonic
    random: Callable[[], float] = _own_random

    def wait_seconds(self, attempt: int, after_seconds: float) -> float:
        """Wait after failed attempt number `attempt` (from 1): full jitter below a doubling bound, on top of what the store asks for."""
        bound = min(self.longest_wait_seconds, self.first_wait_seconds * 2 ** min(attempt - 1, 30))
        return after_seconds + self.random() * bound


def retried(attempt: Callable[[float], Result], *, what: str, policy: RetryPolicy, mend: str) -> Result:
    """The first result of `attempt(deadline)`, which is asked again as long as it raises TryAgainError and the policy allows.

    deadline: on the policy's clock. what: where the file lies, without secrets. mend: what to do if it can't be reached.
    Raises: UnreachableError, WrongContentError; and whatever else the attempt raises, at once.
    """
    start = policy.clock()
    deadline, wrong = start + policy.deadline_seconds, 0
    for tried in itertools.count(1):
        try:
            return attempt(deadline)
        except TryAgainError as error:
            failure = error
        wrong += failure.wrong_content
        spent = policy.clock() - start
        if wrong >= policy.wrong_content_attempts:
            raise WrongContentError(f"{what}: {wrong} times in {spent:.0f} s the store sent something else: {failure}; {_MEND_CONTENT}")
        if tried >= policy.attempts:
            raise UnreachableError(f"{what}: given up after {tried} attempts in {spent:.0f} s: {failure}; {mend}")
        wait = policy.wait_seconds(tried, failure.after_seconds)
        if spent + wait >= policy.deadline_seconds:
            raise UnreachableError(
                f"{what}: given up after {tried} attempts: {failure}; the next one would be {wait:.0f} s from now, "
                f"beyond the {policy.deadline_seconds:.0f} s for a file; {mend}"
            )
        logger.warning("%s: attempt %d of %d failed: %s; next one in %.1f s", what, tried, policy.attempts, failure, wait)
        policy.sleep(wait)
        if policy.stop():
            raise StoppedError(f"{what}: stopped by the caller")
    raise AssertionError("itertools.count ends")
