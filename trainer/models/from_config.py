"""Models, schedulers and image processors from the configs of an architecture: random weights, or none on the meta device."""

from collections.abc import Mapping

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UnCLIPScheduler,
    UNet2DConditionModel,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)

from trainer.architectures import Component
from trainer.models.deprecated import (
    DDPMWuerstchenScheduler,
    PaellaVQModel,
    PriorTransformer,
    VQModel,
    WuerstchenDiffNeXt,
    WuerstchenPrior,
)

_DIFFUSERS: Mapping[str, type[ModelMixin]] = {
    model.__name__: model
    for model in (AutoencoderKL, PaellaVQModel, PriorTransformer, UNet2DConditionModel, VQModel, WuerstchenDiffNeXt, WuerstchenPrior)
}
_TEXT: Mapping[str, type[PreTrainedModel]] = {model.__name__: model for model in (CLIPTextModel, CLIPTextModelWithProjection)}
_SCHEDULERS: Mapping[str, type[SchedulerMixin]] = {
    scheduler.__name__: scheduler
    for scheduler in (DDIMScheduler, DDPMScheduler, DDPMWuerstchenScheduler, EulerDiscreteScheduler, PNDMScheduler, UnCLIPScheduler)
}


def is_model(component: Component) -> bool:
    """Whether it has weights."""
    return component.class_name in {*_DIFFUSERS, *_TEXT, CLIPVisionModelWithProjection.__name__}


def build_model(component: Component) -> nn.Module:
    """The model with weights drawn by torch's own generator, on the device that is the default where it is called.

    Raises: ValueError if it is no model, or of a class that no architecture has."""
    name, config = component.class_name, dict(component.config)
    if name in _DIFFUSERS:
        return _DIFFUSERS[name].from_config(config)  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]
    if name in _TEXT:
        return _TEXT[name](CLIPTextConfig(**config))  # pyright: ignore[reportArgumentType]
    if name == CLIPVisionModelWithProjection.__name__:
        return CLIPVisionModelWithProjection(CLIPVisionConfig(**config))  # pyright: ignore[reportArgumentType]
    raise ValueError(f"{name} is no model that can be made from a config here; wanted one of {', '.join(sorted({*_DIFFUSERS, *_TEXT}))}")


def build_scheduler(component: Component) -> SchedulerMixin:
    """The noise schedule and sampler of a pipeline.

    Raises: ValueError for a class that no architecture has."""
    if component.class_name not in _SCHEDULERS:
        raise ValueError(f"{component.class_name} is no scheduler known here; wanted one of {', '.join(sorted(_SCHEDULERS))}")
    return _SCHEDULERS[component.class_name].from_config(dict(component.config))  # pyright: ignore[reportAttributeAccessIssue]


def build_image_processor(component: Component) -> CLIPImageProcessorPil:
    """CLIP's, by Pillow, also where torchvision is installed: the numbers do not depend on what else a machine has."""
    return CLIPImageProcessorPil(**component.config)  # pyright: ignore[reportArgumentType]
