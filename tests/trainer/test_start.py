"""Fine-tuning begins with another run's averaged weights, which the descriptor names; what does not fit is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from trainer.config import DataConfig, DenoisingConfig, LinearNoiseSchedule, MixtureSource, RunConfig, TinyUNetConfig, identity
from trainer.config_io import load_recipe
from trainer.descriptor import Descriptor, difference
from trainer.export import portable_recipe
from trainer.source import load_source
from trainer.tasks.pixel import build_pixel_task
from trainer.tasks.task import Task

WriteRun = Callable[..., Path]


def built(config: RunConfig, run_dir: Path) -> Task:
    assert isinstance(config.model, TinyUNetConfig)
    return build_pixel_task(config, run_dir, config.model, 8)


def starting_at(run_dir: Path, **changes: object) -> RunConfig:
    """The recipe of a run with `run_dir` as its start."""
    config = load_recipe(run_dir / "recipe.yaml")
    return config.model_copy(update={"model": config.model.model_copy(update={"start": str(run_dir)}), **changes})


def test_the_first_weights_are_the_averaged_ones_of_the_other_run(write_run: WriteRun, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other")
    source, task = load_source(other), built(starting_at(other), tmp_path / "run")
    weights = source.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in task.module.state_dict().items())
    assert all(parameter.requires_grad for parameter in task.module.parameters())
    assert isinstance(task.descriptor, Descriptor) and task.descriptor.start_sha256 == source.weights_sha256
    assert Descriptor.from_json(task.descriptor.to_json()) == task.descriptor


def test_a_resume_from_another_start_or_from_none_is_another_run(write_run: WriteRun, tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second", seed=1)
    random = built(load_recipe(first / "recipe.yaml"), tmp_path).descriptor.to_json()
    begun = [built(starting_at(start), tmp_path).descriptor.to_json() for start in (first, second)]
    assert "start_sha256" not in random, "checkpoints from before there was a start go on"
    assert "start_sha256" in difference(begun[0], begun[1]) and not difference(begun[0], begun[0])
    assert "start_sha256" in difference(random, begun[0]) and "start_sha256" in difference(begun[0], random)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"objective": DenoisingConfig(prediction="eps")},
            r"its objective.prediction is v, this recipe's eps; fine-tune with the sections",
        ),
        ({"noise_schedule": LinearNoiseSchedule()}, r"its noise_schedule \(sha256 of its levels\) is [0-9a-f]{64}, this recipe's"),
    ],
)
def test_a_start_that_means_something_else_is_refused(write_run: WriteRun, tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        built(starting_at(write_run(tmp_path / "other"), **changes), tmp_path / "run")


def test_a_start_of_another_shape_is_refused(write_run: WriteRun, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other")
    config = starting_at(other)
    wider = config.model_copy(update={"model": config.model.model_copy(update={"channels": (16, 16)})})
    with pytest.raises(ValueError, match=r"its weight conv_in.bias is \(8,\), this recipe's model section makes \(16,\); take the model"):
        built(wider, tmp_path / "run")


def test_a_student_is_no_start(write_run: WriteRun, tmp_path: Path) -> None:
    student = write_run(tmp_path / "student", student_steps=8)
    with pytest.raises(ValueError, match="its noise levels is 8, this recipe's 1000"):
        built(starting_at(student, objective=DenoisingConfig()), tmp_path / "run")


def test_the_path_of_a_start_is_no_identity_and_is_not_handed_on(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"data": {"shards": "x"}, "train": {"steps": 1}})
    moved = config.model_copy(update={"model": TinyUNetConfig(start=str(tmp_path / "teachers" / "a"))})
    assert identity(moved) == identity(config)
    shown = portable_recipe(moved).model
    assert isinstance(shown, TinyUNetConfig) and shown.start == "a"


def test_a_role_is_a_label_and_a_mixture_is_one() -> None:
    config = RunConfig.model_validate({"data": {"shards": "x", "role": "source"}, "train": {"steps": 1}})
    assert identity(config) == identity(config.model_copy(update={"data": DataConfig(shards="x")}))
    with pytest.raises(ValidationError, match=r"data.role=mixture, but data.mixture is empty; list the source's shards"):
        DataConfig(shards="x", role="mixture")
    DataConfig(mixture=(MixtureSource(shards="a"), MixtureSource(shards="b")), role="mixture")
    with pytest.raises(ValidationError, match="'source', 'finetune', 'mixture' or 'teacher_samples'"):
        DataConfig.model_validate({"shards": "x", "role": "other"})
