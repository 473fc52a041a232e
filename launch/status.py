"""Where a run or a chain stands, read from its folder alone."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from data_shards.derive.request import DeriveJob, finished_batches, is_derive, is_finished
from data_shards.files import json_text, read_json_object
from launch.ends import read_end
from launch.queued import Queued, alive
from launch.run_lock import is_locked
from launch.submitted import Submission, submissions
from launch.sweep import is_sweep, sweep_runs
from trainer.chain import read_chain
from trainer.config import ProgressiveDistillationConfig
from trainer.config_io import load_recipe
from trainer.export_folder import is_export

State = Literal["waiting", "queued", "held", "running", "done", "stopped", "failed"]
"""waiting: not started yet; queued, held: a job in a queue, which starts by itself or waits for a person."""


@dataclass(frozen=True)
class Status:
    """A run's place and how it came there."""

    run_dir: str
    state: State
    step: int
    total_steps: int
    loss: float | None
    images_per_second: float | None
    remaining_seconds: float | None
    attempts: int
    last_end: str | None
    """Exit code and reason of the last attempt that has ended."""
    what_follows: str | None
    """What was decided then: whether it comes back by itself, and why not."""
    nodes: tuple[str, ...]
    """Hosts of the last attempt."""
    job_ids: tuple[str, ...]
    """Of every job that was queued for it, oldest first."""
    why_it_waits: str | None
    """Of a queued job, in the queue's own words."""
    data_role: str | None = None
    """What its images are to a fine-tuned teacher (data.role)."""


def print_status(path: Path, *, as_json: bool) -> int:
    """Write the state of a run, or of each stage of a chain or each run of a sweep, to stdout.

    Raises: ValueError if `path` is none of these."""
    queue = _queue(path)
    statuses = _statuses(path, queue)
    if as_json:
        has_parts = is_sweep(path) or (path / "chain.json").exists()
        overall = asdict(_overall(path, statuses, queue.get(path)) if has_parts else statuses[0])
        parts = {"stages": [asdict(status) for status in statuses]} if len(statuses) > 1 else {}
        sys.stdout.write(json_text({**overall, **parts}))
    else:
        for status in statuses:
            sys.stdout.write(_line(status) + "\n")
    return 0


def _statuses(path: Path, queue: Mapping[Path, Queued]) -> list[Status]:
    """A status for a run, for each stage that a chain trains, or for each run of a sweep."""
    if is_sweep(path):
        return [_status_in_sweep(run_dir, queue, sweep=queue.get(path)) for run_dir in sweep_runs(path)]
    if not (path / "chain.json").exists():
        return [run_status(path, ended=None, job=queue.get(path))]
    ended = _ended(path) or ""
    stages = [stage.run_dir for stage in read_chain(path) if stage.trained_here]
    at = next((stage for stage in stages if not is_done(stage)), None)  # a job of the whole chain is at this one
    return [
        run_status(
            stage, ended=_ended(stage) or (ended if stage == at else ""), job=queue.get(stage) or (queue.get(path) if stage == at else None)
        )
        for stage in stages
    ]


def _status_in_sweep(run_dir: Path, queue: Mapping[Path, Queued], *, sweep: Queued | None) -> Status:
    """One line for a run of a sweep, a chain's stages added up. sweep: the job that drives all of its runs, where one does."""
    job = queue.get(run_dir)
    if job is None and sweep is not None and read_end(run_dir) is None:
        started = any(run_dir.glob("attempts.jsonl")) or any(run_dir.glob("*/attempts.jsonl"))  # of a chain in a stage
        job = replace(sweep, run_dir=run_dir, state=sweep.state if started else "queued")
    if (run_dir / "chain.json").exists():
        return _overall(run_dir, _statuses(run_dir, queue), job)
    return run_status(run_dir, ended=None, job=job)


