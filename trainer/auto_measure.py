"""Measuring, once before step 0, what the recipe leaves open: rank 0 times candidates on copies, the run freezes the choice."""

import gc
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import final

import torch

from data_shards import ranks
from data_shards.reading.sample import MicroBatch
from trainer.auto_choice import (
    AUTO_FILE,
    Candidate,
    Choice,
    Measurement,
    Timing,
    candidates,
    choose,
    freeze_choice,
    read_measurement,
    with_choice,
    worth_compiling,
)
from trainer.chain import read_chain
from trainer.config import RunConfig
from trainer.config_sections import MemoryFormat
from trainer.engines.precision import autocast
from trainer.environment import describe_device
from trainer.models.network import in_format, network
from trainer.rng import seed_dropout
from trainer.stop import StopRequest
from trainer.tasks.build import build_task
from trainer.training_data import TrainingData
from trainer.watch import Watch

logger = logging.getLogger(__name__)

_WARM_CALLS = 2
"""Of each candidate before it is timed; a compiled one's first is its compilation."""
_LIMIT_SECONDS = 1800.0
"""After which no further candidate, nor another round of all, is begun."""
_WHOLE_GIB = 1e9
"""Rank 0 measures alone, so that no frozen model is shared among the ranks."""


def settle(config: RunConfig, run_dir: Path, data: TrainingData, *, start_step: int, stop: StopRequest, watch: Watch) -> RunConfig | None:
    """The recipe with what it leaves open measured and frozen in RUN_DIR; None where the run was asked to stop meanwhile.

    A stage of a chain takes the times of an earlier one of the same network, batch and device, and judges them by its own length.
    Collective; rank 0 measures, the others wait for its choice.
    Raises: ValueError where the run's task cannot be built."""
    # A host whose file system shows a frozen recipe late must not measure again what another one knows.
    known = next(filter(None, ranks.all_gather_text("" if config.train.to_measure else _told(config))), None)
    if known is not None:
        return _as_told(config, known)
    group = ranks.new_cpu_group(timeout_seconds=2 * _LIMIT_SECONDS)
    watch.phase("measure" if ranks.is_rank_0() else "wait", 0)
    told = ""
    if ranks.is_rank_0():
        chosen = _settle_alone(config, run_dir, data, start_step=start_step, stop=stop, tick=watch.tick)
        told = "" if chosen is None else _told(chosen)
    told = ranks.all_gather_text(told, group=group)[0]
    ranks.destroy_group(group)
    return _as_told(config, told) if told else None


def _told(config: RunConfig) -> str:
    """A recipe's choice, for the other ranks."""
    return f"{'compiled' if config.train.compiles else 'eager'} {config.train.layout}"


def _as_told(config: RunConfig, told: str) -> RunConfig:
    way, memory_format = told.split()
    return with_choice(config, Candidate(way == "compiled", "channels_last" if memory_format == "channels_last" else "contiguous"))


@final
class _Stopped(Exception):
    """The run was asked to stop while it measured."""


def _settle_alone(
    config: RunConfig, run_dir: Path, data: TrainingData, *, start_step: int, stop: StopRequest, tick: Callable[[], None]
) -> RunConfig | None:
    def look() -> None:
        tick()
        if stop.reason:
            raise _Stopped

    micro_batches = (config.train.steps - start_step) * len(ranks.share(config.micro_batches))
    wanted = candidates(config)
    measurement, measured_in = _of_an_earlier_stage(run_dir, wanted, _conditions(config, data), micro_batches=micro_batches), "."
    if measurement:
        measurement, measured_in = measurement
    else:
        logger.info("measuring once what the recipe leaves open: %s", ", ".join(f"train.{name}=auto" for name in config.train.to_measure))
        try:
            with torch.random.fork_rng(devices=[ranks.device()] if ranks.device().type == "cuda" else []):
                measurement = _measure(config, run_dir, data, wanted, micro_batches=micro_batches, look=look)
        except _Stopped:
            return None
        finally:
            _forget(compiled=config.train.compile is not False)
    for name, why in measurement.failed.items():
        logger.warning("%s: cannot be here: %s", name, why)
    timings = [timing for each in wanted for timing in measurement.timings if timing.candidate == each]
    choice = choose(timings, micro_batches=micro_batches) if timings else Choice(wanted[0], ("nothing could be measured",))
    for reason in choice.reasons:
        logger.info("%s", reason)
    frozen = freeze_choice(run_dir, config, choice, measurement, measured_in=measured_in)
    values = f"train.compile={str(frozen.train.compiles).lower()}, train.memory_format={frozen.train.layout}"
    logger.info("chosen for this run and frozen in its recipe: %s; the figures are in %s", values, run_dir / AUTO_FILE)
    return frozen


def _conditions(config: RunConfig, data: TrainingData) -> dict[str, object]:
    """What times hold for."""
    model = config.model.model_dump(mode="json")
    model.pop("start", None)  # a chain's students do not have their teacher's
    return {
        "device": describe_device(ranks.device()),
        "torch": torch.__version__,
        "model": model,
        "micro_batch_size": config.data.micro_batch_size,
        "image_size": data.image_size,
        "precision": config.engine.precision,
        "attention": config.engine.attention,
        "deterministic": config.engine.deterministic,
        "sharded": config.engine.kind != "replicated",
        "activation_checkpointing": config.train.activation_checkpointing,
    }


def _of_an_earlier_stage(
    run_dir: Path, wanted: Sequence[Candidate], conditions: dict[str, object], *, micro_batches: int
) -> tuple[Measurement, str] | None:
    """What the nearest earlier stage of the same chain has measured under these conditions, and its folder."""
    if not (run_dir.parent / "chain.json").exists():
        return None
    stages = [stage.run_dir for stage in read_chain(run_dir.parent) if stage.trained_here]
    earlier = list(takewhile(lambda stage: stage.name != run_dir.name, stages))
    for stage in reversed(earlier):
        found = read_measurement(stage)
        if found and found.conditions == conditions and found.covers(wanted, micro_batches=micro_batches):
            logger.info("taking the times that %s has measured", stage)
            return found, f"../{stage.name}"
    return None


