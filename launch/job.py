"""What a launcher starts: one job on every rank."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """What the ranks are to do: a kind the worker knows, the folder it is about, and JSON options."""

    kind: str
    path: Path
    options: dict[str, object]

    def command(self, python: str) -> list[str]:
        """The words that start one rank of it."""
        return [python, "-m", "launch.worker", self.kind, str(self.path), json.dumps(self.options)]