def run_status(run_dir: Path, *, ended: str | None, job: Queued | None = None) -> Status:
    """The status of one run. ended: how its chain ended last, where it is a stage of one. job: its place in a queue.

    Raises: ValueError if there is no run."""
    if is_derive(run_dir):
        return _derive_status(run_dir, job)
    if not (run_dir / "recipe.yaml").exists():
        raise ValueError(f"{run_dir}: no recipe.yaml there; wanted a RUN_DIR or a chain's directory")
    recipe, total = load_recipe(run_dir / "recipe.yaml", []), _total_steps(run_dir)
    last = _last_line(run_dir / "metrics.jsonl")
    # a step whose numbers were bad has no line: where it was the last one, the checkpoint knows better
    logged = _number(last, "step")
    step = max(0 if logged is None else int(logged) + 1, _committed_step(run_dir))
    last_end = _ended(run_dir) if ended is None else ended or None
    state = _state(run_dir, step=step, total=total, last_end=last_end, job=job)
    seconds = _number(last, "step_seconds")
    left = (total - step) * seconds if seconds is not None and state == "running" else None
    attempt, end = _last_line(run_dir / "attempts.jsonl"), _last_line(run_dir / "job" / "ends.jsonl")
    return Status(
        run_dir=str(run_dir),
        state=state,
        step=step,
        total_steps=total,
        loss=_number(last, "loss"),
        images_per_second=_number(last, "images_per_second"),
        remaining_seconds=left,
        attempts=_count_lines(run_dir / "attempts.jsonl"),
        last_end=last_end,
        what_follows=f"{end['decision']}: {end['why']}" if end else None,
        nodes=tuple(map(str, hosts)) if isinstance(hosts := attempt.get("hosts"), list) else (),
        job_ids=_job_ids([*submissions(run_dir), *([job.submission] if job else [])]),
        why_it_waits=job.why or None if job and job.state in ("queued", "held") else None,
        data_role=recipe.data.role,
    )


def _derive_status(run_dir: Path, job: Queued | None) -> Status:
    """Of a captioner or encoder, whose steps are batches and whose folder is OUT/run."""
    asked, last_end = DeriveJob.read(run_dir), _ended(run_dir)
    state: State = "stopped" if last_end is None or last_end.startswith("75") else "failed"
    if is_finished(run_dir.parent):
        state = "done"
    elif job and job.state != "ended":
        state = job.state
    elif is_locked(run_dir):
        state = "running"
    progress = read_json_object(run_dir / "progress.json") if (run_dir / "progress.json").exists() else {}
    attempt, end = _last_line(run_dir / "attempts.jsonl"), _last_line(run_dir / "job" / "ends.jsonl")
    return Status(
        run_dir=str(run_dir),
        state=state,
        step=asked.batches if state == "done" else min(finished_batches(run_dir), asked.batches),
        total_steps=asked.batches,
        loss=None,
        images_per_second=_number(progress, "images_per_second"),
        remaining_seconds=_number(progress, "remaining_seconds") if state == "running" else None,
        attempts=_count_lines(run_dir / "attempts.jsonl"),
        last_end=last_end,
        what_follows=f"{end['decision']}: {end['why']}" if end else None,
        nodes=tuple(map(str, hosts)) if isinstance(hosts := attempt.get("hosts"), list) else (),
        job_ids=_job_ids([*submissions(run_dir), *([job.submission] if job else [])]),
        why_it_waits=job.why or None if job and job.state in ("queued", "held") else None,
    )


def _queue(path: Path) -> dict[Path, Queued]:
    """Jobs that wait or run, by folder; where the queue does not answer, that is said and the folder alone speaks."""
    try:
        return {job.run_dir: job for job in alive(path)}
    except (RuntimeError, ValueError) as error:
        sys.stderr.write(f"warning: {error}; what follows is what the folder says\n")
        return {}


def is_done(run_dir: Path) -> bool:
    """Whether a run has taken all its steps and written its export, or every stage of a chain has."""
    if is_derive(run_dir):
        return is_finished(run_dir.parent)
    if (run_dir / "chain.json").exists():
        return all(is_done(stage.run_dir) for stage in read_chain(run_dir) if stage.trained_here)
    return _committed_step(run_dir) >= _total_steps(run_dir) and _is_exported(run_dir)


