"""A recipe's task: the one place that joins models with objectives."""

from pathlib import Path

from data_shards.config import Field
from trainer.config import AutoencoderConfig, DdpmConfig, PixelModelConfig, RunConfig, TinyUNetConfig
from trainer.tasks.pixel import build_pixel_task
from trainer.tasks.task import Task
from trainer.training_data import TrainingData


def build_task(config: RunConfig, run_dir: Path, image_size: int, *, data: TrainingData | None = None) -> Task:
    """The task of a run; what it needs is imported now. Collective where a large frozen model is shared among the ranks.

    image_size: side of the images in pixels. data: whose first samples latent models show, and students are measured on.
    Raises: ValueError where model, objective and data do not fit each other."""
    match config.model:
        case TinyUNetConfig() | DdpmConfig() as model:
            return build_pixel_task(config, run_dir, model, image_size, data)
        case AutoencoderConfig() as model:
            from trainer.tasks.autoencoder import build_autoencoder_task

            assert data is not None, "an autoencoder shows what it makes of samples"
            return build_autoencoder_task(config, model, data)
        case _:
            from trainer.tasks.latent import build_latent_task

            assert data is not None, "a latent model shows what it makes of samples"
            return build_latent_task(config, run_dir, data)


def needed_fields(config: RunConfig) -> tuple[Field, ...]:
    """What the reader delivers of a sample."""
    if isinstance(config.model, PixelModelConfig | AutoencoderConfig):
        return ("image",)
    from trainer.latents.inputs import needed_fields

    return needed_fields(config)
