"""What a recipe trains of a base: the network, adapted as the recipe says, and which of its weights learn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, final

from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase

from data_shards.encoders.files import ModelFiles
from data_shards.files import read_json_object
from trainer.adapters.lora import ADDED_ATTENTION_TARGETS, ATTENTION_TARGETS, CLIP_TEXT_TARGETS, add_lora
from trainer.adapters.tokens import ExtendedEmbedding, add_token
from trainer.architectures import read_architecture
from trainer.config import (
    Kandinsky22DecoderConfig,
    Kandinsky22PriorConfig,
    LatentBaseConfig,
    LoraAdaptation,
    RunConfig,
    StableDiffusionConfig,
    WuerstchenPriorConfig,
)
from trainer.config_latent import LatentDenoisingConfig
from trainer.engines.precision import lower_type
from trainer.latents.base import find_part
from trainer.latents.networks import Networks, networks_of, shape_of
from trainer.models.deprecated import PriorTransformer, WuerstchenPrior
from trainer.models.inpainting import INPAINTING_CHANNELS, widen
from trainer.models.kandinsky import KandinskyDecoderDenoiser, KandinskyPriorDenoiser
from trainer.models.stable_diffusion import StableDiffusionDenoiser, is_xl
from trainer.models.wuerstchen import WuerstchenPriorDenoiser
from trainer.rng import generator, seed_weights
from trainer.tiny_models.vocabulary import WORDS, build_tokenizer

Model = TypeVar("Model", bound=nn.Module)
BaseConfig = StableDiffusionConfig | WuerstchenPriorConfig | Kandinsky22PriorConfig | Kandinsky22DecoderConfig
LatentConfig = LatentBaseConfig | BaseConfig
_LATENT_CHANNELS = 4
"""Of an AutoencoderKL whose config does not say."""


class LatentDenoiser(Protocol):
    """A network with the arguments that all latent models take; an nn.Module."""

    def units(self) -> tuple[nn.Module, ...]:
        """The parts whose weights a sharded engine gathers together, in the order of the forward pass; the rest is one more."""
        ...

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        ...


@final
@dataclass(frozen=True, eq=False)
class Trained:
    """A network as it is trained, on the CPU. Parameters that learn are fp32 and require a gradient."""

    module: nn.Module
    """A LatentDenoiser."""
    files: ModelFiles | None
    """Of the network in its base; None where it starts from scratch."""
    tokenizer: PreTrainedTokenizerBase | None
    """With the new tokens, if any; None where no text encoder is trained."""

    @property
    def denoiser(self) -> LatentDenoiser:
        """The module by its further methods."""
        assert isinstance(self.module, _DENOISERS), f"{type(self.module).__name__} is no latent denoiser"
        return self.module

    @property
    def network(self) -> ModelMixin:
        """The U-Net or prior in it."""
        match self.module:
            case StableDiffusionDenoiser() | KandinskyDecoderDenoiser() as module:
                return module.unet
            case WuerstchenPriorDenoiser() | KandinskyPriorDenoiser() as module:
                return module.prior
            case other:
                raise ValueError(f"{type(other).__name__} is no latent denoiser")


_DENOISERS = (StableDiffusionDenoiser, WuerstchenPriorDenoiser, KandinskyPriorDenoiser, KandinskyDecoderDenoiser)


def build_trained(config: RunConfig, networks: Networks | None = None) -> Trained:
    """The network that a latent model's recipe trains, with the weights that it starts with; the same on every rank.

    networks: where the base's parts come from; None for the base itself. A model from scratch has none: any says that shapes are enough.
    Raises: ValueError if the base is not there, or does not fit the recipe."""
    model = latent_config(config)
    if isinstance(model, LatentBaseConfig):
        files = None if networks else find_part(model.autoencoder, "vae", revision=None)
        vae = shape_of(model.autoencoder, "vae").config if files is None else read_json_object(files.folder / "config.json")
        trained = _latent_base(config, model, vae_channels(vae))
    else:
        trained = _adapted_base(config, model, networks or networks_of(model.base, model.revision))
    _hold_frozen(trained.module, config.engine.precision)
    return trained


def _adapted_base(config: RunConfig, model: BaseConfig, networks: Networks) -> Trained:
    if isinstance(model, StableDiffusionConfig):
        return _stable_diffusion(config, model, networks)
    name = "unet" if isinstance(model, Kandinsky22DecoderConfig) else "prior"
    network, files = networks(name)
    match model, network:
        case WuerstchenPriorConfig(), WuerstchenPrior():
            return Trained(WuerstchenPriorDenoiser(_adapted(config, network, ATTENTION_TARGETS)), files, None)
        case Kandinsky22PriorConfig(), PriorTransformer():
            return Trained(KandinskyPriorDenoiser(_adapted(config, network, ATTENTION_TARGETS)), files, None)
        case Kandinsky22DecoderConfig(), UNet2DConditionModel():
            return Trained(KandinskyDecoderDenoiser(_adapted(config, network, ADDED_ATTENTION_TARGETS)), files, None)
    raise ValueError(f"model.base={model.base}: its {name} is a {type(network).__name__}, which is not of model.kind={model.kind}")


def latent_config(config: RunConfig) -> LatentConfig:
    """The model section of a latent denoiser's recipe. Raises: ValueError for another model's."""
    match config.model:
        case (
            LatentBaseConfig()
            | StableDiffusionConfig()
            | WuerstchenPriorConfig()
            | Kandinsky22PriorConfig()
            | Kandinsky22DecoderConfig() as model
        ):
            return model
        case other:
            raise ValueError(f"model.kind={other.kind} does not denoise latents; wanted a latent model such as stable_diffusion")


def latent_objective(config: RunConfig) -> LatentDenoisingConfig:
    """The objective of a latent denoiser's recipe. Raises: ValueError for another's."""
    if not isinstance(config.objective, LatentDenoisingConfig):
        raise ValueError(f"objective.kind={config.objective.kind} is not of a latent model; set objective.kind=latent_denoising")
    return config.objective


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A pipeline's tokenizer. Nothing of the folder is run."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def small_tokenizer(tokens: int) -> PreTrainedTokenizerBase:
    """CLIP's tokenizer with a small vocabulary of words for captions of pictures. tokens: the longest caption, its ends included."""
    component = read_architecture("stable_diffusion_1_5").components["tokenizer"]
    return build_tokenizer(component.with_config({"model_max_length": tokens}), WORDS)


