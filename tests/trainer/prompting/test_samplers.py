"""Samplers: what a model was trained for stays."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from trainer.models.deprecated import WuerstchenPriorPipeline
from trainer.prompting.painters import painter
from trainer.prompting.pictures import PictureRequest, draw
from trainer.prompting.samplers import SAMPLERS, choose_sampler

LEVELS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def with_scheduler(pipeline: StableDiffusionPipeline, scheduler: SchedulerMixin) -> StableDiffusionPipeline:
    pipeline.scheduler = scheduler
    return pipeline


@pytest.mark.parametrize("name", SAMPLERS)
def test_levels_and_prediction_stay_and_latents_are_not_clipped(text_pipeline: StableDiffusionPipeline, name: str) -> None:
    old = DDIMScheduler(**LEVELS, prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    choose_sampler(with_scheduler(text_pipeline, old), name)
    new = text_pipeline.scheduler
    assert new.config["prediction_type"] == "v_prediction"
    assert torch.equal(new.alphas_cumprod, old.alphas_cumprod)
    assert new.config.get("clip_sample", False) is False
    drawn = draw(painter(text_pipeline), [PictureRequest("a couple", 1, steps=3)], batch_size=1)
    assert drawn.float().std() > 10


def test_a_scheduler_without_a_word_on_clipping_becomes_one_that_does_not_clip(text_pipeline: StableDiffusionPipeline) -> None:
    assert "clip_sample" not in text_pipeline.scheduler.config
    choose_sampler(text_pipeline, "ddim")
    assert text_pipeline.scheduler.config["clip_sample"] is False


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("heun", "pndm")])
@pytest.mark.parametrize("how", ["rescaled by the scheduler", "given as betas"])
def test_without_signal_at_the_last_level_sampling_begins_there(text_pipeline: StableDiffusionPipeline, name: str, how: str) -> None:
    old = DDPMScheduler(**LEVELS, prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False)
    if how == "given as betas":
        old = DDPMScheduler(trained_betas=old.betas.tolist(), prediction_type="v_prediction", clip_sample=False)
    assert old.alphas_cumprod[-1] < 1e-7
    choose_sampler(with_scheduler(text_pipeline, old), name)
    new = text_pipeline.scheduler
    new.set_timesteps(4)
    assert new.config["timestep_spacing"] == "trailing" and new.config["rescale_betas_zero_snr"] is True
    assert int(new.timesteps[0]) == 999
    assert torch.allclose(new.alphas_cumprod[:-1], old.alphas_cumprod[:-1], rtol=1e-4)
    drawn = draw(painter(text_pipeline), [PictureRequest("a couple", 1, steps=3, guidance_rescale=0.7)], batch_size=1)
    assert drawn.float().std() > 10


@pytest.mark.parametrize("name", ["heun", "pndm"])
def test_samplers_that_cannot_begin_there_are_refused(text_pipeline: StableDiffusionPipeline, name: str) -> None:
    old = DDPMScheduler(**LEVELS, prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False)
    with pytest.raises(ValueError, match=f"--sampler {name} cannot begin.*give one of ddim, ddpm"):
        choose_sampler(with_scheduler(text_pipeline, old), name)
    assert text_pipeline.scheduler is old


def test_an_unknown_sampler_or_another_pipeline_is_refused(text_pipeline: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match=r"--sampler plms is not known; give one of ddim, ddpm, dpm\+\+"):
        choose_sampler(text_pipeline, "plms")
    parts = {"tokenizer": text_pipeline.tokenizer, "text_encoder": text_pipeline.text_encoder, "prior": None}
    with pytest.raises(ValueError, match="a WuerstchenPriorPipeline draws with its own"):
        choose_sampler(WuerstchenPriorPipeline(**parts, scheduler=None), "ddim")  # pyright: ignore[reportArgumentType]
