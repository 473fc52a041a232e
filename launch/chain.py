"""A chain of halvings as folders: chain.json, and a frozen recipe for each stage."""

import hashlib
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from data_shards.files import json_text, replace_file
from launch.data import with_data
from launch.run_dir import freeze
from trainer.config import (
    DenoisingConfig,
    DistillConfig,
    EmaConfig,
    ModelConfig,
    ProgressiveDistillationConfig,
    RunConfig,
    TinyUNetConfig,
    pixel_objective,
    student_counts,
)
from trainer.config_io import load_recipe
from trainer.stages import stage_name

_Number = TypeVar("_Number", int, float)


def with_teacher(config: RunConfig, teacher: Path) -> RunConfig:
    """The recipe with the sections that a trained teacher decides: model, noise schedule and prediction.

    Raises: ValueError if the recipe sets one of them and the teacher was trained with another."""
    if not (teacher / "recipe.yaml").exists() or (teacher / "chain.json").exists():
        raise ValueError(f"distill.teacher={teacher}: wanted the folder of one run or export, such as a chain's stage_00_1000_steps")
    recipe = load_recipe(teacher / "recipe.yaml", ())
    if not isinstance(recipe.objective, DenoisingConfig):
        raise ValueError(f"distill.teacher={teacher}: is a student already; give the teacher that its chain began with")
    taken = {"model": _begun(recipe.model), "noise_schedule": recipe.noise_schedule}
    for section, its in taken.items():
        if section in config.model_fields_set and getattr(config, section) != its:
            raise ValueError(
                f"{section} is {getattr(config, section)}, but the teacher {teacher} was trained with {its}; "
                f"leave {section} out of the recipe to take the teacher's"
            )
    merged = config.model_copy(update={**taken, "objective": recipe.objective})
    merged.check()
    return merged


def freeze_chain(chain_dir: Path, config: RunConfig, distill: DistillConfig, *, shards: Path | Sequence[Path]) -> None:
    """Write (or check) the chain's own files and each stage's RUN_DIR up to its frozen recipe."""
    counts = (distill.start_steps, *student_counts(distill))
    shards = [shards] if isinstance(shards, Path) else shards
    freeze(chain_dir, config, shards=shards, steps_fixed=True)
    if distill.teacher is None:
        levels = config.noise_schedule.steps
        teacher = stage_name(0, levels)
        stages = [{"name": teacher, "steps": levels, "run_dir": teacher}]
        freeze(chain_dir / teacher, _stage_config(config, chain_dir / teacher, shards), shards=shards, steps_fixed=True)
    else:
        teacher = os.path.abspath(distill.teacher)
        stages = [{"name": "teacher", "steps": config.noise_schedule.steps, "run_dir": teacher}]
    for number, (teacher_steps, steps) in enumerate(pairwise(counts), start=1):
        name = stage_name(number, steps)
        stage = student_config(config, distill, number=number, teacher_steps=teacher_steps, steps=steps)
        source = teacher if os.path.isabs(teacher) else f"../{teacher}"
        stage = stage.model_copy(update={"objective": stage.objective.model_copy(update={"teacher": source})})
        freeze(chain_dir / name, _stage_config(stage, chain_dir / name, shards), shards=shards, steps_fixed=True)
        stages.append({"name": name, "steps": steps, "run_dir": name})
        teacher = name
    replace_file(chain_dir / "chain.json", json_text({"schema_version": 1, "stages": stages}))


def stage_names(config: RunConfig, distill: DistillConfig) -> list[str]:
    """Folders of the stages that a chain trains, teacher first."""
    teacher = [] if distill.teacher else [stage_name(0, config.noise_schedule.steps)]
    return [*teacher, *(stage_name(number, steps) for number, steps in enumerate(student_counts(distill), start=1))]


def student_config(config: RunConfig, distill: DistillConfig, *, number: int, teacher_steps: int, steps: int) -> RunConfig:
    """The recipe of stage `number` (from 1), whose student samples in `steps` steps; its objective's teacher is still to be named."""
    objective = ProgressiveDistillationConfig(
        teacher="..",
        teacher_steps=teacher_steps,
        student_steps=steps,
        target=distill.target,
        sampler=distill.sampler,
        prediction=pixel_objective(config).prediction,
        loss=distill.loss,
        min_snr_gamma=distill.min_snr_gamma,
        clip_target=distill.clip_target,
    )
    batch = distill.global_batch_size or config.data.global_batch_size
    every = distill.checkpoint_every_steps or config.checkpoint.every_steps
    updates = _of_stage(distill.updates, number)
    warmup_steps = min(distill.lr_schedule.warmup_steps, updates // 5)
    return config.model_copy(
        update={
            "seed": stage_seed(config.seed, number),
            "model": _begun(config.model),
            "data": config.data.model_copy(update={"global_batch_size": batch}),
            "objective": objective,
            "optim": config.optim.model_copy(update={"learning_rate": _of_stage(distill.learning_rate, number)}),
            "lr_schedule": distill.lr_schedule.model_copy(update={"warmup_steps": warmup_steps}),
            "ema": EmaConfig(decay=distill.ema_decay, warmup=config.ema.warmup),
            "train": config.train.model_copy(update={"steps": updates}),
            "checkpoint": config.checkpoint.model_copy(update={"every_steps": every}),
        }
    )


def stage_seed(seed: int, number: int) -> int:
    """The seed of stage `number`, a pure function of the chain's: 31 bits, so that people can type it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/stage/{number}".encode("ascii")).digest()[:4], "little") >> 1


def _stage_config(config: RunConfig, run_dir: Path, shards: Sequence[Path]) -> RunConfig:
    """The recipe as a stage's folder freezes it: no chain in it, its data as seen from there."""
    config = with_data(config, shards, run_dir=run_dir, root=run_dir.parent)
    return config.model_copy(update={"distill": None, "data": config.data.model_copy(update={"faces": None})})


def _begun(model: ModelConfig) -> ModelConfig:
    """The model section of a student, which begins with its teacher's weights and no others."""
    return model.model_copy(update={"start": None}) if isinstance(model, TinyUNetConfig) else model


def _of_stage(values: _Number | Sequence[_Number], number: int) -> _Number:
    """A recipe's value for stage `number` (from 1): one for all, or one a stage."""
    return values[number - 1] if isinstance(values, Sequence) else values
