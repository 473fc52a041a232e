"""A chain of halvings as folders: chain.json, and a frozen recipe for each stage."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, final

from data_shards.files import json_text, replace_file
from launch.data import with_data
from launch.models import is_hub_id, placed, teacher_place
from launch.run_dir import freeze, with_frozen_choice
from trainer.config import (
    BaseNoiseSchedule,
    DdpmConfig,
    DenoisingConfig,
    DistillConfig,
    EmaConfig,
    ModelConfig,
    NoiseScheduleConfig,
    ProgressiveDistillationConfig,
    RunConfig,
    Section,
    TinyUNetConfig,
    pixel_objective,
    student_counts,
)
from trainer.config_io import load_recipe
from trainer.config_sections import PredictionOrBase
from trainer.stages import stage_name
from trainer.stock import is_stock, stock_recipe

_Number = TypeVar("_Number", int, float)


def with_teacher(config: RunConfig, teacher: str | Path) -> RunConfig:
    """The recipe with the sections that a trained teacher decides: model, noise schedule and prediction.

    teacher: the folder of a run, an export or a stock pipeline, or the Hub id of one.
    Raises: ValueError if the recipe sets one of them and the teacher was trained with another."""
    recipe = _teachers_recipe(str(teacher))
    if not isinstance(recipe.objective, DenoisingConfig):
        raise ValueError(f"distill.teacher={teacher}: is a student already; give the teacher that its chain began with")
    taken: dict[str, ModelConfig | NoiseScheduleConfig] = {"model": _begun(recipe.model), "noise_schedule": recipe.noise_schedule}
    for section, theirs in taken.items():
        given = getattr(config, section)
        if section in config.model_fields_set and not _agree(given, theirs):
            raise ValueError(
                f"{', '.join(_differing(section, given, theirs))} the teacher {teacher} has; give {section}=null to take the teacher's"
            )
    merged = config.model_copy(update={**taken, "objective": recipe.objective})
    merged.check()
    return merged


def _teachers_recipe(teacher: str) -> RunConfig:
    """What a teacher was trained with; of a stock pipeline what its scheduler says."""
    folder = Path(placed("distill.teacher", teacher))
    if is_hub_id(teacher):
        name, _, revision = teacher.partition("@")
        return stock_recipe(name, revision=revision or None)
    if is_stock(folder):
        return stock_recipe(os.path.abspath(teacher))
    if not (folder / "recipe.yaml").exists() or (folder / "chain.json").exists():
        raise ValueError(
            f"distill.teacher={teacher}: wanted the folder of one run or export, such as a chain's stage_00_1000_steps, "
            "a stock pipeline's folder, or its Hub id"
        )
    recipe = load_recipe(folder / "recipe.yaml", ())
    if isinstance(recipe.model, DdpmConfig) and (folder / "model_index.json").exists():
        # An export's recipe names a base that may not be here, and the export is one itself.
        return recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": os.path.abspath(teacher), "revision": None})})
    return recipe


def _agree(given: Section, theirs: Section) -> bool:
    """Whether a section of the recipe says what the teacher's says, or leaves it to the base."""
    if isinstance(given, DdpmConfig) and isinstance(theirs, DdpmConfig):
        bases = [os.path.abspath(model.base) if os.path.isdir(model.base) else model.base for model in (given, theirs)]
        return bases[0] == bases[1] and given.revision in (None, theirs.revision) and given.dropout in (None, theirs.dropout)
    return given == theirs or isinstance(given, BaseNoiseSchedule)


def _differing(section: str, given: Section, theirs: Section) -> Iterator[str]:
    """What a section of the recipe says otherwise than its teacher's, key by key; of another kind the kind alone."""
    ours, its = (values.model_dump(mode="json") for values in (given, theirs))
    keys = ["kind"] if ours.get("kind") != its.get("kind") else [key for key in ours if ours[key] != its[key]]
    for key in keys:
        yield f"{section}.{key} is {json.dumps(ours[key])} in the recipe, not {json.dumps(its[key])} as"