def _is_exported(run_dir: Path) -> bool:
    return is_export(run_dir / "export")


def _state(run_dir: Path, *, step: int, total: int, last_end: str | None, job: Queued | None) -> State:
    if step >= total and _is_exported(run_dir):
        return "done"
    if job and job.state != "ended":
        return job.state
    if is_locked(run_dir) or is_locked(run_dir.parent):
        return "running"
    if step == 0 and not (run_dir / "attempts.jsonl").exists() and last_end is None:
        return "waiting"
    return "stopped" if last_end is None or last_end.startswith("75") else "failed"


def _overall(path: Path, statuses: list[Status], job: Queued | None) -> Status:
    """A chain's own line: the stage it is at, steps added up; of a sweep a run that runs, or else the first that is not done."""
    order = ("running", "queued", "held") if is_sweep(path) else ()
    first = [status for state in order for status in statuses if status.state == state]
    current = next((status for status in (*first, *statuses) if status.state != "done"), statuses[-1])
    state: State = job.state if job and job.state != "ended" else "running" if is_locked(path) else current.state
    own = [submission.job_id for submission in submissions(path)]
    return replace(
        current,
        run_dir=str(path),
        state="done" if current.state == "done" else state,
        step=sum(status.step for status in statuses),
        total_steps=sum(status.total_steps for status in statuses),
        attempts=max(status.attempts for status in statuses),
        job_ids=tuple(dict.fromkeys([*own, *(job_id for status in statuses for job_id in status.job_ids)])),
    )


def _job_ids(jobs: Sequence[Submission]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(job.job_id for job in jobs))


def _line(status: Status) -> str:
    parts = [f"{status.run_dir}: {status.state}, step {status.step}/{status.total_steps}"]
    if status.data_role:
        parts.append(f"data: {status.data_role.replace('_', ' ')}")
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}, {status.images_per_second:.0f} images/s")
    if status.remaining_seconds is not None:
        parts.append(f"about {status.remaining_seconds / 60:.1f} minutes left")
    if status.attempts > 1:
        parts.append(f"{status.attempts} attempts")
    if status.nodes and status.state == "running":
        parts.append(f"on {' '.join(status.nodes)}")
    if status.job_ids:
        parts.append(f"job {status.job_ids[-1]}" + (f" ({status.why_it_waits})" if status.why_it_waits else ""))
    if status.last_end and status.state in ("stopped", "failed", "held", "queued"):
        parts.append(f"last end: {status.last_end}")
    return ", ".join(parts)


def _committed_step(run_dir: Path) -> int:
    """Steps behind the newest committed checkpoint; 0 without one."""
    names = (path.parent.name.removeprefix("step_") for path in run_dir.glob("checkpoints/step_*/manifest.json"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _total_steps(run_dir: Path) -> int:
    """The steps of a run: the recipe's, or those after which its student had learnt enough."""
    recipe, step = load_recipe(run_dir / "recipe.yaml", []), _committed_step(run_dir)
    if isinstance(recipe.objective, ProgressiveDistillationConfig) and recipe.objective.stop_when is not None and step:
        manifest = read_json_object(run_dir / "checkpoints" / f"step_{step:06d}" / "manifest.json")
        return step if manifest.get("learnt_enough") is True else recipe.train.steps
    return recipe.train.steps


def _ended(path: Path) -> str | None:
    """Exit code and reason of the last attempt, where it could say one."""
    end = read_end(path)
    return end and f"{end.code} {end.reason}"


def _number(fields: Mapping[str, object], key: str) -> float | None:
    value = fields.get(key)
    return float(value) if isinstance(value, int | float) else None


def _last_line(path: Path) -> dict[str, object]:
    """The last whole line of a JSON-lines file, empty without one; it is short, so the file's end holds it."""
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
    return json.loads(lines[-1]) if lines else {}


def _count_lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0
