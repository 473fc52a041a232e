"""A latent model's recipe as the input of a plan: the network by its shape, the frozen encoders beside it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.flop_counter import FlopCounterMode

from trainer.config import (
    FullAdaptation,
    Kandinsky22DecoderConfig,
    Kandinsky22PriorConfig,
    LatentBaseConfig,
    LoraAdaptation,
    RunConfig,
    StableDiffusionConfig,
    WuerstchenPriorConfig,
)
from trainer.latents.example import example
from trainer.latents.networks import shape_of, shapes_of
from trainer.latents.pictures import can_draw, companion_of
from trainer.latents.trained import Trained, build_trained, latent_config, vae_channels
from trainer.models.from_config import build_empty_model
from trainer.models.stable_diffusion import is_xl
from trainer.plan.live_bytes import LiveBytes
from trainer.plan.plan_input import DType, Frozen, PlanInput, Shapes

BF16 = torch.bfloat16
_WUERSTCHEN_CELL, _KANDINSKY_CELL, _LORA_RANK = 32, 8, 4


def latent_plan(config: RunConfig, common: PlanInput, *, side: int) -> PlanInput:
    """The plan of a latent denoiser. common: all that does not depend on the model. side: of the images in pixels.

    Raises: ValueError if the base is neither a folder nor a well-known one."""
    trained = _on_meta(config)
    latent = latent_shape(config, side)
    with torch.device("meta"):
        x_t, _, cond = example(config, trained, latent)
    return replace(
        common,
        build=lambda: build(config).module,
        units=lambda module: _denoiser(module).units(),
        enable_checkpointing=lambda module: _denoiser(module).checkpoint_activations(),
        shapes=Shapes(tuple(x_t.shape[1:]), {name: tuple(value.shape[1:]) for name, value in cond.items()}),
        frozen=frozen_encoders(config, side=side),
        drawing=drawing_models(config),
        variants=_variants(config, side=side),
    )


def build(config: RunConfig) -> Trained:
    """The trained network on torch's default device, without the base's weights; under FakeTensorMode of fake tensors."""
    model = latent_config(config)
    # On plain meta tensors: peft moves what it adds from device to device, which fake ones do not bear.
    with unset_fake_temporarily(), torch.device("meta"):
        trained = build_trained(config, shapes_of(model.autoencoder if isinstance(model, LatentBaseConfig) else model.base))
    if torch.get_default_device().type != "meta":
        _fill(trained.module)
    return trained


def _fill(module: nn.Module) -> None:
    """Put tensors of torch's default device and mode in the place of meta ones."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(_empty(parameter), requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, _empty(buffer))


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def latent_shape(config: RunConfig, side: int) -> tuple[int, ...]:
    """Of one image's x_0. Raises: ValueError if images of this side have no whole latent."""
    match latent_config(config):
        case Kandinsky22PriorConfig() as model:
            width = shape_of(model.base, "prior").config["embedding_dim"]
            assert isinstance(width, int), "a width is a number"
            return (width,)
        case WuerstchenPriorConfig():
            channels, cell = 16, _WUERSTCHEN_CELL
        case Kandinsky22DecoderConfig():
            channels, cell = 4, _KANDINSKY_CELL
        case LatentBaseConfig() | StableDiffusionConfig() as model:
            vae = shape_of(_vae_of(model), "vae").config
            levels = vae["block_out_channels"]
            assert isinstance(levels, list | tuple), "an AutoencoderKL has levels"
            channels, cell = vae_channels(vae), 2 ** (len(levels) - 1)
    if side % cell:
        raise ValueError(f"images of {side} pixels have no whole cells of {cell}; set data.image_size to a multiple")
    return (channels, side // cell, side // cell)


def frozen_encoders(config: RunConfig, *, side: int) -> tuple[Frozen, ...]:
    """The frozen models that encode every micro-batch, by name in their pipeline. side: of the images in pixels."""
    precision, count = latent_config(config).frozen_precision, config.data.micro_batch_size
    return tuple(_frozen(base, part, precision, side=side, count=count) for base, part in _encoding_parts(config))


def drawing_models(config: RunConfig) -> tuple[Frozen, ...]:
    """The models that only draw pictures while a recipe trains: parts of its own pipeline, and the other one that it draws with."""
    if not config.logging.sample_every_steps or not can_draw(config):
        return ()
    model, companion, encoding = latent_config(config), companion_of(config), _encoding_parts(config)
    match model:
        case LatentBaseConfig() | StableDiffusionConfig():
            own = [(_vae_of(model), "vae"), *_text_parts(config)]
        case WuerstchenPriorConfig():
            own = _text_parts(config)
        case Kandinsky22PriorConfig():
            own = [*_text_parts(config), (model.base, "image_encoder")]
        case Kandinsky22DecoderConfig():
            own = [(model.base, "movq")]
    precision: DType = model.frozen_precision
    found = [Frozen(part, _parameters(base, part), precision=precision) for base, part in own if (base, part) not in encoding]
    if companion is not None:
        name, parts = _COMPANIONS[model.kind]
        weights = sum(_parameters(companion, part) for part in parts if (companion, part) not in encoding)
        found.append(Frozen(f"{name}'s pipeline", weights, precision=precision))
    return tuple(found)


_COMPANIONS: Mapping[str, tuple[str, Sequence[str]]] = {
    "wuerstchen_prior": ("decoder", ("decoder", "vqgan", "text_encoder")),
    "kandinsky22_prior": ("decoder", ("unet", "movq")),
    "kandinsky22_decoder": ("prior", ("prior", "text_encoder", "image_encoder")),
}
"""What a model draws together with, and the models of that pipeline, by model.kind."""


def _encoding_parts(config: RunConfig) -> list[tuple[str, str]]:
    """Base and part of the models that encode every micro-batch."""
    model = latent_config(config)
    found: list[tuple[str, str]] = []
    if model.latents == "encode":
        match model:
            case LatentBaseConfig() | StableDiffusionConfig():
                found.append((_vae_of(model), "vae"))
            case WuerstchenPriorConfig() | Kandinsky22PriorConfig():
                found.append((model.base, "image_encoder"))
            case Kandinsky22DecoderConfig():
                found += [(model.base, "movq"), (model.prior, "image_encoder")]
    return [*found, *_text_parts(config)] if getattr(model, "text", None) == "encode" else found


def _text_parts(config: RunConfig) -> list[tuple[str, str]]:
    """Base and part of the text encoders that a model is told its captions by, none where they are trained."""
    model = latent_config(config)
    if isinstance(model, LatentBaseConfig | Kandinsky22DecoderConfig):
        return []
    if not isinstance(model, StableDiffusionConfig):
        return [(model.base, "text_encoder")]
    if model.train_text_encoder or _new_token(config):
        return []
    second = [(model.base, "text_encoder_2")] if is_xl(shape_of(model.base, "unet").config) else []
    return [(model.base, "text_encoder"), *second]


def _parameters(base: str, part: str) -> int:
    return sum(parameter.numel() for parameter in build_empty_model(shape_of(base, part)).parameters())


def _frozen(base: str, part: str, precision: DType, *, side: int, count: int) -> Frozen:
    """A frozen model; what an autoencoder holds while it encodes is counted, the others hold little beside their weights."""
    model = build_empty_model(shape_of(base, part))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    encoder = getattr(model, "encoder", None)
    if part not in ("vae", "movq") or not isinstance(encoder, nn.Module):
        return Frozen(part, parameters, precision=precision)
    held, flops = _encoding(encoder, precision, side=side, count=count)
    return Frozen(part, parameters, precision=precision, work_bytes=held, flops_per_image=flops)


def _encoding(encoder: nn.Module, precision: DType, *, side: int, count: int) -> tuple[int, int]:
    """Most bytes that live while `count` images are encoded, the weights aside, and operations of one image."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(torch.empty(1, 3, side, side))
    if precision == "bf16":
        encoder.to(BF16)  # on meta tensors: fake ones do not bear to be moved
    with FakeTensorMode():
        _fill(encoder)
        with LiveBytes() as live, torch.no_grad():
            live.label("weights", encoder.parameters())
            encoder(torch.empty(count, 3, side, side, dtype=BF16 if precision == "bf16" else torch.float32))
            return live.tally.peak - live.tally.now.get("weights", 0), counter.get_total_flops()


def _vae_of(model: LatentBaseConfig | StableDiffusionConfig) -> str:
    return model.autoencoder if isinstance(model, LatentBaseConfig) else model.base


def _new_token(config: RunConfig) -> bool:
    return config.dreambooth is not None and config.dreambooth.new_token is not None


def _on_meta(config: RunConfig) -> Trained:
    with torch.device("meta"):
        return build(config)


def _denoiser(module: nn.Module):
    """The module by the methods that all latent denoisers have."""
    return Trained(module, None, None).denoiser


def _variants(config: RunConfig, *, side: int) -> Mapping[str, Callable[[PlanInput], PlanInput]]:
    """Ways out that latent models have: an adapter in the stead of all weights, encoders that are not needed in training, no pictures."""
    model, found = latent_config(config), {}
    if isinstance(config.adaptation, FullAdaptation) and not isinstance(model, LatentBaseConfig):
        lora = config.model_copy(update={"adaptation": LoraAdaptation(rank=_LORA_RANK)})
        found["adaptation.kind=lora"] = lambda plan: replace(plan, build=lambda: build(lora).module)
    inpaints = config.objective.kind == "latent_denoising" and config.objective.inpainting is not None
    if model.latents == "encode" and not inpaints and config.dreambooth is None and not config.data.horizontal_flip:
        stored = config.model_copy(update={"model": model.model_copy(update={"latents": "stored"})})
        found["model.latents=stored"] = lambda plan: replace(
            plan, frozen=frozen_encoders(stored, side=side), drawing=drawing_models(stored) if plan.drawing else ()
        )
    if drawing_models(config):
        found["logging.sample_every_steps=0"] = lambda plan: replace(plan, drawing=())
    return found
