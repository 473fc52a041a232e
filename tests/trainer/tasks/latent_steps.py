"""Steps of latent recipes in this process, as the loop takes them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_shards.reading.sample import MicroBatch
from trainer.config import RunConfig
from trainer.engines.engine import Engine, LossPerImage, StepResult
from trainer.loop import VOTES
from trainer.optim import learning_rate
from trainer.rng import seed_dropout
from trainer.tasks.build import build_task, needed_fields
from trainer.tasks.task import Task
from trainer.train import build_engine
from trainer.training_data import TrainingData

SIDE = 64
STEPS = 50
Batches = Mapping[tuple[int, int], Sequence[MicroBatch]]
"""By (step, index): a micro-batch of each data set."""


def recipe(shards: Path, model: Mapping[str, object], **sections: Mapping[str, object] | None) -> RunConfig:
    """Two micro-batches of two images a step, in fp32 throughout, its settings those of diffusers' scripts."""
    values: dict[str, dict[str, object]] = {
        "data": {"shards": str(shards), "global_batch_size": 4, "micro_batch_size": 2},
        "model": {"frozen_precision": "fp32", **model},
        "objective": {"kind": "latent_denoising"},
        "train": {"steps": STEPS},
        "optim": {"learning_rate": 1e-3, "weight_decay": 1e-2},
        "logging": {"sample_images": 1, "sample_steps": 2},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **(section or {})}
    return RunConfig.model_validate(values)


@dataclass
class Steps:
    """A run in this process: what it reads, and the engine that takes its steps."""

    config: RunConfig
    run_dir: Path
    data: Sequence[TrainingData]
    task: Task
    engine: Engine
    results: list[StepResult] = field(default_factory=list)

    def batches(self, steps: int) -> Batches:
        """What a run of so many steps reads."""
        places = [(step, index) for step in range(steps) for index in range(self.config.micro_batches)]
        every = range(self.config.micro_batches)
        read = zip(*(data.batches(0, steps, every, pin=False) for data in self.data), strict=True)
        return dict(zip(places, read, strict=True))

    def take(self, step: int, batches: Batches) -> StepResult:
        """One optimizer step."""
        rate = learning_rate(
            step, peak=self.config.optim.learning_rate, total_steps=self.config.train.steps, schedule=self.config.lr_schedule
        )
        result = self.engine.step(step, self._losses(step, batches), learning_rate=rate, votes=(0.0,) * VOTES, loss_limit=None)
        self.results.append(result)
        return result

    def _losses(self, step: int, batches: Batches) -> Iterator[LossPerImage]:
        for index in range(self.config.micro_batches):
            work = self.task.micro_batch(batches[step, index], step, index)
            seed_dropout(self.config.seed, step, index)
            yield work.loss


def start(config: RunConfig, run_dir: Path) -> Steps:
    """A run before its first step, its class images drawn."""
    data = TrainingData.open(config, run_dir, fields=needed_fields(config))
    task = build_task(config, run_dir, data.image_size, data=data)
    engine = build_engine(config, task)
    data_sets = [data]
    if task.class_images is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        assert task.class_images.make(engine.raw(), fresh=True, asked_to_stop=lambda: False, tick=lambda: None)
        data_sets.append(TrainingData.open(config, run_dir, classes=str(task.class_images.folder())))
    return Steps(config, run_dir, data_sets, task, engine)
