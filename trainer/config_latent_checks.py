"""Mistakes of a recipe that several sections make together, where latent models are concerned. Free of torch."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainer.config_latent import (
    AutoencoderConfig,
    LatentBaseConfig,
    LatentDenoisingConfig,
    LoraAdaptation,
    StableDiffusionConfig,
)
from trainer.config_sections import DdpmConfig, DenoisingConfig, Problem, ProgressiveDistillationConfig, TinyUNetConfig

if TYPE_CHECKING:
    from trainer.config import RunConfig

_OF_PIXELS = ("denoising", "progressive_distillation")
_OBJECTIVES = {"tiny_unet": _OF_PIXELS, "ddpm": _OF_PIXELS, "autoencoder": ("autoencoding",)}


def latent_problems(config: "RunConfig") -> Iterator[Problem]:
    """Model, objective, adaptation and data that do not go together."""
    model, objective = config.model, config.objective
    fitting = _OBJECTIVES.get(model.kind, ("latent_denoising",))
    if objective.kind not in fitting:
        text = f"{objective.kind} does not go with model.kind={model.kind}; set objective.kind={fitting[0]}"
        yield Problem(("objective.kind", "model.kind"), text)
    from_scratch = isinstance(model, TinyUNetConfig | AutoencoderConfig | LatentBaseConfig)
    if from_scratch and config.noise_schedule.kind == "base":
        yield Problem(("noise_schedule.kind", "model.kind"), f"{model.kind} has no base; set noise_schedule.kind=scaled_linear")
    if isinstance(objective, DenoisingConfig | ProgressiveDistillationConfig) and objective.prediction == "base" and from_scratch:
        yield Problem(("objective.prediction", "model.kind"), f"{model.kind} has no base; set objective.prediction=v")
    # of a pixel base they may be given, and are compared with its own
    if not from_scratch and not isinstance(model, DdpmConfig) and config.noise_schedule.kind != "base":
        text = f"the noise levels of a base are its own, not {config.noise_schedule.kind}"
        yield Problem(("noise_schedule.kind", "model.kind"), f"{text}; set noise_schedule.kind=base")
    if isinstance(config.adaptation, LoraAdaptation) and (from_scratch or isinstance(model, DdpmConfig)):
        text = "is trained whole" if isinstance(model, DdpmConfig) else "has no base to adapt"
        yield Problem(("adaptation.kind", "model.kind"), f"{model.kind} {text}; set adaptation.kind=full")
    if config.dreambooth is not None and not isinstance(model, StableDiffusionConfig):
        yield Problem(("dreambooth", "model.kind"), "DreamBooth here is of Stable Diffusion; set dreambooth=null")
    yield from _class_problems(config)
    if config.distill is not None and not isinstance(model, TinyUNetConfig | DdpmConfig):
        yield Problem(("distill", "model.kind"), f"halvings are of pixel models, not of {model.kind}; leave the distill section out")
    if isinstance(objective, LatentDenoisingConfig):
        yield from _objective_problems(config, objective)
        yield from _halving_problems(config, objective)
    yield from _stored_problems(config)
    if model.kind == "kandinsky22_prior" and config.train.memory_format == "channels_last":
        text = "a prior's latents have no height and width"
        yield Problem(("train.memory_format", "model.kind"), f"{text}; set train.memory_format=contiguous")


def _halving_problems(config: "RunConfig", objective: LatentDenoisingConfig) -> Iterator[Problem]:
    """What a student of fewer steps cannot be, and how it has to draw."""
    halving, model = objective.halving, config.model
    if halving is None:
        return
    if not isinstance(model, LatentBaseConfig | StableDiffusionConfig) or objective.inpainting is not None or config.dreambooth is not None:
        text = "halvings are of text-to-image models alone"
        yield Problem(("objective.halving", "model.kind", "objective.inpainting", "dreambooth"), f"{text}; set objective.halving=null")
    if objective.input_perturbation:
        text = "a student sees what its teacher sees"
        yield Problem(("objective.input_perturbation", "objective.halving"), f"{text}; set objective.input_perturbation=0")
    levels = config.noise_schedule.steps
    if levels % halving.teacher_steps:
        text = f"{halving.teacher_steps} steps do not divide the {levels} noise levels, as stock samplers want it"
        nearest = min((n for n in range(2, levels + 1) if levels % n == 0), key=lambda n: abs(n - halving.teacher_steps), default=levels)
        keys = ("objective.halving.teacher_steps", "noise_schedule.steps")
        yield Problem(keys, f"{text}; set objective.halving.teacher_steps={nearest}")
    if config.logging.sample_steps != halving.student_steps:
        text = f"the student draws in {halving.student_steps} steps, not in {config.logging.sample_steps}"
        keys = ("logging.sample_steps", "objective.halving.student_steps")
        yield Problem(keys, f"{text}; set logging.sample_steps={halving.student_steps}")
    if config.validation.guidance_scale != 1:
        text = f"the student draws without guidance, which it has learnt, not with {config.validation.guidance_scale:g}"
        yield Problem(("validation.guidance_scale", "objective.halving"), f"{text}; set validation.guidance_scale=1")


def _class_problems(config: "RunConfig") -> Iterator[Problem]:
    """What would only come out after the class images are drawn, which takes hours."""
    dreambooth, objective = config.dreambooth, config.objective
    if dreambooth is None or dreambooth.class_prompt is None:
        return
    if dreambooth.class_images < config.data.global_batch_size:
        text = f"{dreambooth.class_images} images are fewer than data.global_batch_size={config.data.global_batch_size}"
        keys = ("dreambooth.class_images", "data.global_batch_size")
        yield Problem(keys, f"{text}; set dreambooth.class_images={config.data.global_batch_size} at least")
    if config.data.aspect_buckets is not None:
        text = "class images are squares, and go through the network together with the training images"
        yield Problem(("data.aspect_buckets", "dreambooth.class_prompt"), f"{text}; set data.aspect_buckets=null")
    if isinstance(objective, LatentDenoisingConfig) and objective.inpainting is not None and objective.inpainting.source == "stored":
        text = "class images have no masks of their own"
        yield Problem(("objective.inpainting.source", "dreambooth.class_prompt"), f"{text}; set objective.inpainting.source=drawn")


def _objective_problems(config: "RunConfig", objective: LatentDenoisingConfig) -> Iterator[Problem]:
    model = config.model
    if objective.inpainting is not None and not isinstance(model, StableDiffusionConfig):
        yield Problem(("objective.inpainting", "model.kind"), f"{model.kind} cannot fill masks; set model.kind=stable_diffusion")
    if model.kind == "kandinsky22_prior" and objective.offset_noise:
        text = "an embedding has no height and width to shift as a whole, so that it would only be more noise"
        yield Problem(("objective.offset_noise", "model.kind"), f"{text}; set objective.offset_noise=0")
    if model.kind == "kandinsky22_decoder" and objective.caption_dropout:
        text = "Kandinsky's decoder is told an image, no caption"
        yield Problem(("objective.caption_dropout", "model.kind"), f"{text}; set objective.caption_dropout=0")
    if model.kind.startswith("kandinsky22") and (objective.zero_terminal_snr or objective.prediction != "base"):
        text = "Kandinsky's pipelines draw with the levels and the prediction of their own sampler alone"
        yield Problem(
            ("objective.prediction", "objective.zero_terminal_snr", "model.kind"),
            f"{text}; set objective.prediction=base and objective.zero_terminal_snr=false",
        )
    if model.kind == "wuerstchen_prior" and objective.prediction not in ("base", "eps"):
        yield Problem(("objective.prediction", "model.kind"), "Wuerstchen's prior predicts eps; set objective.prediction=base")
    if model.kind == "wuerstchen_prior" and objective.zero_terminal_snr:
        yield Problem(
            ("objective.zero_terminal_snr", "model.kind"), "Wuerstchen's noise is continuous; set objective.zero_terminal_snr=false"
        )


def _stored_problems(config: "RunConfig") -> Iterator[Problem]:
    """What stored latents and text states cannot do."""
    model, data = config.model, config.data
    if getattr(model, "latents", "encode") == "stored":
        if data.horizontal_flip:
            text = "stored latents cannot be mirrored"
            yield Problem(("data.horizontal_flip", "model.latents"), f"{text}; set data.horizontal_flip=false or model.latents=encode")
        if data.image_size is not None:
            text = f"stored latents keep their size, so {data.image_size} has no effect"
            yield Problem(("data.image_size", "model.latents"), f"{text}; set data.image_size=null or model.latents=encode")
        if isinstance(config.objective, LatentDenoisingConfig) and config.objective.inpainting is not None:
            text = "the masked image has to be encoded in every step"
            yield Problem(("model.latents", "objective.inpainting"), f"{text}; set model.latents=encode")
        if config.dreambooth is not None and config.dreambooth.class_prompt is not None:
            text = "class images are encoded in every step"
            yield Problem(("model.latents", "dreambooth.class_prompt"), f"{text}; set model.latents=encode")
    if getattr(model, "text", "encode") == "stored" and config.dreambooth is not None:
        text = "DreamBooth's prompts are encoded in every step"
        yield Problem(("model.text", "dreambooth"), f"{text}; set model.text=encode")