def _stable_diffusion(config: RunConfig, model: StableDiffusionConfig, networks: Networks) -> Trained:
    unet, files = networks("unet")
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"model.base={model.base}: its unet is a {type(unet).__name__}, wanted a UNet2DConditionModel")
    name = model.base if files is None else files.name
    if latent_objective(config).inpainting is not None:
        if isinstance(config.adaptation, LoraAdaptation) and unet.config["in_channels"] != INPAINTING_CHANNELS:
            raise ValueError(
                f"{name} takes {unet.config['in_channels']} channels, and LoRA leaves its first layer as it is, so that it would "
                "never see a mask; set adaptation.kind=full, or give an inpainting base in model.base"
            )
        widen(unet)
    elif unet.config["in_channels"] == INPAINTING_CHANNELS:
        raise ValueError(
            f"{name} takes {INPAINTING_CHANNELS} channels: it is an inpainting base; "
            "set objective.inpainting={} to train it as one, or give a text-to-image base in model.base"
        )
    text_encoder, tokenizer = None, None
    if is_xl(unet.config):
        _check_xl(config, model)
    token = config.dreambooth.new_token if config.dreambooth else None
    if model.train_text_encoder or token is not None:
        text_encoder, text_files = networks("text_encoder")
        if not isinstance(text_encoder, CLIPTextModel):
            raise ValueError(f"model.base={model.base}: its text_encoder is a {type(text_encoder).__name__}, wanted CLIP's")
        tokenizer = None if text_files is None else load_tokenizer(text_files.beside("tokenizer"))
        if model.train_text_encoder:
            _adapted(config, text_encoder, CLIP_TEXT_TARGETS, purpose="lora of the text encoder", chosen=False)
        else:
            text_encoder.requires_grad_(False)
        if token is not None:
            assert config.dreambooth is not None, "the token is of its section"
            if tokenizer is None:
                _add_row(text_encoder)
            else:
                add_token(tokenizer, text_encoder, token, initializer=config.dreambooth.token_from or _words(config))
    return Trained(StableDiffusionDenoiser(_adapted(config, unet, ATTENTION_TARGETS), text_encoder), files, tokenizer)


