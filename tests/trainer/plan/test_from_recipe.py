"""Recipes as plans: what is trained, on how large images, and what stands beside it."""

from pathlib import Path

import pytest

from trainer.config import RunConfig
from trainer.config_io import load_recipe, recipe_path
from trainer.plan.from_recipe import image_side, kept_checkpoints, plan_input
from trainer.plan.work import work_of


def _recipe(*changes: str) -> RunConfig:
    return load_recipe(recipe_path("smoke"), changes)


def test_a_pixel_model_is_planned_as_it_is_trained() -> None:
    plan = plan_input(_recipe("train.activation_checkpointing=true"), world_size=2, ranks_per_node=2, on_gpu=False)
    assert (plan.shapes.x_t, plan.micro_batch_size, plan.accumulation) == ((3, 16, 16), 4, 2)
    assert plan.activation_checkpointing
    assert work_of(plan).trained == sum(parameter.numel() for parameter in plan.build().parameters())


def test_a_halving_has_its_teacher_beside_it() -> None:
    objective = "objective={kind: progressive_distillation, teacher: runs/teacher, teacher_steps: 8, student_steps: 4}"
    plan = plan_input(_recipe(objective), world_size=1, ranks_per_node=1, on_gpu=False)
    [teacher] = plan.frozen
    work = work_of(plan)
    assert (teacher.name, teacher.parameters, teacher.flops_per_image) == ("teacher", work.trained, 2 * work.forward_flops)


def test_shards_that_are_not_there_ask_for_the_size_of_their_images(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(ValueError, match=r"nowhere: not there, so its images' size is not known; set data\.image_size"):
        image_side(_recipe("data.faces=null", f"data.shards={missing}"))
    assert image_side(_recipe("data.faces=null", f"data.shards={missing}", "data.image_size=64")) == 64


@pytest.mark.parametrize(
    ("changes", "kept"),
    [([], 2), (["train.steps=20"], 1), (["checkpoint.keep_best=1"], 3), (["checkpoint.keep_every_steps=20", "train.steps=200"], 10)],
)
def test_checkpoints_on_the_disk_are_those_that_retention_keeps(changes: list[str], kept: int) -> None:
    assert kept_checkpoints(_recipe(*changes)) == kept
