"""The loop: a recipe's axes joined, then optimizer steps until done or asked to stop."""

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from data_shards.index import ShardIndex
from data_shards.plan import Plan
from data_shards.read import MicroBatches, loader
from data_shards.sample import MicroBatch
from trainer import dist
from trainer.checkpoint import Checkpoint, delete_old_checkpoints, newest_checkpoint, read_tensors, write_checkpoint
from trainer.config import DenoisingConfig, ProgressiveDistillationConfig, RunConfig, identity
from trainer.config_io import load_recipe
from trainer.descriptor import Descriptor
from trainer.diffusion.schedule import alpha_bar_sha256, build_alpha_bar
from trainer.draws import Draws, draw
from trainer.engines.engine import Engine, LossPerImage
from trainer.engines.replicated import Replicated
from trainer.exit_codes import CALL_AGAIN, DONE
from trainer.export import export_run, exported_sha256
from trainer.hash import tensors_sha256
from trainer.metrics import Ledger, Reporter, StepMetrics, cut_ledgers
from trainer.models.attention import use_attention
from trainer.models.encode import encode_pixels
from trainer.models.tiny_unet import Denoiser, build_tiny_unet
from trainer.objectives.denoising import denoising_loss, offset
from trainer.objectives.progressive_distillation import HalvingGrid, halving_loss
from trainer.optim import learning_rate
from trainer.options import Options, optional_text
from trainer.rng import derive_seed, seed_dropout, seed_weights
from trainer.sample import draw_grid
from trainer.source import denoiser_on, load_source
from trainer.stages import grid as sampling_levels
from trainer.stages import halve
from trainer.stop import StopRequest

logger = logging.getLogger(__name__)

GRID_SEED = 0
"""Of the sample grids' noise: the same in every run, so that a chain's stages can be compared face by face."""

Objective = Callable[[Denoiser, Tensor, Draws], Tensor]
"""(denoiser, x_0, draws) -> loss per image."""


@dataclass(frozen=True)
class Task:
    """What a recipe says is to be learnt: a network, its objective and what its samples mean."""

    module: nn.Module
    objective: Objective
    alpha_bar: Tensor
    descriptor: Descriptor
    stratified: bool


def train_job(path: Path, options: Options, stop: StopRequest) -> int:
    """Train the run in `path` to its end or to a request to stop; returns the worker's exit code. Collective."""
    return train(path, stop, previous_end=optional_text(options, "previous_end"))


def train(run_dir: Path, stop: StopRequest, *, previous_end: str | None = None) -> int:
    """See train_job; `stop` is asked at every step boundary. previous_end: why the attempt before ended. Collective."""
    config = load_recipe(run_dir / "recipe.yaml", [])
    checkpoint = _agreed_checkpoint(run_dir)
    if checkpoint and checkpoint.step >= config.train.steps and exported_sha256(run_dir / "export") == checkpoint.manifest["ema_sha256"]:
        return DONE
    if stop.may_take(config.train.stop_after_steps) == 0:
        return CALL_AGAIN
    if checkpoint and checkpoint.step > config.train.steps:
        raise ValueError(f"{run_dir}: is at step {checkpoint.step} already, train.steps={config.train.steps}; a run may only grow")
    index = ShardIndex.load(run_dir / str(config.data.shards))
    task = build_task(config, run_dir, index.image_size)
    engine = build_engine(config, task.module)
    start_step = 0
    if checkpoint:
        _restore(engine, checkpoint, task)
        start_step = checkpoint.step
    _record_attempt(run_dir, start_step, previous_end=previous_end)
    return _Run(config, run_dir, index, task, engine, stop).go(start_step)


def build_task(config: RunConfig, run_dir: Path, image_size: int) -> Task:
    """Join model, objective and noise schedule.

    Raises: ValueError where they do not fit each other or the teacher."""
    seed_weights(config.seed)
    alpha_bar = build_alpha_bar(config.noise_schedule).to(dist.device())
    module = build_tiny_unet(config.model, image_size)
    use_attention(module, config.engine.attention)
    match config.objective:
        case DenoisingConfig() as objective:
            timesteps, teacher_sha256, sampler = tuple(range(len(alpha_bar))), None, "ddim"
            loss = _denoising(objective, alpha_bar)
        case ProgressiveDistillationConfig() as objective:
            teacher = load_source(run_dir / objective.teacher)
            own = teacher.descriptor.timesteps
            levels = tuple(own[level] for level in sampling_levels(len(own), objective.teacher_steps))
            module.load_state_dict(teacher.model.state_dict())
            timesteps, teacher_sha256, sampler = halve(levels), teacher.weights_sha256, objective.sampler
            grid = HalvingGrid.build(alpha_bar, levels, device=dist.device())
            loss = _halving(objective, denoiser_on(teacher.model, dist.device()), grid)
    descriptor = Descriptor(
        prediction_type=config.objective.prediction,
        alpha_bar_sha256=alpha_bar_sha256(alpha_bar),
        timesteps=timesteps,
        clip=True,
        sampler=sampler,
        variance="fixed_small",
        step_count=len(timesteps),
        teacher_sha256=teacher_sha256,
        image_size=image_size,
        channels=3,
    )
    return Task(module, loss, alpha_bar, descriptor, config.objective.stratified)


