"""Stable Diffusion's samplers by name: another stock scheduler over the levels and the prediction that a model was trained for."""

from collections.abc import Mapping

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

_SAMPLERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "pndm": PNDMScheduler,
    "unipc": UniPCMultistepScheduler,
}
SAMPLERS = tuple(_SAMPLERS)
_NO_ZERO_SNR = ("heun", "pndm")
"""They divide by the signal of the last level, or do not know that it may be zero."""


def choose_sampler(pipeline: DiffusionPipeline, name: str) -> None:
    """Give a pipeline of Stable Diffusion another sampler; its noise levels and the meaning of its prediction stay.

    name: one of SAMPLERS. Where the noisiest level has no signal, steps begin at that level (timestep_spacing trailing).
    Raises: ValueError for another name or pipeline, or a sampler that cannot begin there.
    Source: of trailing steps, Lin et al. 2023, arXiv:2305.08891, section 3.3."""
    if name not in _SAMPLERS:
        raise ValueError(f"--sampler {name} is not known; give one of {', '.join(SAMPLERS)}, or leave it out for the model's own")
    match pipeline:
        case StableDiffusionPipeline() | StableDiffusionInpaintPipeline() | StableDiffusionXLPipeline():
            pass
        case _:
            raise ValueError(f"--sampler {name}: a {type(pipeline).__name__} draws with its own sampler alone; leave --sampler out")
    old = pipeline.scheduler
    config: Mapping[str, object] = old.config
    # What the old scheduler does not say becomes the new one's default. DDIM and DDPM would clip to [-1, 1], which latents are not
    # within; PNDM would begin with Runge-Kutta steps, which Stable Diffusion's do without.
    changes: dict[str, object] = {"skip_prk_steps": True} if name == "pndm" else {"clip_sample": False}
    if config.get("rescale_betas_zero_snr") or float(old.alphas_cumprod[-1]) < 1e-7:
        if name in _NO_ZERO_SNR:
            others = ", ".join(other for other in SAMPLERS if other not in _NO_ZERO_SNR)
            raise ValueError(f"--sampler {name} cannot begin at a level without signal, as this model was trained; give one of {others}")
        # Rescaling is idempotent, so it may be said of levels that are already rescaled, too.
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.scheduler = _SAMPLERS[name].from_config(config, **changes)
