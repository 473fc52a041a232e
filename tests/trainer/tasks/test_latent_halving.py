"""Latent students: guidance folded in, and what they start as."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.trainer.latents.finished_runs import Bases, write_run
from tests.trainer.tasks.latent_steps import recipe, start
from trainer.config import RunConfig
from trainer.latents.finished import build_pipeline, load_finished
from trainer.tasks.latent_halving import guided

MODEL = {"kind": "latent_base", "channels": [32], "attention": [True], "text_width": 32, "text_layers": 1, "frozen_precision": "fp32"}


def student_recipe(shards: Path, autoencoder: Path, teacher: Path, **halving: object) -> RunConfig:
    """Of a student of 4 steps."""
    settings = {"teacher": str(teacher), "teacher_steps": 8, "student_steps": 4, "guidance_scale": 3.0, **halving}
    return recipe(
        shards,
        {**MODEL, "autoencoder": str(autoencoder)},
        objective={"prediction": "v", "halving": settings},
        logging={"sample_steps": settings["student_steps"]},
        validation={"guidance_scale": 1.0},
        optim={"learning_rate": 5e-4, "weight_decay": 0.0},
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, bases: Bases, faces: Path) -> Path:
    """A run with random weights."""
    config = recipe(faces, {**MODEL, "autoencoder": str(bases("autoencoder"))}, objective={"prediction": "v", "caption_dropout": 0.1})
    return write_run(tmp_path_factory.mktemp("latent") / "teacher", config, moved=0.1)


def test_guidance_moves_a_prediction_away_from_that_without_text_in_one_call() -> None:
    asked: list[int] = []

    def predict(x_t: Tensor, timestep: Tensor, cond: dict[str, Tensor]) -> Tensor:
        asked.append(len(x_t))
        return x_t * cond["text"].view(-1, 1, 1, 1) + timestep.view(-1, 1, 1, 1) + cond["time_ids"].view(-1, 1, 1, 1)

    x_t, timestep = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 2.0, 3.0])
    cond = {"text": torch.tensor([2.0, 3.0, 4.0]), "time_ids": torch.tensor([5.0, 6.0, 7.0])}
    empty = {"text": torch.tensor([0.5]), "time_ids": torch.tensor([100.0])}
    with_text, without = predict(x_t, timestep, cond), predict(x_t, timestep, {**cond, "text": torch.tensor([0.5] * 3)})
    asked.clear()
    torch.testing.assert_close(guided(predict, cond, empty, scale=3.0)(x_t, timestep), without + 3 * (with_text - without))
    assert torch.equal(guided(predict, cond, {}, scale=1.0)(x_t, timestep), with_text)
    assert asked == [6, 3]


def test_a_student_starts_as_its_teacher_without_guidance_and_learns_the_guidance(
    teacher: Path, bases: Bases, faces: Path, tmp_path: Path
) -> None:
    steps = start(student_recipe(faces, bases("autoencoder"), teacher), tmp_path)
    theirs = load_finished(teacher)
    own = steps.task.module.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in theirs.trained.module.state_dict().items())
    batches = steps.batches(1)
    fixed = steps.task.micro_batch(batches[0, 0], 0, 0).loss
    before = fixed(steps.engine.raw()).mean().item()
    for step in range(8):
        steps.take(step, {(step, index): batches[0, index] for index in range(2)})
    unguided = start(student_recipe(faces, bases("autoencoder"), teacher, guidance_scale=1.0), tmp_path)
    plain = unguided.task.micro_batch(batches[0, 0], 0, 0).loss(unguided.engine.raw()).mean().item()
    assert before > 1.2 * plain, "what is to learn is the guidance above all"
    assert fixed(steps.engine.raw()).mean().item() < before
    meaning = steps.task.descriptor.to_json()["halving"]
    assert meaning == f"8 to 4 trailing DDIM steps, guidance 3 folded in, teacher {theirs.weights_sha256}"
    assert "halving" not in load_finished(teacher).meaning


def test_a_students_pipeline_takes_its_own_steps_and_ends_with_a_clean_latent(
    teacher: Path, bases: Bases, faces: Path, tmp_path: Path
) -> None:
    config = student_recipe(faces, bases("autoencoder"), teacher)
    pipeline = build_pipeline(load_finished(write_run(tmp_path / "student", config)))
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert float(scheduler.final_alpha_cumprod) == 1.0 and scheduler.config["prediction_type"] == "v_prediction"


def test_a_students_student_wants_its_teachers_steps_and_no_more_guidance(teacher: Path, bases: Bases, faces: Path, tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", student_recipe(faces, bases("autoencoder"), teacher))
    halving = {"teacher_steps": 4, "student_steps": 2}
    assert start(student_recipe(faces, bases("autoencoder"), first, guidance_scale=1.0, **halving), tmp_path).task.flops_per_image > 0
    with pytest.raises(ValueError, match=r"is a student of 4 steps with guidance folded in; set objective\.halving\.teacher_steps=4"):
        start(student_recipe(faces, bases("autoencoder"), first, guidance_scale=2.0, **halving), tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"student_steps": 3}, r"3 steps are no half, quarter, eighth \.\.\. of teacher_steps=8"),
        ({"teacher_steps": 16, "student_steps": 8}, r"16 steps do not divide the 1000 noise levels"),
    ],
)
def test_a_student_that_cannot_be_says_why(changed: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        student_recipe(tmp_path, tmp_path, tmp_path, **changed)


def test_a_teacher_of_another_shape_is_refused(teacher: Path, bases: Bases, faces: Path, tmp_path: Path) -> None:
    config = student_recipe(faces, bases("autoencoder"), teacher)
    other = config.model_copy(update={"model": config.model.model_copy(update={"text_layers": 2})})
    with pytest.raises(ValueError, match=r"model is .* but the teacher .* was trained with"):
        start(other, tmp_path)
