"""An autoencoder's run: its loss by place alone, its first steps, its pictures, and the sizes that it refuses."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.trainer.tasks.latent_steps import SIDE, Steps, recipe, start
from trainer.config import AutoencoderConfig, RunConfig
from trainer.tasks.autoencoder import new_autoencoder


def _config(faces: Path) -> RunConfig:
    model = {"kind": "autoencoder", "channels": [8, 16], "norm_groups": 4}
    values = recipe(faces, {"kind": "stable_diffusion"}).model_dump(mode="json", include={"data", "train", "optim", "logging"})
    values["optim"]["weight_decay"] = 0.0
    values["data"]["horizontal_flip"] = True
    return RunConfig.model_validate({**values, "model": model})


@pytest.fixture(scope="module")
def run(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    return start(_config(faces), tmp_path_factory.mktemp("autoencoder"))


def test_the_loss_depends_on_the_place_alone_and_falls(run: Steps) -> None:
    batches = run.batches(8)

    def loss(step: int, index: int) -> Tensor:
        with torch.no_grad():
            return run.task.micro_batch(batches[step, index], step, index).loss(run.engine.raw())

    first = loss(2, 1)
    assert first.shape == (2,) and not torch.equal(loss(2, 0), first)
    assert torch.equal(loss(2, 1), first)
    for step in range(8):
        assert run.take(step, batches).outcome == "applied"
    assert run.results[-1].loss < run.results[0].loss and bool((loss(2, 1) < first).all())


def test_the_sheet_shows_images_above_what_comes_back(run: Steps) -> None:
    assert run.task.draw is not None
    drawn = run.task.draw(run.engine.raw(), 3)
    assert drawn.picture.size[0] >= SIDE and drawn.picture.size[1] >= 2 * SIDE


def test_weights_follow_the_seed_and_images_that_cannot_be_halved_are_refused(faces: Path) -> None:
    config = _config(faces)
    assert isinstance(config.model, AutoencoderConfig)
    first, second = (new_autoencoder(config, config.model, SIDE).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match=r"63"):
        new_autoencoder(config, config.model, 63)
