"""The loop: optimizer steps with their data, ledger, metrics, samples and saves, until done or asked to stop."""

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import final

from torch import Tensor

from data_shards import ranks
from data_shards.reading.sample import MicroBatch
from trainer.checkpoint import Piece
from trainer.config import RunConfig, identity
from trainer.engines.engine import Engine, LossPerImage, StepResult
from trainer.exit_codes import CALL_AGAIN, DONE
from trainer.export import export_run
from trainer.manifest import Checkpoint, Retention
from trainer.metrics import Ledger, Reporter, Workload, cut_ledgers, measure_step
from trainer.models.flops import peak_flops
from trainer.models.network import Network
from trainer.numeric import BadSteps, LossAverage, RollBack
from trainer.optim import learning_rate
from trainer.rng import seed_dropout
from trainer.save import DISK_FULL, Saver
from trainer.spans import span
from trainer.stop import StopRequest
from trainer.tasks.task import Task
from trainer.training_data import TrainingData
from trainer.watch import Watch

logger = logging.getLogger(__name__)

VOTES = 2
"""What the ranks tell each other in every step's own reduction: the wish to stop, and that a save has ended."""
Batches = Iterator[tuple[MicroBatch, ...]]
"""One micro-batch of each data set at a time."""
_SAVE_TIMEOUT_SECONDS = 1800.0
_LAST_SAVE_SECONDS = 60.0


def saved_errors(checkpoint: Checkpoint | None) -> list[float]:
    """The student's errors that were measured before a checkpoint, exactly; none without one."""
    saved = checkpoint.manifest.get("student_errors") if checkpoint else None
    return [float.fromhex(str(error)) for error in saved] if isinstance(saved, list) else []


