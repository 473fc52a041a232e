"""Where a run or a chain stands, read from its folder alone."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from data_shards.files import json_text, read_json_object
from launch.run_lock import is_locked
from trainer.chain import read_chain
from trainer.config_io import load_recipe

State = Literal["waiting", "running", "done", "stopped", "failed"]


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
    job_ids: tuple[str, ...] = ()


def print_status(path: Path, *, as_json: bool) -> int:
    """Write the state of a run, or of each stage of a chain, to stdout.

    Raises: ValueError if `path` is neither."""
    statuses = chain_status(path) if (path / "chain.json").exists() else [run_status(path, ended=None)]
    if as_json:
        overall = asdict(_overall(path, statuses) if len(statuses) > 1 else statuses[0])
        stages = {"stages": [asdict(status) for status in statuses]} if len(statuses) > 1 else {}
        sys.stdout.write(json_text({**overall, **stages}))
    else:
        for status in statuses:
            sys.stdout.write(_line(status) + "\n")
    return 0


def chain_status(path: Path) -> list[Status]:
    """A status per stage that the chain trains."""
    ended = _ended(path)
    return [run_status(stage.run_dir, ended=ended or "") for stage in read_chain(path) if stage.trained_here]


def run_status(run_dir: Path, *, ended: str | None) -> Status:
    """The status of one run. ended: how its chain ended last, where it is a stage of one.

    Raises: ValueError if there is no run."""
    if not (run_dir / "recipe.yaml").exists():
        raise ValueError(f"{run_dir}: no recipe.yaml there; wanted a RUN_DIR or a chain's directory")
    total = load_recipe(run_dir / "recipe.yaml", []).train.steps
    last = _last_line(run_dir / "metrics.jsonl")
    # a step whose numbers were bad has no line: where it was the last one, the checkpoint knows better
    step = max(int(last["step"]) + 1 if last else 0, _committed_step(run_dir))
    last_end = _ended(run_dir) if ended is None else ended or None
    state = _state(run_dir, step=step, total=total, last_end=last_end)
    left = (total - step) * float(last["step_seconds"]) if last and state == "running" else None
    return Status(
        run_dir=str(run_dir),
        state=state,
        step=step,
        total_steps=total,
        loss=float(last["loss"]) if last else None,
        images_per_second=float(last["images_per_second"]) if last else None,
        remaining_seconds=left,
        attempts=_count_lines(run_dir / "attempts.jsonl"),
        last_end=last_end,
    )


def is_done(run_dir: Path) -> bool:
    """Whether a run has taken all its steps and written its export."""
    total = load_recipe(run_dir / "recipe.yaml", []).train.steps
    return _committed_step(run_dir) >= total and _is_exported(run_dir)


def _is_exported(run_dir: Path) -> bool:
    return (run_dir / "export" / "model_index.json").exists()


def _state(run_dir: Path, *, step: int, total: int, last_end: str | None) -> State:
    if step >= total and _is_exported(run_dir):
        return "done"
    if step == 0 and not (run_dir / "attempts.jsonl").exists():
        return "waiting"
    if is_locked(run_dir) or is_locked(run_dir.parent):
        return "running"
    return "stopped" if last_end is None or last_end.startswith("75") else "failed"


def _overall(path: Path, statuses: list[Status]) -> Status:
    """A chain's own line: the stage it is at, steps added up."""
    current = next((status for status in statuses if status.state != "done"), statuses[-1])
    state: State = "running" if is_locked(path) else current.state
    return Status(
        run_dir=str(path),
        state=state,
        step=sum(status.step for status in statuses),
        total_steps=sum(status.total_steps for status in statuses),
        loss=current.loss,
        images_per_second=current.images_per_second,
        remaining_seconds=current.remaining_seconds,
        attempts=max(status.attempts for status in statuses),
        last_end=current.last_end,
    )


def _line(status: Status) -> str:
    parts = [f"{status.run_dir}: {status.state}, step {status.step}/{status.total_steps}"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}, {status.images_per_second:.0f} images/s")
    if status.remaining_seconds is not None:
        parts.append(f"about {status.remaining_seconds / 60:.1f} minutes left")
    if status.attempts > 1:
        parts.append(f"{status.attempts} attempts")
    if status.last_end and status.state in ("stopped", "failed"):
        parts.append(f"last end: {status.last_end}")
    return ", ".join(parts)


def _committed_step(run_dir: Path) -> int:
    """Steps behind the newest committed checkpoint; 0 without one."""
    names = (path.parent.name.removeprefix("step_") for path in run_dir.glob("checkpoints/step_*/manifest.json"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _ended(path: Path) -> str | None:
    """Exit code and reason of the last attempt, where it could say one."""
    record = path / "exit.json"
    if not record.exists():
        return None
    fields = read_json_object(record)
    return f"{fields.get('code')} {fields.get('reason')}"


def _last_line(path: Path) -> dict[str, float] | None:
    """The last whole line of a JSON-lines file; it is short, so the file's end holds it."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
    return json.loads(lines[-1]) if lines else None


def _count_lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0
