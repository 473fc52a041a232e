"""What halvings cost, counted in optimizer steps, network calls on images and time."""

from typing import Any

import pytest

from trainer.config import RunConfig
from trainer.report.cost import Cost, cost_section, evaluations_per_update
from trainer.report.subject import Stage, Subject


def recipe(batch: int, **objective: Any) -> RunConfig:
    values = {"data": {"shards": "x", "global_batch_size": batch, "micro_batch_size": 1}, "model": {"kind": "tiny_unet"}}
    return RunConfig.model_validate({**values, "objective": objective, "train": {"steps": 1}})


def halving(teacher: int, student: int, **more: Any) -> RunConfig:
    return recipe(8, kind="progressive_distillation", teacher="t", teacher_steps=teacher, student_steps=student, **more)


@pytest.mark.parametrize(
    ("config", "forwards"),
    [
        (recipe(8, kind="denoising"), 1),
        (halving(32, 16), 3),
        (halving(125, 63), 3),
        (halving(32, 8), 5),
        (halving(250, 250, turn_steps=3), 2),
    ],
)
def test_forwards_are_counted_by_image(config: RunConfig, forwards: int) -> None:
    assert evaluations_per_update(config) == 8 * forwards


def stage(title: str, steps: int, seconds: float, evaluations: int) -> Stage:
    ones = (1.0,) * steps
    return Stage("run", title, steps, tuple(range(steps)), ones, ones, (seconds,) * steps, ones, evaluations)


def test_a_chain_is_weighed_against_its_teachers_training() -> None:
    stages = (stage("Teacher", 10, 1.0, 32), stage("Student of 4 steps", 4, 2.0, 48), stage("Student of 2 steps", 2, 3.0, 48))
    assert Cost.of(stages[1:]) == Cost(6, 288, 14.0)
    text = cost_section(Subject("chain", "", stages=stages))
    assert all(f"<td>{ratio}</td>" in text for ratio in ("0.60", "0.90", "1.40")) and "2 stages of halving" in text


def test_nothing_is_said_of_a_teacher_from_elsewhere_or_of_unknown_costs() -> None:
    assert cost_section(Subject("chain", "", stages=(stage("Student of 4 steps", 4, 2.0, 48),))) == ""
    assert cost_section(Subject("chain", "", stages=(stage("Teacher", 10, 1.0, 0), stage("Student of 4 steps", 4, 2.0, 48)))) == ""
