"""pesser's checkpoints become stock pipelines that compute the same, or are refused by name."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from tests.trainer.importing.sources import Pesser, Weights
from trainer.import_checkpoint import import_job
from trainer.importing.pesser import read_pesser
from trainer.importing.pipeline import read_model

CIFAR10 = Pesser(width=128, multipliers=(1, 2, 2, 2), layers=2, attends=frozenset({1}))
LSUN = Pesser(width=128, multipliers=(1, 1, 2, 2, 4, 4), layers=2, attends=frozenset({4}))
SMALL = Pesser(width=32, multipliers=(1, 2, 2, 2), layers=2, attends=frozenset({1}))


def checkpoint(source: Pesser, *, side: int, device: str = "cpu") -> tuple[Weights, Tensor, Tensor, Tensor]:
    """Random weights, a batch of two, its times, and what the source makes of it."""
    weights = Weights(device=device)
    x = torch.randn((2, 3, side, side), generator=torch.Generator().manual_seed(1)).to(device)
    times = torch.tensor([7, 961], device=device)
    return weights, x, times, source(weights, x, times)


def imported(path: Path, out: Path, tensors: dict[str, Tensor], **options: object) -> DDPMPipeline:
    torch.save(tensors, path)
    assert import_job(path, {"family": "pesser", "out": str(out), **options}) == 0
    return DDPMPipeline.from_pretrained(out)


@pytest.mark.parametrize(
    ("source", "side"),
    [
        (SMALL, 32),
        (Pesser(width=64, multipliers=(1, 1, 3), layers=1, attends=frozenset({0, 2})), 16),
        (Pesser(width=32, multipliers=(1, 1, 2, 2, 4, 4), layers=1, attends=frozenset()), 64),
        (Pesser(width=64, multipliers=(1,), layers=3, attends=frozenset({0})), 8),
    ],
)
def test_a_small_model_computes_the_same(tmp_path: Path, source: Pesser, side: int) -> None:
    weights, x, times, wanted = checkpoint(source, side=side)
    pipeline = imported(tmp_path / "model.ckpt", tmp_path / "out", weights.tensors, image_size=side)
    assert pipeline.unet.config["sample_size"] == side
    with torch.no_grad():
        assert (pipeline.unet(x, times).sample - wanted).abs().max() < 1e-5
    assert wanted.std() > 0.1, "a source that puts out nothing proves nothing"


def test_the_true_cifar10_model_computes_the_same_and_is_known_by_its_levels(tmp_path: Path) -> None:
    weights, x, times, wanted = checkpoint(CIFAR10, side=32)
    pipeline = imported(tmp_path / "model-790000.ckpt", tmp_path / "cifar10", weights.tensors)
    assert isinstance(pipeline.unet, UNet2DModel) and isinstance(pipeline.scheduler, DDPMScheduler)
    assert sum(weight.numel() for weight in pipeline.unet.parameters()) == 35_746_307
    with torch.no_grad():
        assert (pipeline.unet(x, times).sample - wanted).abs().max() < 1e-5
    assert pipeline.unet.config["sample_size"] == 32 and pipeline.scheduler.config["variance_type"] == "fixed_large"
    said = json.loads((tmp_path / "cifar10" / "import.json").read_text())
    assert said["file"] == "model-790000.ckpt" and said["assumed"] == {"variance": "fixed_large"} and len(said["sha256"]) == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar10", "model-790000.ckpt"], "nothing half written is left"


def test_an_lsun_model_of_true_shape_is_known_by_its_levels() -> None:
    weights, *_ = checkpoint(LSUN, side=64, device="meta")
    model = read_pesser(weights.tensors, {})
    assert model.image_size == 256 and model.settings.variance == "fixed_small"
    assert sum(weight.numel() for weight in model.unet.parameters()) == 113_673_219
    assert model.unet.config["down_block_types"] == (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D")


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_its_ancestral_step_is_pessers(tmp_path: Path, variance: str) -> None:
    """Against diffusion.py's denoising_step: clean image from eps, clipped; posterior mean; no noise in the last step."""
    weights, x, *_ = checkpoint(SMALL, side=32)
    scheduler = imported(tmp_path / "model.ckpt", tmp_path / "out", weights.tensors, variance=variance).scheduler
    assert isinstance(scheduler, DDPMScheduler)
    scheduler.set_timesteps(1000)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    now = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), now[:-1]])
    spread = betas if variance == "fixed_large" else betas * (1 - before) / (1 - now)
    eps, noise = (torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3))
    for t in (999, 998, 500, 1, 0):
        clean = ((x - (1 - now[t]).sqrt() * eps) / now[t].sqrt()).clamp(-1, 1)
        mean = betas[t] * before[t].sqrt() / (1 - now[t]) * clean + (1 - before[t]) * (1 - betas[t]).sqrt() / (1 - now[t]) * x
        wanted = mean + (spread[t].sqrt() * noise if t else 0)
        got = scheduler.step(eps, t, x, generator=torch.Generator().manual_seed(3)).prev_sample  # pyright: ignore[reportAttributeAccessIssue]
        assert (got - wanted).abs().max() < 1e-4
    assert [int(t) for t in scheduler.timesteps] == list(range(999, -1, -1))


