"""Stock pixel models fine-tuned and halved: what a run makes of them, and what it writes down."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

from data_shards.files import read_json_object
from tests.trainer.stock_models import SIDE, recipe, run, write_stock
from tests.trainer.test_export import largest_difference, stock_images
from trainer.config import ProgressiveDistillationConfig, RunConfig
from trainer.config_io import load_recipe
from trainer.export import export_run, write_export
from trainer.hash import hash_run
from trainer.manifest import newest_checkpoint
from trainer.models.dropout import Dropout
from trainer.models.network import network
from trainer.sample import draw_images
from trainer.source import Source, load_source
from trainer.tasks.build import build_task
from trainer.tasks.task import Task

SHORT = 40
SHORT_SCHEDULE: Mapping[str, object] = {"kind": "linear", "steps": SHORT}
NOISY = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DDPM as google's of CIFAR-10: linear betas, eps, clipped, fixed_large."""
    return write_stock(tmp_path_factory.mktemp("stock") / "ddpm", variance_type="fixed_large")


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of 40 levels, so that all of them are soon drawn."""
    return write_stock(tmp_path_factory.mktemp("short") / "ddpm", variance_type="fixed_large", num_train_timesteps=SHORT)


@pytest.fixture(scope="module")
def tuned(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps from it, with everything that a recipe can ask of such a model."""
    root = tmp_path_factory.mktemp("tuned")
    train = {"activation_checkpointing": True, "memory_format": "channels_last"}
    model = {"kind": "ddpm", "base": str(short), "dropout": 0.1}
    config = recipe(root, short, model=model, train={"steps": 3, **train}, engine={"precision": "bf16"}, noise_schedule=SHORT_SCHEDULE)
    assert run(config, root / "run") == 0
    return root / "run"


def task_of(config: RunConfig, run_dir: Path, side: int = SIDE) -> Task:
    return build_task(config, run_dir, side)


def halving(
    root: Path, teacher: Path, base: Path, *, teacher_steps: int = 1000, levels: Mapping[str, object] | None = None, **objective: object
) -> RunConfig:
    student_steps = (teacher_steps + 1) // 2
    section = {"kind": "progressive_distillation", "teacher": str(teacher), "teacher_steps": teacher_steps, "student_steps": student_steps}
    return recipe(root, base, objective={**section, **objective}, noise_schedule=levels or {"kind": "base"})


def test_a_recipe_that_says_no_more_takes_what_the_base_says(tmp_path: Path, stock: Path) -> None:
    config = recipe(tmp_path, stock)
    assert (config.objective.kind, config.noise_schedule.kind) == ("denoising", "base")
    descriptor = task_of(config, tmp_path).descriptor
    assert descriptor == load_source(stock).descriptor


def test_the_first_weights_are_the_bases_and_all_learn(tmp_path: Path, stock: Path) -> None:
    task = task_of(recipe(tmp_path, stock, model={"kind": "ddpm", "base": str(stock), "dropout": 0.25}), tmp_path)
    with torch.no_grad():
        ours = network(task.module.eval())(NOISY, torch.full((4,), 7.0))
        assert torch.equal(ours, network(load_source(stock).model)(NOISY, torch.full((4,), 7.0)))
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in task.module.parameters())
    dropped = {module.probability for module in task.module.modules() if isinstance(module, Dropout)}
    assert 0.25 in dropped, "resnets drop what the recipe says"
    assert len(task.units) == 5 and task.flops_per_image > 0


def test_a_fine_tuned_pipeline_is_exported_as_the_base_was_and_draws_what_the_run_draws(short: Path, tuned: Path) -> None:
    export, source = export_run(tuned), load_source(tuned)
    assert read_json_object(export / "model_index.json")["_class_name"] == "DDPMPipeline"
    theirs, ours = (read_json_object(folder / "scheduler" / "scheduler_config.json") for folder in (short, export))
    assert ours == theirs and ours["timestep_spacing"] == "leading" and ours["variance_type"] == "fixed_large"
    assert source.descriptor.base == load_source(short).descriptor.base
    assert source.weights_sha256 != load_source(short).weights_sha256, "nothing was learned"
    again = load_source(export)
    assert again.weights_sha256 == source.weights_sha256 and again.descriptor == source.descriptor
    # all steps are the same on every spacing
    drawn = stock_images(DDPMPipeline.from_pretrained(export), SHORT)
    assert largest_difference(drawn, draw_images(source, steps=SHORT, seed=5, count=2)) <= 2
    card = (export / "README.md").read_text()
    assert "`ddpm`, fine-tuned, made with halfstep" in card and "Base (sha256)" in card


