"""Training a run: its newest checkpoint found, its task and engine built, then the loop, as often as it rolls back."""

import json
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from data_shards import ranks
from trainer.auto_measure import settle
from trainer.checkpoint import Piece, agree_on_pieces, agreed_checkpoint, load_state
from trainer.config import RunConfig
from trainer.config_io import load_recipe
from trainer.descriptor import difference
from trainer.determinism import use_deterministic_kernels
from trainer.engines.engine import Engine
from trainer.engines.precision import check_precision
from trainer.engines.replicated import Replicated
from trainer.environment import record_devices
from trainer.exit_codes import CALL_AGAIN, DONE
from trainer.export import exported_checkpoint
from trainer.loop import VOTES, Loop
from trainer.manifest import Checkpoint, ever_committed, is_last, sweep_leftovers
from trainer.numeric import RollBack
from trainer.options import Options, flag, optional_text
from trainer.stop import StopRequest
from trainer.tasks.build import build_task, needed_fields
from trainer.tasks.task import Task
from trainer.training_data import TrainingData
from trainer.watch import Watch

logger = logging.getLogger(__name__)


def train_job(path: Path, options: Options, stop: StopRequest, watch: Watch) -> int:
    """Train the run in `path` to its end or to a request to stop; returns the worker's exit code. Collective."""
    previous_end, allow_fresh = optional_text(options, "previous_end"), flag(options, "allow_fresh")
    return train(path, stop, watch, previous_end=previous_end, allow_fresh=allow_fresh, profile=flag(options, "profile"))


def train(
    run_dir: Path, stop: StopRequest, watch: Watch, *, previous_end: str | None = None, allow_fresh: bool = False, profile: bool = False
) -> int:
    """See train_job; `stop` is asked at every step boundary. previous_end: why the attempt before ended.

    allow_fresh: start over where all checkpoints are damaged or gone. profile: see Loop. Collective."""
    config = load_recipe(run_dir / "recipe.yaml", [])
    if config.engine.deterministic:
        use_deterministic_kernels()
    check_precision(config.engine.precision)
    stop.limit_minutes(config.train.stop_after_minutes)
    while True:
        try:
            return _attempt(config, run_dir, stop, watch, previous_end=previous_end, allow_fresh=allow_fresh, profile=profile)
        except RollBack as bad:
            logger.warning("%s; going back to the newest checkpoint", bad)
            previous_end = f"rolled back: {bad}"
            config = load_recipe(run_dir / "recipe.yaml", [])  # in which what was measured is frozen by now


def _attempt(
    config: RunConfig, run_dir: Path, stop: StopRequest, watch: Watch, *, previous_end: str | None, allow_fresh: bool, profile: bool
) -> int:
    """From the newest checkpoint to the end, to a request to stop, or to a step that rolls the run back."""
    watch.phase("restore", 0)
    checkpoint = _checkpoint_to_resume(run_dir, allow_fresh=allow_fresh)
    if checkpoint and is_last(checkpoint, config.train.steps) and exported_checkpoint(run_dir / "export") == checkpoint.sha256:
        return DONE
    if stop.may_take(config.train.stop_after_steps) == 0:
        return CALL_AGAIN
    if checkpoint and checkpoint.step > config.train.steps:
        raise ValueError(f"{run_dir}: is at step {checkpoint.step} already, train.steps={config.train.steps}; a run may only grow")
    watch.phase("data", 0)
    data = TrainingData.open(config, run_dir, fields=needed_fields(config))
    settled = settle(config, run_dir, data, start_step=checkpoint.step if checkpoint else 0, stop=stop, watch=watch)
    if settled is None:
        return CALL_AGAIN
    config = settled
    watch.phase("model", 0)
    task = build_task(config, run_dir, data.image_size, data=data)
    engine = build_engine(config, task)
    watch.phase("restore", 0)
    pieces = agree_on_pieces(engine.state())
    if checkpoint:
        restore(engine, checkpoint, task, pieces)
    if ranks.is_rank_0():
        sweep_leftovers(run_dir)
        record_devices(
            run_dir, attention=task.attention, engine=config.engine.model_dump(mode="json"), deterministic=config.engine.deterministic
        )
    data_sets = [data]
    if task.class_images is not None:
        watch.phase("class images", 0)
        fresh = checkpoint is None
        if not task.class_images.make(engine.raw(), fresh=fresh, asked_to_stop=lambda: bool(stop.reason), tick=watch.tick):
            return CALL_AGAIN
        data_sets.append(TrainingData.open(config, run_dir, classes=str(task.class_images.folder())))
    start_up = watch.start_up_seconds()
    _record_attempt(run_dir, checkpoint.step if checkpoint else 0, previous_end=previous_end, start_up_seconds=start_up)
    loop = Loop(config, run_dir, data_sets, task, engine, pieces, checkpoint=checkpoint, stop=stop, watch=watch, profile=profile)
    return loop.go()


