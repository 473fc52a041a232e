"""Exports of autoencoders: stock diffusers loads them, scaled by the latents of their own training images."""

import contextlib
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from tests.trainer.latents.finished_runs import drawn, recipe, write_run
from trainer.config import AutoencoderConfig
from trainer.config_io import dump_yaml, load_recipe
from trainer.export import export_job, export_run
from trainer.export_folder import exported_checkpoint
from trainer.manifest import newest_checkpoint
from trainer.sample import sample_job
from trainer.save import write_checkpoint
from trainer.tasks.autoencoder import AutoencoderMeaning, new_autoencoder
from trainer.training_data import TrainingData

SIDE = 32
AT_STEP = 7


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its shards beside its recipe."""
    folder = tmp_path_factory.mktemp("autoencoder") / "run"
    pack(FacesSource("open-peeps", 12), folder / "shards", size=SIDE)
    model = {"kind": "autoencoder", "channels": [8, 16], "norm_groups": 4}
    data = {"shards": "shards", "global_batch_size": 4, "micro_batch_size": 2}
    config = recipe(model, data=data, objective={"kind": "autoencoding"}, noise_schedule={"kind": "scaled_linear"})
    assert isinstance(config.model, AutoencoderConfig)
    (folder / "recipe.yaml").write_text(dump_yaml(config))
    weights = new_autoencoder(config, config.model, SIDE).state_dict()
    parts = {"model": {name: tensor + 1 for name, tensor in weights.items()}, "ema": weights}
    meaning = AutoencoderMeaning("autoencoder", 4, SIDE).to_json()
    write_checkpoint(folder, AT_STEP, parts=parts, facts={"descriptor": meaning, "ema_decays": [0.995]})
    return folder


def test_an_autoencoder_is_a_stock_one_whose_scaled_latents_have_a_deviation_of_one(run_dir: Path, tmp_path: Path) -> None:
    folder, checkpoint = export_run(run_dir), newest_checkpoint(run_dir)
    assert checkpoint is not None and exported_checkpoint(folder) == checkpoint.sha256
    vae = AutoencoderKL.from_pretrained(folder)
    assert all(torch.isfinite(weight).all() for weight in vae.state_dict().values())
    batches = TrainingData.open(load_recipe(run_dir / "recipe.yaml"), run_dir).batches(0, 3, range(2), pin=False)
    images = torch.cat([batch.images for batch in batches]) / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist  # pyright: ignore[reportAttributeAccessIssue] (a tuple only where it is asked for)
    scaled = posterior.sample(torch.Generator().manual_seed(0)) * vae.config["scaling_factor"]
    assert 0.97 < float(scaled.std()) < 1.03
    card = (folder / "README.md").read_text()
    assert "12 of 32 x 32 pixels" in card and "license: cc0-1.0" in card
    code = card.split("```python\n")[1].split("```")[0]
    names: dict[str, torch.Tensor] = {}
    with contextlib.chdir(run_dir):
        exec(compile(code, "README.md", "exec"), names)  # noqa: S102 (the card's own lines)
    assert names["back"].shape == (1, 3, SIDE, SIDE)


def test_a_latent_model_stands_on_it(run_dir: Path, tmp_path: Path) -> None:
    model = {
        "kind": "latent_base",
        "autoencoder": str(export_run(run_dir)),
        "channels": [32, 32],
        "attention": [False, True],
        "text_width": 32,
        "text_layers": 1,
    }
    latent = write_run(tmp_path / "latent", recipe(model, noise_schedule={"kind": "scaled_linear"}))
    assert drawn(latent, {"prompts": ["a woman"], "images": 1, "steps": 1}).shape == (1, 64, 64, 3)


def test_it_draws_nothing_itself_and_has_no_adapter(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.kind=autoencoder does not denoise latents"):
        sample_job(run_dir, {"prompts": ["x"]})
    with pytest.raises(ValueError, match="without an adapter"):
        export_job(run_dir, {"merged": True, "out": str(tmp_path / "merged")})