def _add_row(text_encoder: CLIPTextModel) -> None:
    """A new token's row in a text encoder of which only the shape counts."""
    embedding = text_encoder.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding), "CLIP's is one"
    text_encoder.set_input_embeddings(ExtendedEmbedding(embedding, embedding.weight[:1]))


def _check_xl(config: RunConfig, model: StableDiffusionConfig) -> None:
    """Raises: ValueError for what is only there for other bases than XL."""
    asked = {
        "model.train_text_encoder=true": model.train_text_encoder,
        "model.text=stored": model.text == "stored",
        "dreambooth.new_token": config.dreambooth is not None and config.dreambooth.new_token is not None,
        "objective.inpainting": latent_objective(config).inpainting is not None,
    }
    for name in (name for name, wanted in asked.items() if wanted):
        raise ValueError(
            f"{name}: not for Stable Diffusion XL, whose two text encoders stay frozen; leave it out, or give another model.base"
        )


def _words(config: RunConfig) -> str:
    """What a new token starts as where the recipe does not say: the words of the class, else those of the prompt beside it."""
    dreambooth = config.dreambooth
    assert dreambooth is not None and dreambooth.new_token is not None, "asked for a new token"
    beside = (dreambooth.instance_prompt or "").replace(dreambooth.new_token, " ").strip()
    return dreambooth.class_prompt or beside or "a"


def vae_channels(config: Mapping[str, object]) -> int:
    """Channels of a VAE's latents, of its config. Raises: ValueError if it is none."""
    channels = config.get("latent_channels", _LATENT_CHANNELS)
    if not isinstance(channels, int) or channels < 1:
        raise ValueError(f"the VAE's config.json says latent_channels={channels!r:.40}, wanted a number from 1; save the VAE again")
    return channels


def _latent_base(config: RunConfig, model: LatentBaseConfig, channels: int) -> Trained:
    seed_weights(config.seed)
    tokenizer = small_tokenizer(model.text_tokens)
    names = {True: ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), False: ("DownBlock2D", "UpBlock2D")}
    unet = UNet2DConditionModel(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=model.channels,  # pyright: ignore[reportArgumentType] (any number of levels)
        layers_per_block=model.layers_per_block,
        down_block_types=tuple(names[attends][0] for attends in model.attention),  # pyright: ignore[reportArgumentType]
        up_block_types=tuple(names[attends][1] for attends in reversed(model.attention)),  # pyright: ignore[reportArgumentType]
        attention_head_dim=tuple(width // model.head_width for width in model.channels),  # pyright: ignore[reportArgumentType] (a count)
        cross_attention_dim=model.text_width,
        norm_num_groups=model.norm_groups,
        use_linear_projection=True,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=model.text_width,
            intermediate_size=4 * model.text_width,
            num_hidden_layers=model.text_layers,
            num_attention_heads=model.text_width // 32,
            max_position_embeddings=model.text_tokens,
            projection_dim=model.text_width,
            bos_token_id=tokenizer.bos_token_id,  # pyright: ignore[reportArgumentType] (one token, one id)
            eos_token_id=tokenizer.eos_token_id,  # pyright: ignore[reportArgumentType]
            pad_token_id=tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
        )
    )
    return Trained(StableDiffusionDenoiser(unet, text_encoder), None, tokenizer)


def _adapted(config: RunConfig, model: Model, usual: Sequence[str], *, purpose: str = "lora", chosen: bool = True) -> Model:
    """The model with an adapter where the recipe wants one, else with all weights learning. chosen: the recipe's targets are for it."""
    adaptation = config.adaptation
    if not isinstance(adaptation, LoraAdaptation):
        model.requires_grad_(True)
        return model
    add_lora(
        model,
        rank=adaptation.rank,
        alpha=adaptation.alpha or adaptation.rank,
        targets=adaptation.targets if chosen and adaptation.targets else usual,
        generator=generator(config.seed, purpose),
        dora=adaptation.dora,
        dropout=adaptation.dropout,
    )
    return model


def _hold_frozen(module: nn.Module, precision: str) -> None:
    """Keep the weights of frozen linear and convolution layers in the type that autocast would give them anyway: half the memory."""
    dtype = lower_type(precision)
    if dtype is None:
        return
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not any(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
            layer.to(dtype)
        if isinstance(layer, LoraLayer) and not any(layer.use_dora.values()):
            # autocast casts what goes into A: to fp32 and back in every layer is the same bits, and 3% of a step. DoRA's norms want fp32.
            layer.cast_input_dtype_enabled = False
