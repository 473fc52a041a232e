"""A teacher with random weights in a real RUN_DIR: for benchmarks, which ask how fast and not how well."""

from pathlib import Path

import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from trainer.config import RunConfig
from trainer.config_io import dump_yaml
from trainer.save import write_checkpoint
from trainer.tasks.build import build_task


def write_teacher(run_dir: Path, config: RunConfig, *, image_size: int) -> Path:
    """The RUN_DIR of a teacher of the recipe's model and noise schedule after a first step; returns it.

    Its last layer's weights are a tenth of fresh ones, so that long sampling runs stay finite."""
    run_dir.mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(dump_yaml(config.model_copy(update={"distill": None})))
    task = build_task(config, run_dir, image_size)
    assert isinstance(task.module, UNet2DModel), "a teacher is of pixels"
    with torch.no_grad():
        for parameter in task.module.conv_out.parameters():
            parameter.mul_(0.1)
    weights = task.module.state_dict()
    facts = {"descriptor": task.descriptor.to_json(), "ema_decays": [config.ema.decay]}
    write_checkpoint(run_dir, 1, parts={"model": weights, "ema": weights}, facts=facts)
    return run_dir