def test_neither_a_run_nor_its_export_needs_the_base_any_more(stock: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(stock, tmp_path / "base"))
    assert run(recipe(tmp_path, base), tmp_path / "run") == 0
    shutil.rmtree(base)
    source = load_source(tmp_path / "run")
    export = Path(shutil.move(write_export(source, tmp_path / "export"), tmp_path / "elsewhere"))
    assert str(tmp_path) not in (export / "recipe.yaml").read_text()
    assert load_source(export).weights_sha256 == source.weights_sha256


def test_a_stopped_run_goes_on_to_the_same_bits(tuned: Path, tmp_path: Path) -> None:
    config = load_recipe(tuned / "recipe.yaml")
    shards = {"shards": str(tuned.parent / "shards")}
    config = config.model_copy(update={"data": config.data.model_copy(update=shards)})
    first = config.model_copy(update={"train": config.train.model_copy(update={"stop_after_steps": 2})})
    assert run(first, tmp_path / "run") == 75
    assert run(config, tmp_path / "run") == 0
    assert hash_run(tmp_path / "run") == hash_run(tuned)


def test_another_base_does_not_go_on_with_a_run(tuned: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(tuned, tmp_path / "run"))
    other = write_stock(tmp_path / "other", seed=1, variance_type="fixed_large", num_train_timesteps=SHORT)
    config = load_recipe(run_dir / "recipe.yaml")
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"shards": str(tuned.parent / "shards")}),
            "model": config.model.model_copy(update={"base": str(other)}),
            "train": config.train.model_copy(update={"steps": 4}),
        }
    )
    with pytest.raises(ValueError, match=r"was made with another teacher, base or schedule: base: "):
        run(config, run_dir)


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"objective": {"prediction": "v"}}, "objective.prediction=v: the base predicts eps; set objective.prediction=base"),
        ({"noise_schedule": {"kind": "cosine"}}, "noise_schedule.kind=cosine: has 1000 levels .* the base was trained on 1000"),
        ({"noise_schedule": {"kind": "linear", "steps": 500}}, "noise_schedule.kind=linear: has 500 levels"),
    ],
)
def test_a_recipe_that_contradicts_the_base_is_refused(
    tmp_path: Path, stock: Path, sections: Mapping[str, Mapping[str, object]], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        task_of(recipe(tmp_path, stock, **sections), tmp_path)


def test_a_recipe_may_say_what_the_base_says(tmp_path: Path, stock: Path) -> None:
    config = recipe(tmp_path, stock, objective={"kind": "denoising", "prediction": "eps"}, noise_schedule={"kind": "linear"})
    assert task_of(config, tmp_path).descriptor == load_source(stock).descriptor


def test_images_of_another_size_are_taken_if_the_levels_can_halve_them(tmp_path: Path, stock: Path) -> None:
    assert task_of(recipe(tmp_path, stock), tmp_path, 8).descriptor.to_json()["image_size"] == 8
    with pytest.raises(ValueError, match=r"image size 9 cannot be halved 1 times for the base's 2 levels; .* such as its own 16"):
        task_of(recipe(tmp_path, stock), tmp_path, 9)


def test_a_base_of_other_than_a_thousand_levels_wants_them_spelled_out(tmp_path: Path, short: Path) -> None:
    with pytest.raises(ValueError, match=r"noise_schedule.kind=base: means 1000 levels, the base has 40"):
        task_of(recipe(tmp_path, short), tmp_path)
    timesteps = task_of(recipe(tmp_path, short, noise_schedule=SHORT_SCHEDULE), tmp_path).descriptor.to_json()["timesteps"]
    assert timesteps == list(range(SHORT))


@pytest.mark.parametrize("teacher_steps", [1000, 250, 63])
@pytest.mark.parametrize("target", ["ddim", "ancestral"])
def test_a_student_at_update_0_is_its_teachers_function(tmp_path: Path, stock: Path, teacher_steps: int, target: str) -> None:
    task = task_of(halving(tmp_path, stock, stock, teacher_steps=teacher_steps, target=target, sampler=target), tmp_path)
    teacher, descriptor = load_source(stock), task.descriptor.to_json()
    timesteps = descriptor["timesteps"]
    assert isinstance(timesteps, list) and timesteps[-1] == 999 and len(timesteps) == (teacher_steps + 1) // 2
    asked = torch.tensor([timesteps[0], timesteps[len(timesteps) // 2], timesteps[-2], timesteps[-1]], dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(network(task.module.eval())(NOISY, asked), network(teacher.model)(NOISY, asked))
    assert (descriptor["prediction_type"], descriptor["variance"], descriptor["clip"]) == ("eps", "fixed_large", True)
    assert (descriptor["teacher_sha256"], descriptor["sampler"]) == (teacher.weights_sha256, target)
    assert descriptor["alpha_bar_sha256"] == teacher.descriptor.alpha_bar_sha256


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_a_student_trains_from_a_stock_teacher_and_its_export_draws_the_same(tmp_path: Path, stock: Path, sampler: str) -> None:
    config = halving(tmp_path, stock, stock, teacher_steps=32, target=sampler, sampler=sampler)
    assert run(config, tmp_path / "run") == 0
    source = load_source(tmp_path / "run")
    assert source.descriptor.step_count == 16 and source.descriptor.teacher_sha256 == load_source(stock).weights_sha256
    export = write_export(source, tmp_path / "export")
    pipeline = DDIMPipeline if sampler == "ddim" else DDPMPipeline
    assert largest_difference(stock_images(pipeline.from_pretrained(export), 16), draw_images(source, steps=16, seed=5, count=2)) <= 2
    again = load_source(export)
    assert again.descriptor == source.descriptor
    assert np.array_equal(draw_images(again, steps=4, seed=1, count=1), draw_images(source, steps=4, seed=1, count=1))
    assert "whose first teacher was made from `ddpm`" in (export / "README.md").read_text()


def test_a_fine_tuned_models_student_knows_the_base_still(tmp_path: Path, short: Path, tuned: Path) -> None:
    config = halving(tmp_path, tuned, short, teacher_steps=10, levels=SHORT_SCHEDULE)
    assert isinstance(config.objective, ProgressiveDistillationConfig) and config.objective.prediction == "base"
    descriptor = task_of(config, tmp_path).descriptor.to_json()
    assert descriptor["base"] == load_source(short).descriptor.to_json()["base"]
    assert descriptor["teacher_sha256"] == load_source(tuned).weights_sha256


def test_a_teacher_of_another_kind_is_refused(tmp_path: Path, stock: Path) -> None:
    config = halving(tmp_path, stock, stock, prediction="eps")
    values = config.model_dump() | {"model": {"kind": "tiny_unet"}, "noise_schedule": {"kind": "linear"}}
    with pytest.raises(ValueError, match=r"objective.teacher=.* is of model.kind=ddpm, not tiny_unet; set model.kind=ddpm"):
        task_of(RunConfig.model_validate(values), tmp_path)


def test_a_checkpoints_descriptor_holds_the_base(tuned: Path, short: Path) -> None:
    checkpoint = newest_checkpoint(tuned)
    assert checkpoint is not None
    base = json.loads((checkpoint.path / "manifest.json").read_text())["descriptor"]["base"]
    assert base["scheduler"]["variance_type"] == "fixed_large" and base["unet"]["norm_eps"] == 1e-6
    source: Source = load_source(short)
    assert source.descriptor.base is not None and base["sha256"] == source.descriptor.base.sha256