def freeze_chain(chain_dir: Path, config: RunConfig, distill: DistillConfig, *, shards: Path | Sequence[Path]) -> None:
    """Write (or check) the chain's own files and each stage's RUN_DIR up to its frozen recipe."""
    shards = [shards] if isinstance(shards, Path) else shards
    config = with_frozen_choice(chain_dir, config)
    freeze(chain_dir, config, shards=shards, steps_fixed=True)
    levels = config.noise_schedule.steps
    if distill.teacher is None:
        teacher = stage_name(0, levels)
        stages = [{"name": teacher, "steps": levels, "run_dir": teacher}]
        freeze(chain_dir / teacher, _stage_config(config, chain_dir / teacher, shards), shards=shards, steps_fixed=True)
    else:
        teacher = teacher_place(distill.teacher, getattr(config.model, "revision", None))
        stages = [{"name": "teacher", "steps": levels, "run_dir": teacher}]
    names = stage_names(config, distill)
    for stage in planned_stages(config, distill):
        source = f"../{teacher}" if teacher in names else teacher
        recipe = student_config(config, distill, stage, teacher=source)
        freeze(chain_dir / stage.name, _stage_config(recipe, chain_dir / stage.name, shards), shards=shards, steps_fixed=True)
        stages.append({"name": stage.name, "steps": stage.steps, "run_dir": stage.name})
        teacher = stage.name
    replace_file(chain_dir / "chain.json", json_text({"schema_version": 1, "stages": stages}))


@final
@dataclass(frozen=True)
class PlannedStage:
    """A student of a chain: its place in it, and what it has of its teacher."""

    number: int
    """From 1, the stage that gives the students another head included; the teacher is stage 0."""
    halving: int | None
    """From 1 without that stage: which of the recipe's values are its; None for that stage."""
    teacher_steps: int
    steps: int
    prediction: PredictionOrBase

    @property
    def name(self) -> str:
        """Its folder."""
        return stage_name(self.number, self.steps)


def planned_stages(config: RunConfig, distill: DistillConfig) -> list[PlannedStage]:
    """The students that a chain trains, in order; where the head changes, a stage of the same steps stands before the next halving."""
    prediction, change, stages = pixel_objective(config).prediction, distill.head_change, list[PlannedStage]()
    counts = (distill.start_steps, *student_counts(distill))
    for halving, steps in enumerate(counts):
        if halving:
            stages.append(PlannedStage(len(stages) + 1, halving, counts[halving - 1], steps, prediction))
        if change is not None and steps == (change.at_steps or distill.start_steps):
            prediction = change.prediction
            stages.append(PlannedStage(len(stages) + 1, None, steps, steps, prediction))
    return stages


def stage_names(config: RunConfig, distill: DistillConfig) -> list[str]:
    """Folders of the stages that a chain trains, teacher first."""
    teacher = [] if distill.teacher else [stage_name(0, config.noise_schedule.steps)]
    return [*teacher, *(stage.name for stage in planned_stages(config, distill))]


def student_config(config: RunConfig, distill: DistillConfig, stage: PlannedStage, *, teacher: str) -> RunConfig:
    """The recipe of a stage. teacher: its folder, as seen from the stage's."""
    change = distill.head_change if stage.halving is None else None
    if change is not None:
        updates, learning_rate, turn_steps = change.updates, change.learning_rate, max(1, round(change.turn * change.updates))
        teacher_precision, stop_when = distill.teacher_precision or "fp32", None
    else:
        assert stage.halving is not None, "the only stage without a halving is the head's"
        updates, learning_rate = (_of_stage(values, stage.halving) for values in (distill.updates, distill.learning_rate))
        updates, turn_steps, teacher_precision, stop_when = int(updates), None, distill.teacher_precision, distill.stop_when
    objective = ProgressiveDistillationConfig(
        teacher=teacher,
        teacher_steps=stage.teacher_steps,
        student_steps=stage.steps,
        target=distill.target,
        sampler=distill.sampler,
        prediction=stage.prediction,
        turn_steps=turn_steps,
        loss=distill.loss,
        min_snr_gamma=distill.min_snr_gamma,
        clip_target=distill.clip_target or (change is not None and change.clip),
        stratified=distill.stratified,
        teacher_precision=teacher_precision,
        stop_when=stop_when,
        feature_weight=distill.feature_weight if stage.halving is not None and stage.halving > len(student_counts(distill)) - 2 else None,
    )
    every = distill.checkpoint_every_steps or config.checkpoint.every_steps
    warmup_steps = min(distill.lr_schedule.warmup_steps, updates // 5)
    return config.model_copy(
        update={
            "seed": stage_seed(config.seed, stage.number),
            "model": _begun(config.model),
            "data": config.stage_data,
            "objective": objective,
            "optim": config.optim.model_copy(update={"learning_rate": learning_rate}),
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