def _measure(
    config: RunConfig, run_dir: Path, data: TrainingData, wanted: Sequence[Candidate], *, micro_batches: int, look: Callable[[], None]
) -> Measurement:
    """Times of what can be, simplest first. look: called between any two calls of the network."""
    batch, copies = data.micro_batch(0, 0), dict[str, _Copy]()
    failed: dict[str, str] = {}
    warm: list[Timing] = []
    began = time.perf_counter()
    for candidate in wanted:
        look()
        if why := _not_tried(candidate, wanted, warm, data, micro_batches=micro_batches, seconds=time.perf_counter() - began):
            logger.info("%s: not tried, %s", candidate, why)
            continue
        # Whatever a compiler raises, or a device without memory: the run goes on without that candidate.
        tolerated = Exception if candidate.compile else RuntimeError
        try:
            if candidate.compile:
                _check_compiler()
            if candidate.memory_format not in copies:
                copies[candidate.memory_format] = _Copy(config, run_dir, data, batch, candidate.memory_format)
            first, *_, last = (copies[candidate.memory_format].seconds(compiled=candidate.compile) for _ in range(_WARM_CALLS))
        except tolerated as error:
            failed[str(candidate)] = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no reason given')}"
            continue
        logger.info("%s: %.3g s a micro-batch, after %.3g s for the first", candidate, last, first)
        warm.append(Timing(candidate, (last,), max(0.0, first - last) if candidate.compile else 0.0))
    taken: list[list[float]] = [[] for _ in warm]
    for _ in range(_rounds(sum(timing.seconds[0] for timing in warm))):
        for timing, seconds in zip(warm, taken, strict=True):
            look()
            seconds.append(copies[timing.candidate.memory_format].seconds(compiled=timing.candidate.compile))
        if time.perf_counter() - began > _LIMIT_SECONDS:
            break
    timings = tuple(replace(timing, seconds=tuple(seconds)) for timing, seconds in zip(warm, taken, strict=True))
    return Measurement(timings, _conditions(config, data), failed)


def _not_tried(
    candidate: Candidate,
    wanted: Sequence[Candidate],
    warm: Sequence[Timing],
    data: TrainingData,
    *,
    micro_batches: int,
    seconds: float,
) -> str | None:
    """Why a candidate is not worth its own measurement; None where it is. seconds: that measuring has taken so far."""
    if seconds > _LIMIT_SECONDS:
        return f"measuring has taken {seconds:.0f} s already"
    if not candidate.compile or wanted[0].compile:
        return None
    if data.sizes is not None and len(data.sizes) > 1:
        return "each shape of images is compiled anew"
    spent = sum(timing.compile_seconds for timing in warm)
    return None if worth_compiling(warm, micro_batches=micro_batches, spent_seconds=spent) else "this run is too short"


def _rounds(round_seconds: float) -> int:
    """How often all candidates are timed: ten seconds' worth, at least five times if that takes less than a minute, else three."""
    return max(5 if 5 * round_seconds < 60 else 3, min(50, int(10 / max(round_seconds, 0.01))))


@final
class _Copy:
    """The run's own task, built apart, with its first micro-batch; the run, its weights and its files know nothing of it."""

    def __init__(self, config: RunConfig, run_dir: Path, data: TrainingData, batch: MicroBatch, memory_format: MemoryFormat) -> None:
        train = config.train.model_copy(update={"memory_format": memory_format, "compile": config.train.compile is not False})
        engine = config.engine.model_copy(update={"shard_frozen_above_gib": _WHOLE_GIB})
        self.config = config = config.model_copy(update={"train": train, "engine": engine})
        task = build_task(config, run_dir, data.image_size, data=data)
        module = task.module.to(ranks.device()).train()
        predict = network(module)
        if config.engine.kind == "replicated":
            if memory_format == "channels_last":
                for parameter in module.parameters():
                    if parameter.requires_grad and parameter.dim() == 4:
                        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        else:
            predict = in_format(predict, memory_format)
        if config.train.compiles:
            module.compile()
        self.predict, self.device = predict, ranks.device()
        self.work = task.micro_batch([batch, batch] if task.class_images else [batch], 0, 0)

    def seconds(self, *, compiled: bool) -> float:
        """What one micro-batch takes forward and backward, compiled or not."""
        seed_dropout(self.config.seed, 0, 0)
        may_compile = self.config.train.compiles
        with torch.compiler.set_stance("default" if compiled else "force_eager") if may_compile else nullcontext():
            self._wait()
            began = time.perf_counter()
            with autocast(self.config.engine.precision):
                loss = self.work.loss(self.predict).mean()
            loss.backward()
            self._wait()
            return round(time.perf_counter() - began, 7)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _check_compiler() -> None:
    """Raises: RuntimeError where torch.compile lacks what it compiles with on this rank's device."""
    if ranks.device().type == "cuda":
        if find_spec("triton") is None:
            raise RuntimeError("Triton is not installed")
        names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    else:
        names = [os.environ.get("CXX") or "g++"]
    if not any(map(shutil.which, names)):
        raise RuntimeError(f"no compiler: none of {', '.join(names)} is on the PATH")


def _forget(*, compiled: bool) -> None:
    """Leave no trace of what was measured in this process: neither compiled code nor, on a GPU, memory and its highest mark."""
    if compiled:
        torch.compiler.reset()
    gc.collect()  # compiled modules lie in circles of references
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
