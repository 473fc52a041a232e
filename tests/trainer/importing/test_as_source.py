"""What was imported is a source like any stock pipeline: its levels, its sampler and its function are those of the program it came from."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.trainer.importing.sources import OpenAI, Pesser, Weights
from trainer.diffusion.schedule import alpha_bar_of_betas, cosine_betas, linear_betas
from trainer.import_checkpoint import import_job
from trainer.source import Source, load_source

PESSER = Pesser(width=32, multipliers=(1, 2, 2, 2), layers=1, attends=frozenset({1}))
IMPROVED = OpenAI(width=32, multipliers=(1, 2, 2, 2), layers=1, attends=frozenset({1, 2}), heads=4, resample=False)


def loaded(folder: Path, tensors: dict[str, Tensor], **options: object) -> Source:
    torch.save(tensors, folder / "model.pt")
    assert import_job(folder / "model.pt", {"out": str(folder / "imported"), **options}) == 0
    return load_source(folder / "imported")


def test_pessers_model_is_a_source_of_1000_linear_levels(tmp_path: Path) -> None:
    weights, x = Weights(), torch.randn((1, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    wanted = PESSER(weights, x, torch.tensor([500]))
    source = loaded(tmp_path, weights.tensors, family="pesser")
    descriptor = source.descriptor
    assert (descriptor.prediction_type, descriptor.sampler, descriptor.variance, descriptor.clip) == (
        "eps",
        "ancestral",
        "fixed_large",
        True,
    )
    assert (descriptor.image_size, descriptor.step_count) == (32, 1000)
    assert torch.allclose(source.alpha_bar, alpha_bar_of_betas(linear_betas(1e-4, 0.02, steps=1000)), rtol=1e-12, atol=0)
    with torch.no_grad():
        assert (source.model(x, torch.tensor([500])).sample - wanted).abs().max() < 1e-5


def test_improved_diffusions_model_is_a_source_once_its_variance_is_left_out(tmp_path: Path) -> None:
    weights, x = Weights(), torch.randn((1, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    wanted = IMPROVED(weights, x, torch.tensor([500.75]))[:, :3]
    source = loaded(tmp_path, weights.tensors, family="improved-diffusion", eps_only=True)
    assert torch.allclose(source.alpha_bar, alpha_bar_of_betas(cosine_betas(4000))[3::4], rtol=1e-6, atol=0)
    with torch.no_grad():
        assert (source.model(x, torch.tensor([500])).sample - wanted).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"out_channels is 6"):
        (tmp_path / "again").mkdir()
        loaded(tmp_path / "again", weights.tensors, family="improved-diffusion")
