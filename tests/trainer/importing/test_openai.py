"""openai's checkpoints become stock pipelines that compute and sample the same, or are refused by name."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from tests.trainer.importing.sources import OpenAI, Weights
from trainer.import_checkpoint import import_job
from trainer.importing.openai import read_openai
from trainer.importing.pipeline import build_scheduler, read_model
from trainer.importing.settings import Family, Given

GUIDED_256 = OpenAI(width=256, multipliers=(1, 1, 2, 2, 4, 4), layers=2, attends=frozenset({3, 4, 5}), head_channels=64)
GUIDED_64 = OpenAI(width=192, multipliers=(1, 2, 3, 4), layers=3, attends=frozenset({1, 2, 3}), head_channels=64, order="new", classes=1000)
IMPROVED_CIFAR10 = OpenAI(width=128, multipliers=(1, 2, 2, 2), layers=3, attends=frozenset({1, 2}), heads=4, resample=False)
IMPROVED_LSUN = OpenAI(
    width=128, multipliers=(1, 1, 2, 2, 4, 4), layers=2, attends=frozenset({4}), heads=1, scale_shift=False, resample=False
)
SMALL = OpenAI(width=32, multipliers=(1, 2, 3), layers=2, attends=frozenset({1, 2}), head_channels=16)
SMALL_IMPROVED = OpenAI(width=32, multipliers=(1, 2, 2), layers=1, attends=frozenset({1, 2}), heads=4, resample=False)


def checkpoint(
    source: OpenAI, *, side: int = 16, times: tuple[float, ...] = (7, 961), device: str = "cpu"
) -> tuple[Weights, Tensor, Tensor]:
    """Random weights, a batch, and what the source makes of it at these times; labels count from 0."""
    weights = Weights(device=device)
    x = torch.randn((len(times), 3, side, side), generator=torch.Generator().manual_seed(1)).to(device)
    labels = torch.arange(len(times), device=device) if source.classes else None
    return weights, x, source(weights, x, torch.tensor(times, device=device), labels)


def options_of(source: OpenAI, side: int) -> dict[str, object]:
    heads = {"heads": source.heads} if source.heads else {"head_channels": source.head_channels}
    return {"image_size": side, "diffusion_steps": 1000, **heads}


def imported(path: Path, out: Path, tensors: dict[str, Tensor], family: Family, **options: object) -> DDPMPipeline:
    torch.save(tensors, path)
    assert import_job(path, {"family": family, "out": str(out), **options}) == 0
    return DDPMPipeline.from_pretrained(out)


@pytest.mark.parametrize(
    ("family", "source"),
    [
        ("guided-diffusion", SMALL),
        ("guided-diffusion", replace(SMALL, order="new", scale_shift=False)),
        ("guided-diffusion", replace(SMALL, attends=frozenset({0}), layers=1, outputs=3)),
        ("guided-diffusion", replace(SMALL, attends=frozenset(), resample=False)),
        ("guided-diffusion", OpenAI(width=64, multipliers=(1,), layers=2, attends=frozenset({0}), head_channels=32)),
        ("improved-diffusion", SMALL_IMPROVED),
        ("improved-diffusion", replace(SMALL_IMPROVED, multipliers=(1, 2, 3), heads=1, scale_shift=False)),
    ],
)
def test_a_small_model_computes_the_same(tmp_path: Path, family: Family, source: OpenAI) -> None:
    weights, x, wanted = checkpoint(source)
    order = {"attention_order": source.order} if family == "guided-diffusion" else {}
    pipeline = imported(tmp_path / "model.pt", tmp_path / "out", weights.tensors, family, **options_of(source, 16), **order)
    with torch.no_grad():
        got = pipeline.unet(x, torch.tensor([7, 961])).sample
    assert got.shape == wanted.shape and (got - wanted).abs().max() < 1e-5
    assert wanted.std() > 0.1, "a source that puts out nothing proves nothing"


def test_a_class_conditional_model_computes_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = replace(SMALL, classes=10)
    weights, x, wanted = checkpoint(source)
    with caplog.at_level(logging.INFO):
        unet = imported(tmp_path / "model.pt", tmp_path / "out", weights.tensors, "guided-diffusion", **options_of(source, 16)).unet
    with torch.no_grad():
        got = unet(x, torch.tensor([7, 961]), class_labels=torch.tensor([0, 1])).sample
    assert (got - wanted).abs().max() < 1e-5
    assert "conditioned on 10 classes: call the U-Net with class_labels" in caplog.text


@pytest.mark.parametrize("wrong", [{"attention_order": "new"}, {"head_channels": 32}])
def test_attention_read_in_another_way_is_another_function(wrong: Given) -> None:
    """So that equality above says something of order and heads, which no shape tells."""
    weights, x, wanted = checkpoint(SMALL)
    with torch.no_grad():
        got = (
            read_openai(weights.tensors, {"image_size": 16, "head_channels": 16, **wrong}, family="guided-diffusion")
            .unet(x, torch.tensor([7, 961]))
            .sample
        )
    assert (got - wanted).abs().max() > 1e-3


def test_without_its_variance_it_predicts_the_same_noise(tmp_path: Path) -> None:
    weights, x, wanted = checkpoint(SMALL)
    pipeline = imported(tmp_path / "m.pt", tmp_path / "out", weights.tensors, "guided-diffusion", **options_of(SMALL, 16), eps_only=True)
    assert pipeline.unet.config["out_channels"] == 3 and pipeline.scheduler.config["variance_type"] == "fixed_large"
    with torch.no_grad():
        assert (pipeline.unet(x, torch.tensor([7, 961])).sample - wanted[:, :3]).abs().max() < 1e-5


@pytest.mark.parametrize(("schedule", "prediction"), [("linear", "eps"), ("cosine", "x_0")])
def test_ddpm_pipeline_samples_with_the_learned_variance_as_openai_does(tmp_path: Path, schedule: str, prediction: str) -> None:
    """Against gaussian_diffusion.py's p_sample: log variances between those of beta and of the posterior."""
    source = replace(SMALL, multipliers=(1, 2), layers=1, attends=frozenset({1}))
    steps, weights = 24, checkpoint(source)[0]
    pipeline = imported(
        tmp_path / "model.pt", tmp_path / "out", weights.tensors, "guided-diffusion",
        **{**options_of(SMALL, 16), "diffusion_steps": steps, "noise_schedule": schedule, "prediction": prediction},
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, torch.Generator().manual_seed(5), num_inference_steps=steps, output_type="pt", return_dict=False)[0]
    k = torch.arange(steps + 1, dtype=torch.float64) / steps
    signal = torch.cos((k + 0.008) / 1.008 * torch.pi / 2) ** 2
    scale = 1000 / steps
    betas = torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)
    betas = betas if schedule == "linear" else (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
    now = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), now[:-1]])
    generator = torch.Generator().manual_seed(5)
    x = torch.randn((2, 3, 16, 16), generator=generator).double()
    for t in range(steps - 1, -1, -1):
        with torch.no_grad():
            out = source(weights, x.float(), torch.tensor([t, t])).double()
        predicted, fraction = out[:, :3], (out[:, 3:] + 1) / 2
        clean = predicted if prediction == "x_0" else (x - (1 - now[t]).sqrt() * predicted) / now[t].sqrt()
        mean = betas[t] * before[t].sqrt() * clean.clamp(-1, 1) + (1 - before[t]) * (1 - betas[t]).sqrt() * x
        x = mean / (1 - now[t])
        if t:
            low = (betas[t] * (1 - before[t]) / (1 - now[t])).log()
            noise = torch.randn((2, 3, 16, 16), generator=generator)
            x = x + torch.exp(0.5 * (fraction * betas[t].log() + (1 - fraction) * low)) * noise
    wanted = (x / 2 + 0.5).clamp(0, 1)
    assert isinstance(images, Tensor) and (images - wanted).abs().max() < 1e-4
    assert wanted.std() > 0.05


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rescaled_times_of_4000_steps_become_1000_levels_counted_from_the_noisy_end(tmp_path: Path, schedule: str) -> None:
    """Level k is the source's step 4 k + 3, at which improved-diffusion tells its network (4 k + 3) / 4."""
    levels = (0, 7, 480, 999)
    weights, x, wanted = checkpoint(SMALL_IMPROVED, times=tuple((4 * level + 3) / 4 for level in levels))
    out = tmp_path / "out"
    options = {**options_of(SMALL_IMPROVED, 16), "diffusion_steps": 4000, "noise_schedule": schedule}
    pipeline = imported(tmp_path / "model.pt", out, weights.tensors, "improved-diffusion", **options)
    assert isinstance(pipeline.scheduler, DDPMScheduler) and len(pipeline.scheduler.alphas_cumprod) == 1000
    with torch.no_grad():
        got = pipeline.unet(x, torch.tensor(levels)).sample
    assert (got - wanted).abs().max() < 1e-5
    k = torch.arange(4001, dtype=torch.float64) / 4000
    signal = torch.cos((k + 0.008) / 1.008 * torch.pi / 2) ** 2
    linear, cosine = torch.linspace(2.5e-5, 0.005, 4000, dtype=torch.float64), (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
    alpha_bar = torch.cumprod(1 - (linear if schedule == "linear" else cosine), 0)[3::4]
    assert (pipeline.scheduler.alphas_cumprod.sqrt() - alpha_bar.sqrt()).abs().max() < 1e-5
    assert torch.equal(weights.tensors["time_embed.0.weight"], checkpoint(SMALL_IMPROVED)[0].tensors["time_embed.0.weight"])


def test_times_that_were_not_rescaled_keep_their_number() -> None:
    weights, x, wanted = checkpoint(SMALL_IMPROVED, times=(3, 3999))
    given: Given = {"image_size": 16, "diffusion_steps": 4000, "rescale_timesteps": False}
    model = read_openai(weights.tensors, given, family="improved-diffusion")
    with torch.no_grad():
        assert (model.unet(x, torch.tensor([3, 3999])).sample - wanted).abs().max() < 1e-5
    scheduler = build_scheduler(model.settings, family="improved-diffusion", learned_variance=True)
    assert scheduler.config["num_train_timesteps"] == 4000 and scheduler.config["beta_end"] == pytest.approx(0.005)
    with pytest.raises(ValueError, match=r"--diffusion-steps 500: of times that were rescaled .* --rescale-timesteps no"):
        read_openai(weights.tensors, {"image_size": 16, "diffusion_steps": 500}, family="improved-diffusion")


@pytest.mark.parametrize(
    ("family", "source", "side", "millions", "assumed"),
    [
        (
            "guided-diffusion", GUIDED_256, 256, 552.814,
            {"noise_schedule": "linear", "diffusion_steps": 1000, "head_channels": 64, "attention_order": "legacy", "prediction": "eps"},
        ),
        (
            "guided-diffusion", GUIDED_64, 64, 295.905,
            {"noise_schedule": "cosine", "diffusion_steps": 1000, "head_channels": 64, "attention_order": "new", "prediction": "eps"},
        ),
        (
            "improved-diffusion", IMPROVED_CIFAR10, 32, 52.546,
            {"noise_schedule": "cosine", "diffusion_steps": 4000, "heads": 4, "rescale_timesteps": True, "prediction": "eps"},
        ),
        (
            "improved-diffusion", IMPROVED_LSUN, 256, 113.677,
            {"noise_schedule": "linear", "diffusion_steps": 1000, "heads": 1, "prediction": "eps"},
        ),
    ],
)  # fmt: skip
def test_the_published_models_are_known_by_their_levels(
    family: Family, source: OpenAI, side: int, millions: float, assumed: dict[str, object]
) -> None:
    weights, *_ = checkpoint(source, side=64, device="meta")
    model = read_openai(weights.tensors, {}, family=family)
    assert model.image_size == side and model.assumed == assumed
    assert sum(weight.numel() for weight in model.unet.parameters()) / 1e6 == pytest.approx(millions, abs=1e-3)
    assert isinstance(model.unet, UNet2DModel) and model.unet.config["out_channels"] == 6


def test_heads_of_several_widths_are_refused_since_diffusers_has_none() -> None:
    imagenet = OpenAI(width=128, multipliers=(1, 2, 3, 4), layers=3, attends=frozenset({2, 3}), heads=4, resample=False)
    weights, *_ = checkpoint(imagenet, side=64, device="meta")
    with pytest.raises(
        ValueError, match=r"attention with 4 heads has 96 and 128 channels a head on its levels, and diffusers' UNet2DModel"
    ):
        read_openai(weights.tensors, {}, family="improved-diffusion")
    with pytest.raises(ValueError, match=r"--head-channels 100: does not divide the 384 channels of a level with attention"):
        read_openai(weights.tensors, {"head_channels": 100}, family="improved-diffusion")


def test_what_is_no_such_unet_is_refused_by_name() -> None:
    weights, *_ = checkpoint(SMALL, device="meta")
    tensors, given = weights.tensors, {"image_size": 16, "head_channels": 16}
    half = {name: tensor for name, tensor in tensors.items() if not name.startswith("output_blocks")}
    without = {name: tensor for name, tensor in tensors.items() if name != "middle_block.1.qkv.bias"}
    uneven = {name: tensor for name, tensor in tensors.items() if not name.startswith("output_blocks.8.")}
    enlarges = tensors | {"input_blocks.0.0.weight": torch.empty(32, 6, 3, 3)}
    qkv = tensors | {"middle_block.1.qkv.weight": torch.empty(289, 96, 1)}
    cases: tuple[tuple[dict[str, Tensor], Family, str], ...] = (
        (half, "guided-diffusion", r"it lacks output_blocks: half a U-Net, such as a classifier's"),
        (without, "guided-diffusion", r"^m.pt, as guided-diffusion: it lacks middle_block.1.qkv.bias$"),
        (tensors | {"extra": torch.ones(1)}, "guided-diffusion", r"it has left over extra$"),
        (uneven, "guided-diffusion", r"its 8 output_blocks, of which number 2 is the first to double, are no levels of equal length"),
        (enlarges, "guided-diffusion", r"it takes 6 channels and gives 6, .* models that enlarge a small image are not read"),
        (qkv, "guided-diffusion", r"a joint projection of attention has 289 rows"),
        (tensors, "improved-diffusion", r"its ResBlocks change the resolution, .* give --as guided-diffusion"),
        (
            tensors,
            "pesser",
            r"^m.pt: is no checkpoint of pesser: its tensors have the names of guided-diffusion or improved-diffusion; give",
        ),
        ({"temb.dense.0.weight": torch.ones(1)}, "guided-diffusion", r"its tensors have the names of pesser; give --as pesser"),
        ({"time_embedding.linear_1.weight": torch.ones(1)}, "pesser", r"diffusers' names already"),
        ({"model.diffusion_model.out.2.bias": torch.ones(1)}, "guided-diffusion", r"it is a latent diffusion model"),
        ({"a": torch.ones(1), "b": torch.ones(1)}, "improved-diffusion", r"its tensors are a, b$"),
        ({str(k): torch.ones(1) for k in range(9)}, "pesser", r"its tensors are 0, 1, 2 and 6 more$"),
    )
    for changed, family, reason in cases:
        with pytest.raises(ValueError, match=reason):
            read_model(changed, family=family, given=given, where="m.pt")


def test_a_512_px_model_whose_times_are_wider_than_its_first_level_is_refused() -> None:
    weights, *_ = checkpoint(replace(SMALL, width=64), device="meta")
    tensors = weights.tensors | {"time_embed.0.weight": torch.empty(256, 128)}
    with pytest.raises(ValueError, match=r"time_embed.0.weight has shape \(256, 128\), the other tensors make it \(256, 64\)"):
        read_openai(tensors, {"image_size": 16, "heads": 1}, family="guided-diffusion")


def test_options_that_contradict_the_model_or_each_other_are_refused(tmp_path: Path) -> None:
    weights, *_ = checkpoint(SMALL)
    torch.save(weights.tensors, tmp_path / "model.pt")
    (tmp_path / "taken").mkdir()
    for options, reason in (
        ({"family": "openai"}, r"--as openai: wanted one of pesser, guided-diffusion, improved-diffusion"),
        ({"family": "pesser", "heads": 4}, r"is no checkpoint of pesser"),
        ({"family": "guided-diffusion", "image_size": 16, "heads": 1, "head_channels": 16}, r"--heads and --head-channels: each follows"),
        ({"family": "guided-diffusion", "image_size": 0}, r"--image-size 0: wanted 1 or more"),
        ({"family": "guided-diffusion", "noise_schedule": "sigmoid"}, r"--noise-schedule sigmoid: wanted linear or cosine"),
        (
            {"family": "guided-diffusion", "image_size": 16, "variance": "fixed_small"},
            r"--variance: this model learns its own; give --eps-only",
        ),
        ({"image_size": 16}, r"--image-size: says something of a known U-Net; name its family too: --as pesser \| guided"),
        ({"family": "guided-diffusion", "out": str(tmp_path / "taken")}, r"taken: is there already"),
    ):
        with pytest.raises(ValueError, match=reason):
            import_job(tmp_path / "model.pt", {"out": str(tmp_path / "out"), **options})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "taken"], "nothing was written"
