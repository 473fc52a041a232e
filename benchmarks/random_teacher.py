"""A teacher with random weights in a real RUN_DIR: for benchmarks, which ask how fast and not how well."""

from pathlib import Path

import torch

from trainer.config import DenoisingConfig, RunConfig, pixel_model
from trainer.config_io import dump_yaml
from trainer.descriptor import Descriptor
from trainer.diffusion.schedule import alpha_bar_sha256, build_alpha_bar
from trainer.models.tiny_unet import build_tiny_unet
from trainer.save import write_checkpoint


def write_teacher(run_dir: Path, config: RunConfig, *, image_size: int) -> Path:
    """The RUN_DIR of a teacher of the recipe's model and noise schedule after a first step; returns it.

    Its last layer's weights are a tenth of fresh ones, so that long sampling runs stay finite."""
    objective = config.objective
    assert isinstance(objective, DenoisingConfig) and objective.prediction != "base", "a teacher denoises, and says what it predicts"
    run_dir.mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(dump_yaml(config.model_copy(update={"distill": None})))
    alpha_bar = build_alpha_bar(config.noise_schedule)
    descriptor = Descriptor(
        prediction_type=objective.prediction,
        alpha_bar_sha256=alpha_bar_sha256(alpha_bar),
        timesteps=tuple(range(len(alpha_bar))),
        clip=True,
        sampler="ddim",
        variance="fixed_small",
        step_count=len(alpha_bar),
        teacher_sha256=None,
        image_size=image_size,
        channels=3,
    )
    torch.manual_seed(0)
    model = build_tiny_unet(pixel_model(config), image_size)
    with torch.no_grad():
        for parameter in model.conv_out.parameters():
            parameter.mul_(0.1)
    weights = model.state_dict()
    facts = {"descriptor": descriptor.to_json(), "ema_decays": [config.ema.decay]}
    write_checkpoint(run_dir, 1, parts={"model": weights, "ema": weights}, facts=facts)
    return run_dir