def _denoising(objective: DenoisingConfig, alpha_bar: Tensor) -> Objective:
    def loss(model: Denoiser, x_0: Tensor, draws: Draws) -> Tensor:
        noise = draws.noise.to(x_0.device)
        if objective.offset_noise:
            noise = offset(noise, draws.channel_noise.to(x_0.device), objective.offset_noise)
        return denoising_loss(
            model,
            x_0,
            noise=noise,
            uniforms=draws.uniforms,
            alpha_bar=alpha_bar,
            prediction=objective.prediction,
            loss=objective.loss,
            min_snr_gamma=objective.min_snr_gamma,
        )

    return loss


def _halving(objective: ProgressiveDistillationConfig, teacher: Denoiser, grid: HalvingGrid) -> Objective:
    def loss(model: Denoiser, x_0: Tensor, draws: Draws) -> Tensor:
        return halving_loss(
            model,
            teacher,
            x_0,
            noise=draws.noise.to(x_0.device),
            uniforms=draws.uniforms,
            grid=grid,
            prediction=objective.prediction,
            target=objective.target,
            loss=objective.loss,
            clip_target=objective.clip_target,
            min_snr_gamma=objective.min_snr_gamma,
        )

    return loss


def build_engine(config: RunConfig, module: nn.Module) -> Engine:
    """The engine that `engine.kind` names, around a freshly built network."""
    match config.engine.kind:
        case "replicated":
            return Replicated(
                module,
                optim=config.optim,
                ema=config.ema,
                precision=config.engine.precision,
                memory_format=config.train.memory_format,
                micro_batches=config.micro_batches,
                compile=config.train.compile,
            )


