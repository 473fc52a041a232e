"""Stock pixel models as a source: loaded with what their scheduler says, and drawn as diffusers draws them."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from safetensors.torch import load_file, save_file

from tests.trainer.stock_models import SIDE, write_stock
from trainer.config import DdpmConfig
from trainer.diffusion.sampler import draw_noise, sample, sampling_grid
from trainer.export import export_job
from trainer.sample import sampling_timesteps
from trainer.source import Source, denoiser_on, is_latent, load_source

CPU = torch.device("cpu")
COUNT = 2
WEIGHTS = "diffusion_pytorch_model.safetensors"


def stock_images(folder: Path, steps: int, *, ddim: bool, exact: Source | None = None) -> torch.Tensor:
    """What a user's pipeline draws from the seeds 5, 6, in [0, 1].

    exact: takes this source's table of alpha_bar in the stead of diffusers' own, which is rounded to fp32."""
    pipeline = (DDIMPipeline if ddim else DDPMPipeline).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if exact is not None:
        own = pipeline.scheduler.alphas_cumprod
        assert float((own - exact.alpha_bar).abs().max()) < 1e-6, "the tables are the same but for rounding"
        pipeline.scheduler.alphas_cumprod = exact.alpha_bar.clone()
    generators = [torch.Generator("cpu").manual_seed(5 + image) for image in range(COUNT)]
    drawn = pipeline(batch_size=COUNT, generator=generators, num_inference_steps=steps, output_type="pt")
    assert isinstance(drawn, ImagePipelineOutput) and isinstance(drawn.images, torch.Tensor)
    return drawn.images


def our_images(source: Source, steps: int) -> torch.Tensor:
    """The same by our sampler."""
    descriptor = source.descriptor
    x_T, generators = draw_noise(5, COUNT, (descriptor.channels, descriptor.image_size, descriptor.image_size))
    x_0 = sample(
        denoiser_on(source.model, CPU),
        x_T,
        sampling_grid(source.alpha_bar, sampling_timesteps(descriptor, steps)),
        prediction=descriptor.prediction_type,
        sampler=descriptor.sampler,
        variance=descriptor.variance,
        clip=descriptor.clip,
        generators=generators,
    )
    return (x_0 / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(
    ("ddim", "settings"),
    [
        (True, {}),
        (True, {"clip_sample": False, "prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}),
        (False, {"variance_type": "fixed_small"}),
        (False, {"variance_type": "fixed_small_log", "prediction_type": "sample", "beta_schedule": "scaled_linear"}),
    ],
)
def test_our_samplers_draw_what_the_stock_pipeline_draws(tmp_path: Path, ddim: bool, settings: Mapping[str, object]) -> None:
    folder = write_stock(tmp_path / "stock", ddim=ddim, timestep_spacing="trailing", **settings)  # pyright: ignore[reportArgumentType]
    source = load_source(folder)
    stock, ours = stock_images(folder, 10, ddim=ddim, exact=source), our_images(source, 10)
    assert stock.std() > 0.05
    assert float((stock - ours).abs().max()) <= 1e-5
    assert float((stock_images(folder, 10, ddim=ddim) - ours).abs().max()) <= 1e-4


@pytest.mark.parametrize(("ddim", "settings"), [(True, {}), (False, {"variance_type": "fixed_large"})])
def test_all_steps_are_the_same_whatever_the_spacing(tmp_path: Path, ddim: bool, settings: Mapping[str, object]) -> None:
    """In fewer steps, trailing, diffusers' DDPM leaves fixed_large noise on the finished image, which halfstep does not."""
    folder = write_stock(tmp_path / "stock", ddim=ddim, num_train_timesteps=60, timestep_spacing="leading", **settings)  # pyright: ignore[reportArgumentType]
    source = load_source(folder)
    assert float((stock_images(folder, 60, ddim=ddim, exact=source) - our_images(source, 60)).abs().max()) <= 1e-5


def test_what_the_folder_says_is_what_the_descriptor_says(tmp_path: Path) -> None:
    folder = write_stock(tmp_path / "stock", variance_type="fixed_large", clip_sample=False, prediction_type="v_prediction")
    source = load_source(folder)
    descriptor = source.descriptor
    assert (descriptor.prediction_type, descriptor.variance, descriptor.clip, descriptor.sampler) == (
        "v",
        "fixed_large",
        False,
        "ancestral",
    )
    assert descriptor.timesteps == tuple(range(1000)) and descriptor.step_count == 1000 and descriptor.teacher_sha256 is None
    assert (descriptor.image_size, descriptor.channels) == (SIDE, 3)
    assert float(source.alpha_bar[-1]) == pytest.approx(4.036e-5, rel=1e-3)
    assert source.recipe.model == DdpmConfig(base=str(folder)) and source.recipe.noise_schedule.kind == "base"
    assert source.stock and not is_latent(folder)
    assert descriptor.base is not None and len(descriptor.base.sha256) == 64


