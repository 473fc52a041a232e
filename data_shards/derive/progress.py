"""How far captioners and encoders have come: lines for people, and files in OUT/run for `halfstep status`."""

import json
import logging
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import final

from data_shards import ranks
from data_shards.derive.request import DeriveJob
from data_shards.files import json_text, replace_file

logger = logging.getLogger(__name__)


@final
class Progress:
    """What rank 0 says of how far all ranks have come: in its log, and in OUT/run/progress.json for `halfstep status`."""

    def __init__(self, run_dir: Path, job: DeriveJob, *, done: int) -> None:
        self._run_dir, self._job, self._done, self._new = run_dir, job, done, 0
        self._recent = deque([(time.monotonic(), 0)], maxlen=13)  # the last minute

    def report(self, *, new: int, old: int) -> None:
        """Count what all ranks have finished since the last call; old: by an earlier attempt, which tells nothing of the speed."""
        self._done, self._new = self._done + new + old, self._new + new
        now, (since, before) = time.monotonic(), self._recent[0]
        self._recent.append((now, self._new))
        if not ranks.is_rank_0():
            return
        rate = (self._new - before) / max(1e-9, now - since)
        left_seconds = (self._job.samples - self._done) / rate if rate > 0 else None
        line = {"images": self._done, "total_images": self._job.samples, "images_per_second": rate, "remaining_seconds": left_seconds}
        replace_file(self._run_dir / "progress.json", json_text(line))
        left = "" if left_seconds is None else f", about {left_seconds / 60:.1f} minutes left"
        logger.info("%s: %d/%d images, %.1f images/s%s", self._job.kind, self._done, self._job.samples, rate, left)


def append_line(path: Path, line: Mapping[str, object]) -> None:
    """Add an object to a JSON-lines file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