def build_engine(config: RunConfig, task: Task) -> Engine:
    """The engine that `engine.kind` names, around a freshly built network; no other one is imported. Collective."""
    engine, train = config.engine, config.train
    match engine.kind:
        case "replicated":
            return Replicated(
                task.module,
                optim=config.optim,
                ema=config.ema,
                precision=engine.precision,
                memory_format=train.layout,
                micro_batches=config.micro_batches,
                votes=VOTES,
                compile=train.compiles,
            )
        case "fsdp":
            from trainer.engines.fsdp import FullySharded

            return FullySharded(
                task.module,
                task.units,
                optim=config.optim,
                ema=config.ema,
                precision=engine.precision,
                memory_format=train.layout,
                micro_batches=config.micro_batches,
                replicas=engine.replicas,
                cpu_offload=engine.cpu_offload,
                compile=train.compiles,
            )
        case "deepspeed":
            from trainer.engines.deepspeed_zero import DeepSpeedZero

            return DeepSpeedZero(
                task.module,
                stage=engine.zero_stage,
                optim=config.optim,
                ema=config.ema,
                precision=engine.precision,
                memory_format=train.layout,
                micro_batches=config.micro_batches,
                micro_batch_size=config.data.micro_batch_size,
                cpu_offload=engine.cpu_offload,
                compile=train.compiles,
            )


def restore(engine: Engine, checkpoint: Checkpoint, task: Task, pieces: Sequence[Piece]) -> None:
    """Load a verified checkpoint after checking that it was made by the same task. Collective.

    Raises: ValueError if it was not."""
    saved = checkpoint.manifest.get("descriptor")
    if different := difference(saved if isinstance(saved, dict) else {}, task.descriptor.to_json()):
        raise ValueError(
            f"{checkpoint.path} was made with another teacher, base or schedule: {different}; put that one back, or start a new --run-dir"
        )
    load_state(checkpoint, engine.state(), pieces)
    scale = checkpoint.manifest.get("loss_scale")
    engine.restored(scale if isinstance(scale, dict) else {})


def _checkpoint_to_resume(run_dir: Path, *, allow_fresh: bool) -> Checkpoint | None:
    """The newest whole checkpoint; None where the run has had none yet. Collective."""
    checkpoint = agreed_checkpoint(run_dir)
    if checkpoint is None and not allow_fresh and ever_committed(run_dir):
        raise ValueError(
            f"{run_dir}: this run had checkpoints, but none under checkpoints/ is whole (the log names what is damaged); put one back, "
            "or start over from step 0 with --allow-fresh"
        )
    return checkpoint


def _record_attempt(run_dir: Path, start_step: int, *, previous_end: str | None, start_up_seconds: Mapping[str, float]) -> None:
    """Add this attempt to attempts.jsonl; start_up_seconds: of rank 0, by phase. Collective."""
    hosts = ranks.all_gather_text(socket.gethostname())
    if ranks.is_rank_0():
        attempt = {
            "step": start_step,
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "world_size": ranks.world_size(),
            "hosts": sorted(set(hosts)),
            "launcher": os.environ.get("HALFSTEP_LAUNCHER", "none"),
            "job_id": os.environ.get("HALFSTEP_JOB_ID"),
            "previous_end": previous_end,
            "start_up_seconds": dict(start_up_seconds),
        }
        with open(run_dir / "attempts.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(attempt) + "\n")