def test_what_is_missing_left_over_or_misshapen_is_named() -> None:
    weights, *_ = checkpoint(SMALL, side=32, device="meta")
    tensors = weights.tensors
    without = {name: tensor for name, tensor in tensors.items() if name != "mid.attn_1.k.bias"}
    more = tensors | {"discriminator.weight": torch.ones(1), "up.0.attn.7.q.weight": torch.ones(1)}
    wide = tensors | {"up.3.block.0.conv1.weight": torch.empty(64, 96, 3, 3, device="meta")}
    integers = tensors | {"conv_in.bias": torch.ones(32, dtype=torch.int64)}
    odd = {name.replace("down.1.attn.1", "down.1.attn.5"): tensor for name, tensor in tensors.items()}
    for changed, reason in (
        (without, r"^m.ckpt, as pesser: it lacks mid.attn_1.k.bias$"),
        (more, r"^m.ckpt, as pesser: it has left over discriminator.weight, up.0.attn.7.q.weight$"),
        (wide, r"up.3.block.0.conv1.weight has shape \(64, 96, 3, 3\), the other tensors make it \(64, 128, 3, 3\)"),
        (integers, r"conv_in.bias is of torch.int64 and torch.strided, wanted plain floating-point weights"),
        (odd, r"it lacks down.1.attn.1.k.bias, .* and 6 more; it has left over down.1.attn.5.k.bias, .* and 6 more"),
        ({"temb.dense.0.weight": torch.ones(1)}, r"^m.ckpt, as pesser: it lacks down.0.block.0.conv1.weight"),
        (tensors | {"conv_out.weight": torch.empty(6, 32, 3, 3)}, r"it takes 3 channels and gives 6, wanted as many"),
        (tensors | {"down.0.block.0.conv1.weight": torch.empty(0, 32, 3, 3)}, r"it has a level of 0 channels"),
        (tensors | {"down.0.block.0.conv1.weight": torch.tensor(1.0)}, r"conv1.weight has shape \(\), wanted 1 dimensions or more"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_model(changed, family="pesser", given={}, where="m.ckpt")


def test_a_width_or_size_that_cannot_be_is_refused() -> None:
    weights, *_ = checkpoint(Pesser(width=32, multipliers=(1, 2), layers=1, attends=frozenset()), side=8, device="meta")
    with pytest.raises(ValueError, match=r"no published pesser model has levels of widths 32, 64; say its side: --image-size N"):
        read_pesser(weights.tensors, {})
    with pytest.raises(ValueError, match=r"--image-size 9: this U-Net halves it 1 times; wanted a multiple of 2"):
        read_pesser(weights.tensors, {"image_size": 9})
    narrow = {name: torch.empty([side // 2 if side > 16 else side for side in tensor.shape]) for name, tensor in weights.tensors.items()}
    with pytest.raises(ValueError, match=r"a level of 16 channels, wanted a multiple of 32"):
        read_pesser(narrow, {"image_size": 8})