def _agreed_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest verified checkpoint.

    Raises: RuntimeError if the ranks do not see the same one. Collective."""
    checkpoint = newest_checkpoint(run_dir)
    seen = dist.all_gather_tensor(torch.tensor([checkpoint.step if checkpoint else -1])).flatten().tolist()
    if len(set(seen)) > 1:
        raise RuntimeError(f"{run_dir}: the ranks see different newest checkpoints, steps {seen}; RUN_DIR must be one shared folder")
    return checkpoint


def _restore(engine: Engine, checkpoint: Checkpoint, task: Task) -> None:
    """Load a checkpoint after checking that it was made by the same task."""
    saved = Descriptor.from_json(checkpoint.manifest["descriptor"])
    if saved != task.descriptor:
        raise ValueError(f"{checkpoint.path} was made with another teacher or schedule: {saved.difference(task.descriptor)}")
    parts = {part: read_tensors(checkpoint, part) for part in ("model", "ema", "optimizer")}
    engine.load_state_tensors(parts, step=checkpoint.step)


def _record_attempt(run_dir: Path, start_step: int, *, previous_end: str | None) -> None:
    """Add this attempt to attempts.jsonl. Collective."""
    hosts = dist.all_gather_text(socket.gethostname())
    if dist.is_rank_0():
        attempt = {
            "step": start_step,
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "world_size": dist.world_size(),
            "hosts": sorted(set(hosts)),
            "launcher": os.environ.get("HALFSTEP_LAUNCHER", "none"),
            "previous_end": previous_end,
        }
        with open(run_dir / "attempts.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(attempt) + "\n")


@final
class _Run:
    """One attempt at a run: its files and its place."""

    def __init__(self, config: RunConfig, run_dir: Path, index: ShardIndex, task: Task, engine: Engine, stop: StopRequest) -> None:
        self.config, self.run_dir, self.index, self.task, self.engine, self.stop = config, run_dir, index, task, engine, stop

    def go(self, start_step: int) -> int:
        """Run from `start_step`; returns the worker's exit code."""
        self._open(start_step)
        try:
            step = self._take_steps(start_step)
        finally:
            self._close()
        self.stop.took(step - start_step)
        # Rank 0 commits while the others may be here already: none leaves before the checkpoint is there.
        dist.barrier()
        if step < self.config.train.steps:
            logger.info("stopped at step %d of %d; the same command goes on from there", step, self.config.train.steps)
            return CALL_AGAIN
        if dist.is_rank_0():
            export_run(self.run_dir)
        dist.barrier()
        return DONE

    def _take_steps(self, start_step: int) -> int:
        """The loop; returns how many steps the run has now, all of them committed."""
        config, train = self.config, self.config.train
        last_step = min(train.steps, start_step + (self.stop.steps_left or train.steps))
        batches, step, asked = self._batches(start_step, last_step), start_step, False
        boundary = time.perf_counter()
        while True:
            ends = step in (train.steps, last_step) or asked
            saves = step > start_step and (ends or step % config.checkpoint.every_steps == 0)
            draws = config.logging.sample_every_steps and (step % config.logging.sample_every_steps == 0 or step == train.steps)
            if saves:
                self._save(step)
            if draws:
                self._draw_samples(step)
            if ends:
                return step
            if saves or draws:
                boundary = time.perf_counter()
            self.data_wait_seconds = 0.0
            rate = learning_rate(step, peak=config.optim.learning_rate, total_steps=train.steps, schedule=config.lr_schedule)
            result = self.engine.step(step, self._losses(batches, step), learning_rate=rate, stop=bool(self.stop.reason))
            asked = result.stop
            self.ledger.flush()
            # A step's seconds include the report of the one before, but neither checkpoints nor samples.
            now = time.perf_counter()
            if self.reporter and (step % config.logging.every_steps == 0 or step + 1 == train.steps):
                speed = config.data.global_batch_size / (now - boundary)
                self.reporter.write_step(
                    StepMetrics(
                        step, result.loss, result.loss.hex(), result.gradient_norm, rate, speed, now - boundary, self.data_wait_seconds
                    )
                )
            boundary = now
            step += 1

    def _open(self, start_step: int) -> None:
        config = self.config
        if dist.is_rank_0():
            cut_ledgers(self.run_dir, before_step=start_step)
        dist.barrier()
        self.ledger = Ledger(self.run_dir, dist.rank(), max_bad_samples=config.data.max_bad_samples)
        dist.barrier()  # all have counted before one writes
        self.reporter = None
        if dist.is_rank_0():
            self.reporter = Reporter(
                self.run_dir,
                start_step=start_step,
                total_steps=config.train.steps,
                recipe_text=(self.run_dir / "recipe.yaml").read_text(),
                hyperparameters=identity(config),
                title=self.run_dir.name,
            )

    def _batches(self, start_step: int, stop_step: int) -> Iterator[MicroBatch]:
        data = self.config.data
        plan = Plan(
            self.index.samples_per_shard,
            seed=derive_seed(self.config.seed, "order"),
            global_batch_size=data.global_batch_size,
            micro_batch_size=data.micro_batch_size,
        )
        dataset = MicroBatches(self.index, plan, on_bad_sample=data.on_bad_sample)
        return iter(
            loader(
                dataset,
                start_step=start_step,
                stop_step=stop_step,
                indices=dist.share(self.config.micro_batches),
                workers=data.workers,
                pin=dist.device().type == "cuda",
            )
        )

    def _losses(self, batches: Iterator[MicroBatch], step: int) -> Iterator[LossPerImage]:
        """This rank's micro-batches of one step, as functions of the denoiser."""
        config, device = self.config, dist.device()
        for index in dist.share(config.micro_batches):
            waited = time.perf_counter()
            batch = next(batches)
            self.data_wait_seconds += time.perf_counter() - waited
            count, channels, height, width = batch.images.shape
            draws = draw(
                config.seed,
                step,
                index,
                shape=(count, channels, height, width),
                micro_batches=config.micro_batches,
                stratified=self.task.stratified,
            )
            replaced = [str(bad) for bad in batch.replaced]
            self.ledger.write(step, index, keys=batch.keys, draws_sha256=draws.sha256(), replaced=replaced)
            flips = draws.flips.to(device) if config.data.horizontal_flip else None
            x_0 = encode_pixels(batch.images.to(device, non_blocking=True), flips=flips)
            seed_dropout(config.seed, step, index)
            yield lambda model, x_0=x_0, draws=draws: self.task.objective(model, x_0, draws)

    def _save(self, step: int) -> None:
        """Commit a checkpoint of the state after `step` steps, the reports that belong to it first."""
        self.ledger.sync()
        dist.barrier()
        if self.reporter:
            self.reporter.sync()
            parts = self.engine.state_tensors()
            facts = {
                "world_size": dist.world_size(),
                "descriptor": self.task.descriptor.to_json(),
                "weights_sha256": tensors_sha256(parts["model"]),
                "ema_sha256": tensors_sha256(parts["ema"]),
            }
            write_checkpoint(self.run_dir, step, parts=parts, facts=facts)
            delete_old_checkpoints(self.run_dir, newest=step, keep_last=self.config.checkpoint.keep_last)

    def _draw_samples(self, step: int) -> None:
        """Draw the sample grids, the images divided among the ranks."""
        logs = self.config.logging
        with self.engine.averaged() as averaged:
            ema = draw_grid(averaged, self.task, images=logs.sample_images, steps=logs.sample_steps, seed=GRID_SEED)
        raw = draw_grid(self.engine.raw(), self.task, images=logs.sample_images, steps=logs.sample_steps, seed=GRID_SEED)
        if self.reporter:
            self.reporter.write_samples(step, {"ema": ema, "raw": raw})

    def _close(self) -> None:
        """Leave files whole and the terminal tidy, however the loop ended."""
        self.ledger.close()
        if self.reporter:
            self.reporter.close()
