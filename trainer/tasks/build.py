"""A recipe's task: the one place that joins models with objectives."""

from pathlib import Path

from trainer.config import RunConfig, TinyUNetConfig
from trainer.tasks.pixel import build_pixel_task
from trainer.tasks.task import Task


def build_task(config: RunConfig, run_dir: Path, image_size: int) -> Task:
    """The task of a run. Collective where a large frozen model is shared among the ranks.

    Raises: ValueError where model, objective and data do not fit each other."""
    match config.model:
        case TinyUNetConfig() as model:
            return build_pixel_task(config, run_dir, model, image_size)
        case other:
            raise ValueError(other.kind)
