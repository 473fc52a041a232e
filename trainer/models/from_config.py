"""Models, schedulers and image processors from the configs of an architecture: random weights, or none on the meta device."""

from collections.abc import Callable, Collection, Mapping
from typing import final

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)

from data_shards.encoders.efficient_net import EfficientNetEncoder
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
    for model in (
        AutoencoderKL,
        PaellaVQModel,
        PriorTransformer,
        UNet2DConditionModel,
        UNet2DModel,
        VQModel,
        WuerstchenDiffNeXt,
        WuerstchenPrior,
    )
}
_TEXT: Mapping[str, type[PreTrainedModel]] = {model.__name__: model for model in (CLIPTextModel, CLIPTextModelWithProjection)}
_VISION = CLIPVisionModelWithProjection.__name__
_EFFICIENT_NET = EfficientNetEncoder.__name__
_MODELS = (*_DIFFUSERS, *_TEXT, _VISION, _EFFICIENT_NET)
_SCHEDULERS: Mapping[str, type[SchedulerMixin]] = {
    scheduler.__name__: scheduler
    for scheduler in (DDIMScheduler, DDPMScheduler, DDPMWuerstchenScheduler, EulerDiscreteScheduler, PNDMScheduler, UnCLIPScheduler)
}
_WUERSTCHEN = "wuerstchen"
_INITS = (nn.init.constant_, nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_)
_FILLS = (Tensor.fill_, Tensor.normal_, Tensor.uniform_, Tensor.zero_)


@final
class _NothingDrawn(TorchFunctionMode):
    """Leaves out what initializes weights: Wuerstchen's decoder does it once for each of its modules, 20 seconds for nothing on meta."""

    def __torch_function__(
        self, func: Callable[..., Tensor], types: Collection[type], args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        given = kwargs or {}
        if func in _FILLS:
            return args[0]
        return given["tensor"] if func in _INITS and "tensor" in given else func(*args, **given)


def is_model(component: Component) -> bool:
    """Whether it has weights."""
    return component.class_name in _MODELS


def build_model(component: Component) -> nn.Module:
    """The model with weights drawn by torch's own generator, on the device that is the default where it is called.

    Raises: ValueError if it is no model, or of a class that no architecture has."""
    name, config = component.class_name, dict(component.config)
    if name in _DIFFUSERS:
        return _DIFFUSERS[name].from_config(config)  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]
    if name in _TEXT:
        return _TEXT[name](CLIPTextConfig(**config))  # pyright: ignore[reportArgumentType]
    if name == _VISION:
        return CLIPVisionModelWithProjection(CLIPVisionConfig(**config))  # pyright: ignore[reportArgumentType]
    if name == _EFFICIENT_NET:
        return EfficientNetEncoder()
    raise ValueError(f"{name} is no model that can be made from a config here; wanted one of {', '.join(sorted(_MODELS))}")


def build_empty_model(component: Component) -> nn.Module:
    """The model on the meta device: shapes without memory, in no more than a few seconds.

    Raises: ValueError as build_model."""
    with torch.device("meta"), _NothingDrawn():
        return build_model(component)


def build_scheduler(component: Component) -> SchedulerMixin:
    """The noise schedule and sampler of a pipeline.

    Raises: ValueError for a class that no architecture has."""
    if component.class_name not in _SCHEDULERS:
        raise ValueError(f"{component.class_name} is no scheduler known here; wanted one of {', '.join(sorted(_SCHEDULERS))}")
    return _SCHEDULERS[component.class_name].from_config(dict(component.config))  # pyright: ignore[reportAttributeAccessIssue]


def build_image_processor(component: Component) -> CLIPImageProcessorPil:
    """CLIP's, by Pillow, also where torchvision is installed: the numbers do not depend on what else a machine has."""
    return CLIPImageProcessorPil(**component.config)  # pyright: ignore[reportArgumentType]


def index_entry(component: Component) -> list[str]:
    """What model_index.json says of a component, so that the diffusers at hand finds its class.

    diffusers 0.42 moved Wuerstchen's classes: it finds them neither by `wuerstchen`, which the Hub's folders say, nor by `diffusers`,
    which its own save_pretrained writes, but by the module that defines them."""
    if component.package == _WUERSTCHEN:
        return [_DIFFUSERS[component.class_name].__module__, component.class_name]
    return [component.package, component.class_name]
