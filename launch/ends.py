"""How attempts at a run end, and whether another one follows: the same rule for every launcher."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from data_shards.derive.request import finished_batches, is_derive
from data_shards.files import json_text, read_json_object, replace_file
from trainer.chain import read_chain
from trainer.exit_codes import BAD_INPUT, CALL_AGAIN, DATA_BUDGET, DONE, INTERRUPTED, IO_ERROR, NUMERIC
from trainer.manifest import committed
from trainer.stop import is_stop_requested

Decision = Literal["done", "again", "hold", "stop"]
"""done: finished; again: to be started again by itself; hold: to wait for a person, then go on; stop: to stay down."""

_RECORD, _ENDS, _RESTARTS = "exit.json", "ends.jsonl", "restarts.json"


@final
@dataclass(frozen=True)
class End:
    """How an attempt ended: a worker's exit code, why, and the rank at fault where there is one."""

    code: int
    reason: str
    rank: int | None = None

    def __str__(self) -> str:
        return f"{self.code}: {self.reason}"


def read_end(run_dir: Path) -> End | None:
    """How the last attempt ended, as far as it could say; None where it could not."""
    record = run_dir / _RECORD
    if not record.exists():
        return None
    fields = read_json_object(record)
    code, rank = fields.get("code"), fields.get("rank")
    return End(code if isinstance(code, int) else 1, str(fields.get("reason")), rank if isinstance(rank, int) else None)


def take_end(run_dir: Path) -> End | None:
    """read_end, and the record is removed so that the next attempt's end is not mistaken for it."""
    end = read_end(run_dir)
    (run_dir / _RECORD).unlink(missing_ok=True)
    return end


def record_end(run_dir: Path, end: End) -> None:
    """Leave how the run ended; on a full disk the exit code alone says it."""
    path = run_dir / _RECORD
    try:
        replace_file(path, json_text({"code": end.code, "reason": end.reason, "rank": end.rank}))
    except OSError as error:
        sys.stderr.write(f"cannot write {path}: {error}\n")


def committed_steps(path: Path) -> int:
    """Steps behind the newest checkpoint of a run, added up over a chain's own stages; of a captioner or encoder finished batches."""
    if is_derive(path):
        return finished_batches(path)
    return sum(max((step for step, _ in committed(run_dir)), default=0) for run_dir in _runs(path))


@final
@dataclass(frozen=True)
class Restarts:
    """How often in a row a run was started without having come further; kept in RUN_DIR/job/restarts.json."""

    run_dir: Path
    committed: int
    """Steps behind the newest checkpoint when this attempt began."""
    without_progress: int
    limit: int
    """cluster.max_restarts."""

    @classmethod
    def begin(cls, run_dir: Path, *, limit: int, first: bool) -> "Restarts":
        """Count an attempt that is about to start. first: asked for by a person, not by an earlier attempt's end."""
        record = run_dir / "job" / _RESTARTS
        committed, count = committed_steps(run_dir), 0
        if not first and record.exists():
            before = read_json_object(record)
            was, had = before.get("committed_steps"), before.get("without_progress")
            if isinstance(was, int) and isinstance(had, int) and committed <= was:
                count = had + 1
        record.parent.mkdir(exist_ok=True)
        replace_file(record, json_text({"committed_steps": committed, "without_progress": count}))
        return cls(run_dir, committed, count, limit)

    @property
    def spent(self) -> bool:
        """Whether this attempt is one too many: the one before ended in a way that nobody could count, such as a lost machine."""
        return self.without_progress > self.limit

    def decide(self, end: End) -> tuple[Decision, str]:
        """Whether the run is to be started again after this attempt's end, and why."""
        if end.code == DONE:
            return "done", end.reason
        if is_stop_requested(self.run_dir):
            return "stop", "halfstep stop was asked for; the same command goes on from the checkpoint"
        match end.code:
            case code if code in (BAD_INPUT, DATA_BUDGET, NUMERIC, INTERRUPTED):
                return "stop", f"{end.reason}; starting again would not mend it"
            case code if code == IO_ERROR:
                return "hold", f"{end.reason}; make room or mend the file system, then give the same command again"
        now = committed_steps(self.run_dir)
        count = 0 if now > self.committed else self.without_progress + (not self.spent)
        if count > self.limit:
            text = f"{end.reason}; {count} attempts in a row came no further than step {now} (cluster.max_restarts={self.limit})"
            return "stop", text
        what = "stopped with its state committed" if end.code == CALL_AGAIN else end.reason
        return "again", f"{what}; goes on from step {now}"


def log_end(run_dir: Path, end: End, decision: Decision, why: str, *, job_id: str) -> None:
    """Add an attempt's end and what follows to RUN_DIR/job/ends.jsonl, for people and for `halfstep status`."""
    line = {
        "ended_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "job_id": job_id,
        "code": end.code,
        "reason": end.reason,
        "decision": decision,
        "why": why,
        "committed_steps": committed_steps(run_dir),
    }
    path = run_dir / "job" / _ENDS
    try:
        path.parent.mkdir(exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        sys.stderr.write(f"cannot write {path}: {error}\n")


def _runs(path: Path) -> Iterator[Path]:
    if (path / "chain.json").exists():
        yield from (stage.run_dir for stage in read_chain(path) if stage.trained_here)
    else:
        yield path
