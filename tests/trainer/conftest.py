"""Runs on disk without any training: random weights in real checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trainer.config import (
    CosineClampedNoiseSchedule,
    DataConfig,
    DenoisingConfig,
    FacesConfig,
    LinearNoiseSchedule,
    LoggingConfig,
    NoiseScheduleConfig,
    Prediction,
    ProgressiveDistillationConfig,
    RunConfig,
    Sampler,
    TinyUNetConfig,
    TrainConfig,
    pixel_model,
)
from trainer.config_io import dump_yaml
from trainer.descriptor import Descriptor
from trainer.diffusion.schedule import alpha_bar_sha256, build_alpha_bar
from trainer.models.tiny_unet import build_tiny_unet
from trainer.save import write_checkpoint
from trainer.stages import grid

IMAGE_SIZE = 8
SCHEDULES: dict[str, NoiseScheduleConfig] = {"cosine_clamped": CosineClampedNoiseSchedule(), "linear": LinearNoiseSchedule()}

WriteRun = Callable[..., Path]


@pytest.fixture
def write_run() -> WriteRun:
    """A function that writes the RUN_DIR of a teacher, or with `student_steps` of a student, after 7 steps; returns its path."""
    return _write_run


def _write_run(
    run_dir: Path,
    *,
    student_steps: int | None = None,
    schedule: str = "cosine_clamped",
    sampler: Sampler = "ddim",
    seed: int = 0,
    levels: int = 1000,
    image_levels: int = 2,
    prediction: Prediction = "v",
) -> Path:
    noise_schedule = SCHEDULES[schedule].model_copy(update={"steps": levels})
    recipe = RunConfig(
        data=DataConfig(faces=FacesConfig(count=8, size=IMAGE_SIZE)),
        model=TinyUNetConfig(channels=(8,) * image_levels, attention=(False, True)[-image_levels:], attention_heads=2, norm_groups=4),
        objective=DenoisingConfig(prediction=prediction) if student_steps is None else _halving(student_steps, levels, sampler),
        noise_schedule=noise_schedule,
        train=TrainConfig(steps=7),
        logging=LoggingConfig(sample_steps=min(50, levels)),
    )
    run_dir.mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(dump_yaml(recipe))
    alpha_bar = build_alpha_bar(noise_schedule)
    timesteps = grid(levels, student_steps or levels)
    descriptor = Descriptor(
        prediction_type=prediction,
        alpha_bar_sha256=alpha_bar_sha256(alpha_bar),
        timesteps=timesteps,
        clip=True,
        sampler=sampler,
        variance="fixed_small",
        step_count=len(timesteps),
        teacher_sha256=None if student_steps is None else "0" * 64,
        image_size=IMAGE_SIZE,
        channels=3,
    )
    model = build_tiny_unet(pixel_model(recipe), IMAGE_SIZE)
    generator = torch.Generator().manual_seed(seed)
    random = {name: torch.randn(tensor.shape, generator=generator) * 0.2 for name, tensor in model.state_dict().items()}
    shifts = {"model": 0.01, "ema": 0.0, "ema_1": 0.02}
    parts = {part: {name: tensor + shift for name, tensor in random.items()} for part, shift in shifts.items()}
    write_checkpoint(run_dir, 7, parts=parts, facts={"descriptor": descriptor.to_json(), "ema_decays": [0.995, 0.9]})
    return run_dir


def _halving(student_steps: int, levels: int, sampler: Sampler) -> ProgressiveDistillationConfig:
    counts = [levels]
    while counts[-1] != student_steps:
        counts.append((counts[-1] + 1) // 2)
    return ProgressiveDistillationConfig(
        teacher="../teacher", teacher_steps=counts[-2], student_steps=student_steps, target=sampler, sampler=sampler
    )


@pytest.fixture
def write_chain(tmp_path: Path) -> Callable[[dict[int, Path]], Path]:
    """A function that writes chain.json over runs inside tmp_path, given by step count, the teacher's first."""

    def write(runs: dict[int, Path]) -> Path:
        stages = [{"name": run.name, "steps": steps, "run_dir": str(run.relative_to(tmp_path))} for steps, run in runs.items()]
        (tmp_path / "chain.json").write_text(json.dumps({"schema_version": 1, "stages": stages}))
        return tmp_path

    return write