@final
class Loop:
    """One attempt at a run: its files and its place."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        data: Sequence[TrainingData],
        task: Task,
        engine: Engine,
        pieces: Sequence[Piece],
        *,
        checkpoint: Checkpoint | None,
        stop: StopRequest,
        watch: Watch,
        profile: bool = False,
    ) -> None:
        """data: one data set or several, read side by side. checkpoint: what `engine` holds; None for step 0.

        profile: whether rank 0 watches some steps (trainer.profiling). pieces: of the engine's state, on all ranks. Collective."""
        self.config, self.run_dir, self.data, self.task, self.engine = config, run_dir, data, task, engine
        self.stop, self.watch = stop, watch
        self.wants_profile, self.profile = profile, None
        self.start_step = checkpoint.step if checkpoint else 0
        self.keys: dict[int, Sequence[str]] = {}
        saved_average = checkpoint.manifest.get("loss_average") if checkpoint else None
        self.average = LossAverage(spike_factor=config.numeric.spike_factor, saved=saved_average)
        self.losses_since_save: list[float] = []
        self.errors = saved_errors(checkpoint)
        self.saver = Saver(
            run_dir,
            engine.state(),
            pieces,
            retention=Retention(
                keep_last=config.checkpoint.keep_last,
                keep_every_steps=config.checkpoint.keep_every_steps,
                keep_best=config.checkpoint.keep_best,
                good=[checkpoint.step] if checkpoint else [],
            ),
            asynchronous=config.checkpoint.asynchronous,
            timeout_seconds=_SAVE_TIMEOUT_SECONDS,
            before_commit=self._make_reports_durable,
            progress=watch.saving,
            may_commit=lambda: watch.lease is None or watch.lease.held(),
        )

    def go(self) -> int:
        """Run to the end or to a request to stop; returns the worker's exit code. Collective."""
        self._open()
        try:
            step = self._take_steps()
        except RollBack:
            self.saver.finish()
            self.saver.close()
            raise
        finally:
            # However it ended: a checkpoint that was on its way when a step was bad is not thrown away.
            self.saver.wait(_LAST_SAVE_SECONDS)
            self._close()
        self.saver.close()
        self.stop.took(step - self.start_step)
        if step < self.config.train.steps and not self._learnt_enough():
            logger.info("stopped at step %d of %d; the same command goes on from there", step, self.config.train.steps)
            return CALL_AGAIN
        self.watch.phase("export" if ranks.is_rank_0() else "end", step)
        if ranks.is_rank_0():
            export_run(self.run_dir)
        ranks.barrier()
        return DONE

    def _take_steps(self) -> int:
        """The loop; returns how many steps the run has now, all of them committed."""
        config, train, start_step = self.config, self.config.train, self.start_step
        last_step = min(train.steps, start_step + (self.stop.steps_left or train.steps))
        step, asked, own = start_step, False, ranks.share(config.micro_batches)
        pin = ranks.device().type == "cuda"
        batches = zip(*(data.batches(start_step, last_step, own, pin=pin) for data in self.data), strict=True)
        work = self._workload()
        boundary = time.perf_counter()
        while True:
            self._measure_student(step)
            enough = self._learnt_enough()
            ends = step in (train.steps, last_step) or asked or enough
            saves = step > start_step and (ends or step % config.checkpoint.every_steps == 0)
            draws = (
                self.task.draw
                and config.logging.sample_every_steps
                and (step % config.logging.sample_every_steps == 0 or step == train.steps or enough)
            )
            if saves:
                with span("checkpoint"):
                    self._save(step)
            if draws:
                with span("samples"):
                    self._draw_samples(step)
            if ends:
                self.watch.phase("join", step)
                self.saver.finish()
                return step
            if saves or draws:
                boundary = time.perf_counter()
            if step in self.bad_steps.left_out:
                self._pass_over(batches)
                step += 1
                continue
            self.data_wait_seconds = 0.0
            rate = learning_rate(step, peak=config.optim.learning_rate, total_steps=train.steps, schedule=config.lr_schedule)
            limit = self.average.limit
            votes = (float(bool(self.stop.reason)), float(self.saver.ended))
            result = self.engine.step(step, self._losses(batches, step), learning_rate=rate, votes=votes, loss_limit=limit)
            stops, ended = result.votes
            asked = stops > 0
            self.ledger.flush()
            # A step's seconds include the report of the one before, but neither checkpoints nor samples.
            now = time.perf_counter()
            if self._counts(step, result, limit) and self.reporter and (step % config.logging.every_steps == 0 or step + 1 == train.steps):
                measured = measure_step(
                    step,
                    work,
                    loss=result.loss,
                    gradient_norm=result.gradient_norm,
                    learning_rate=rate,
                    step_seconds=now - boundary,
                    data_wait_seconds=self.data_wait_seconds,
                )
                with span("logging"):
                    self.reporter.write_step(measured)
            boundary = now
            step += 1
            if ended == ranks.world_size():
                self._end_save(step)
            if self.profile:
                self.watch.phase("profile", step)
                self.profile.stepped()
                boundary = time.perf_counter()  # what it writes is no part of the next step

    def _measure_student(self, step: int) -> None:
        """Measure the student's error where it is due and has not been measured before a resume. Collective."""
        measured = self.task.student_error
        if measured is None or step % measured.every_steps or len(self.errors) > step // measured.every_steps:
            return
        self.watch.phase("sample", step)
        with self.engine.averaged() as averaged:
            self.errors.append(measured.error(averaged))
        logger.info("step %d: the student's error is %.4g", step, self.errors[-1])

    def _learnt_enough(self) -> bool:
        """Whether the student's error has stopped falling: a pure function of what was measured, which checkpoints hold."""
        return self.task.student_error is not None and self.task.student_error.enough(self.errors)

    def _counts(self, step: int, result: StepResult, limit: float | None) -> bool:
        """Whether the step moved the weights; one that was bad is dealt with."""
        match result.outcome:
            case "applied":
                self.average.add(result.loss)
                self.losses_since_save.append(result.loss)
                return True
            case "overflow":
                logger.info("step %d: fp16 overflow, the loss scale is lowered", step)
                return False
            case "bad":
                self.bad_steps.add(step, result, loss_limit=limit, keys=self.keys)
                logger.warning("step %d was bad and is left out; %s says why", step, self.bad_steps.path)
                return False

    def _open(self) -> None:
        config, start_step = self.config, self.start_step
        if ranks.is_rank_0():
            cut_ledgers(self.run_dir, before_step=start_step)
        ranks.barrier()
        self.ledger = Ledger(self.run_dir, ranks.rank(), max_bad_samples=config.data.max_bad_samples)
        numeric = config.numeric
        self.bad_steps = BadSteps(self.run_dir, start_step=start_step, action=numeric.on_bad_step, budget=numeric.max_bad_steps)
        ranks.barrier()  # all have counted before one writes
        self.reporter = None
        if self.wants_profile and ranks.is_rank_0():
            from trainer.profiling import Profile

            self.profile = Profile(self.run_dir, start_step=start_step)
        if ranks.is_rank_0():
            self.reporter = Reporter(
                self.run_dir,
                start_step=start_step,
                total_steps=config.train.steps,
                recipe_text=(self.run_dir / "recipe.yaml").read_text(),
                hyperparameters=identity(config),
                title=self.run_dir.name,
            )

    def _workload(self) -> Workload:
        peak = peak_flops(ranks.device(), self.config.engine.precision)
        return Workload(
            images=self.config.data.global_batch_size,
            flops_per_image=self.task.flops_per_image,
            peak_flops=peak and peak * ranks.world_size(),
            device=ranks.device(),
        )

    def _losses(self, batches: Batches, step: int) -> Iterator[LossPerImage]:
        """This rank's micro-batches of one step, as functions of the denoiser."""
        config = self.config
        for index in ranks.share(config.micro_batches):
            self.watch.phase("data", step)
            waited = time.perf_counter()
            with span("data wait"):
                delivered = next(batches)
            self.data_wait_seconds += time.perf_counter() - waited
            self.watch.phase("compute", step)
            with span("draws and encoding"):
                work = self.task.micro_batch(delivered, step, index)
            self.keys[index] = [key for batch in delivered for key in batch.keys]
            replaced = [str(bad) for batch in delivered for bad in batch.replaced]
            with span("logging"):
                self.ledger.write(step, index, keys=self.keys[index], draws_sha256=work.draws_sha256, replaced=replaced)
            seed_dropout(config.seed, step, index)
            yield work.loss
        self.watch.phase("reduce", step)

    def _pass_over(self, batches: Batches) -> None:
        """Read a step's micro-batches without using them."""
        for _ in ranks.share(self.config.micro_batches):
            next(batches)

    def _save(self, step: int) -> None:
        """Start the commit of the state after `step` steps; the one before has to end first."""
        self.watch.phase("join", step)
        self._end_save(step)
        self.watch.phase("stage", step)
        losses, self.losses_since_save = self.losses_since_save, []
        facts = {
            "world_size": ranks.world_size(),
            "engine": self.config.engine.kind,
            "descriptor": self.task.descriptor.to_json(),
            "ema_decays": [self.config.ema.decay, *self.config.ema.more_decays],
            "loss_scale": dict(self.engine.loss_scale()),
            "loss_average": self.average.to_json(),
            "mean_loss": sum(losses) / len(losses) if losses else None,
            "final": step == self.config.train.steps or self._learnt_enough(),
            **({"learnt_enough": self._learnt_enough(), "student_errors": [error.hex() for error in self.errors]} if self.errors else {}),
        }
        self.saver.start(step, facts)

    def _end_save(self, step: int) -> None:
        """Learn how the save on its way ended; a full disk may be survived if the recipe says so."""
        try:
            self.saver.finish()
        except OSError as error:
            if error.errno not in DISK_FULL or self.config.checkpoint.on_disk_full == "stop":
                raise
            logger.warning("step %d: %s; the run goes on without it", step, error)

    def _make_reports_durable(self) -> None:
        """What was reported of the steps that a checkpoint holds outlives it; called by the thread that saves."""
        self.ledger.sync()
        if self.reporter:
            self.reporter.sync()

    def _draw_samples(self, step: int) -> None:
        """Draw the sample grids, the images divided among the ranks."""
        self.watch.phase("sample", step)

        def ticking(predict: Network) -> Network:
            def evaluate(*inputs: object) -> Tensor:
                self.watch.tick()
                return predict(*inputs)

            return evaluate

        assert self.task.draw is not None, "asked only where there is something to draw"
        with self.engine.averaged() as averaged:
            ema = self.task.draw(ticking(averaged), step)
        # Before the first step the average is of nothing but the weights themselves.
        raw = ema if step == 0 else self.task.draw(ticking(self.engine.raw()), step)
        if self.reporter:
            self.reporter.write_samples(step, {"ema": ema, "raw": raw})

    def _close(self) -> None:
        """Leave files whole and the terminal tidy, however the loop ended."""
        self.ledger.close()
        if self.profile:
            self.profile.close()
        if self.reporter:
            self.reporter.close()