def test_a_number_of_levels_other_than_usual_stands_in_the_recipe(tmp_path: Path) -> None:
    schedule = load_source(write_stock(tmp_path / "stock", num_train_timesteps=60)).recipe.noise_schedule
    assert (schedule.kind, schedule.steps) == ("linear", 60)


def test_early_diffusers_folders_are_flat_and_name_attention_otherwise(tmp_path: Path) -> None:
    """As google's repositories do: config.json at the top, query, key, value and proj_attn."""
    nested = write_stock(tmp_path / "nested")
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        shutil.copy(nested / file, flat / Path(file).name)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(nested / "unet" / WEIGHTS).items():
        for now, before in old.items():
            name = name.replace(f".{now}.", f".{before}.")
        renamed[name] = tensor.contiguous()
    assert any(".query." in name for name in renamed)
    save_file(renamed, flat / WEIGHTS, metadata={"format": "pt"})
    assert torch.equal(our_images(load_source(flat), 10), our_images(load_source(nested), 10))


def test_a_network_without_its_pipeline_needs_a_scheduler_beside_it(tmp_path: Path) -> None:
    folder = write_stock(tmp_path / "stock")
    bare = tmp_path / "bare"
    shutil.copytree(folder / "unet", bare)
    with pytest.raises(ValueError, match=r"scheduler_config\.json is missing, which says on what noise levels"):
        load_source(bare)
    shutil.copy(folder / "scheduler" / "scheduler_config.json", bare)
    assert load_source(bare).weights_sha256 == load_source(folder).weights_sha256


def test_weights_that_are_a_pickle_alone_are_not_read_and_can_be_converted(tmp_path: Path) -> None:
    folder = write_stock(tmp_path / "stock")
    unet = folder / "unet"
    UNet2DModel.from_pretrained(unet).save_pretrained(unet, safe_serialization=False)
    (unet / WEIGHTS).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"only as diffusion_pytorch_model\.bin, a pickle.*python -c ") as refused:
        load_source(folder)
    assert f"from_pretrained('{unet}', use_safetensors=False).save_pretrained('{unet}')" in str(refused.value)
    UNet2DModel.from_pretrained(unet, use_safetensors=False).save_pretrained(unet)
    assert load_source(folder).descriptor.step_count == 1000


@pytest.mark.parametrize(
    ("file", "change", "complaint"),
    [
        (
            "scheduler/scheduler_config.json",
            {"variance_type": "learned_range"},
            "variance_type is 'learned_range', wanted one of fixed_small",
        ),
        ("scheduler/scheduler_config.json", {"_class_name": "PNDMScheduler"}, "_class_name is 'PNDMScheduler', wanted one of DDPMSch"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding is True, wanted false"),
        ("scheduler/scheduler_config.json", {"clip_sample_range": 2.0}, r"clip_sample_range is 2\.0, wanted 1"),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "odd"}, "timestep_spacing is 'odd', wanted one of leading"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True, wanted false"),
        ("scheduler/scheduler_config.json", {"set_alpha_to_one": False}, "set_alpha_to_one is False, wanted true"),
        ("unet/config.json", {"out_channels": 6}, "out_channels is 6, wanted the 3 of in_channels: learned variances"),
        ("unet/config.json", {"num_class_embeds": 10}, "wants class labels"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier', wanted positional"),
        ("unet/config.json", {"sample_size": [16, 32]}, "sample_size is .*, wanted a square"),
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "_class_name is 'UNet2DConditionModel', wanted UNet2DModel"),
    ],
)
def test_what_is_not_known_here_is_refused_by_name(tmp_path: Path, file: str, change: dict[str, object], complaint: str) -> None:
    folder = write_stock(tmp_path / "stock")
    config = folder / file
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ValueError, match=complaint):
        load_source(folder)


def test_a_stock_pipeline_is_exported_as_what_it_is(tmp_path: Path) -> None:
    folder = write_stock(tmp_path / "stock", variance_type="fixed_large")
    with pytest.raises(ValueError, match="give the new folder, --out DIR"):
        export_job(folder, {})
    assert export_job(folder, {"out": str(tmp_path / "export")}) == 0
    stock, exported = load_source(folder), load_source(tmp_path / "export")
    assert exported.descriptor == stock.descriptor and exported.weights_sha256 == stock.weights_sha256
    assert torch.equal(stock_images(tmp_path / "export", 10, ddim=False), stock_images(folder, 10, ddim=False))
    card = (tmp_path / "export" / "README.md").read_text()
    assert "`stock` as others have trained it, exported by halfstep" in card and "Optimizer steps" not in card
    with pytest.raises(ValueError, match="is an export already"):
        export_job(tmp_path / "export", {})
