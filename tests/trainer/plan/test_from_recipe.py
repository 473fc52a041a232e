"""Recipes as plans: what is trained, on how large images, and what stands beside it."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from trainer.config import RunConfig
from trainer.config_io import load_recipe, recipe_path
from trainer.plan.from_recipe import image_side, kept_checkpoints, plan_input
from trainer.plan.plan_input import Frozen, PlanInput
from trainer.plan.work import work_of
from trainer.tiny_models.make import make_tiny


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


@pytest.mark.parametrize(("name", "millions", "teachers"), [("ddpm_celebahq_cartoon", 113.673, 0), ("distill_cifar10_500", 35.746, 1)])
def test_the_papers_pixel_models_are_planned_without_their_weights(name: str, millions: float, teachers: int) -> None:
    plan = plan_input(load_recipe(recipe_path(name)), world_size=1, ranks_per_node=1, on_gpu=True)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in plan.build().parameters()) / 1e6 == pytest.approx(millions, abs=0.001)
    assert [part.name for part in plan.frozen] == ["teacher"] * teachers


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
    recipe = _recipe(*changes)
    assert kept_checkpoints(recipe, recipe.train.steps) == kept


def test_what_draws_the_pictures_stands_beside_it_unless_it_encodes_the_data(tmp_path: Path) -> None:
    decoder, prior = (make_tiny(kind, tmp_path / kind) for kind in ("kandinsky22_decoder", "kandinsky22_prior"))

    def plan(*changes: str) -> PlanInput:
        bases = (f"model.base={decoder}", f"model.prior={prior}")
        config = load_recipe(recipe_path("kandinsky22_decoder_cartoon_lora-tiny"), [*bases, *changes])
        return plan_input(config, world_size=1, ranks_per_node=1, on_gpu=False)

    def weights(source: PlanInput) -> dict[str, int]:
        return {model.name: model.parameters for model in (*source.frozen, *source.drawing)}

    whole = plan()
    parts = {part: sum(map(_numbers, (prior / part).glob("*.safetensors"))) for part in ("prior", "text_encoder", "image_encoder")}
    assert [model.name for model in whole.frozen] == ["movq", "image_encoder"]
    assert whole.drawing == (Frozen("prior's pipeline", parts["prior"] + parts["text_encoder"], precision="bf16"),)
    assert plan("logging.sample_every_steps=0").drawing == whole.variants["logging.sample_every_steps=0"](whole).drawing == ()
    stored = plan("model.latents=stored")
    assert sum(weights(stored).values()) == sum(weights(whole).values())
    assert weights(whole.variants["model.latents=stored"](whole)) == weights(stored)
    assert "logging.sample_every_steps=0" not in plan("logging.sample_every_steps=0").variants


def test_a_prior_without_a_decoder_draws_nothing(tmp_path: Path) -> None:
    prior = make_tiny("kandinsky22_prior", tmp_path / "prior")
    changes = [f"model.base={prior}", "model.decoder=null"]
    config = load_recipe(recipe_path("kandinsky22_prior_cartoon_lora-tiny"), changes)
    assert plan_input(config, world_size=1, ranks_per_node=1, on_gpu=False).drawing == ()


def _numbers(file: Path) -> int:
    with safe_open(file, "pt") as tensors:
        return sum(tensors.get_tensor(name).numel() for name in tensors.keys() if tensors.get_tensor(name).is_floating_point())  # noqa: SIM118
