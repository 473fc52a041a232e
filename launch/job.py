"""What a launcher starts: one job on every rank."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

_FLAGS = {"allow_fresh": "--allow-fresh", "profile": "--profile"}
"""Options of training that job scripts pass on, as words."""


@dataclass(frozen=True)
class Job:
    """What the ranks are to do: a kind the worker knows, the folder it is about, and JSON options."""

    kind: str
    path: Path
    options: dict[str, object]

    def command(self, python: str) -> list[str]:
        """The words that start one rank of it."""
        return [python, "-m", "launch.worker", self.kind, str(self.path), json.dumps(self.options)]


def train_options(*, allow_fresh: bool, profile: bool = False) -> dict[str, object]:
    """The options of training and of chains."""
    return {"allow_fresh": allow_fresh, **({"profile": True} if profile else {})}


def as_flags(options: Mapping[str, object]) -> list[str]:
    """Such options as words of a command line."""
    return [word for name, word in _FLAGS.items() if options.get(name)]


def from_flags(words: Collection[str]) -> dict[str, object]:
    """The options that stand among a command line's words."""
    return train_options(**{name: word in words for name, word in _FLAGS.items()})
