"""From micro-batches to what latent models take: clean latents x_0 and their conditioning, by frozen encoders or from the shards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_shards.config import Field
from data_shards.encoders.image import ImageEncoder, image_encoder
from data_shards.encoders.text import TextEncoder
from data_shards.encoders.vae import LatentEncoder
from data_shards.files import read_json_object
from data_shards.reading.sample import MicroBatch
from trainer.config import (
    Kandinsky22DecoderConfig,
    Kandinsky22PriorConfig,
    LatentBaseConfig,
    RunConfig,
    StableDiffusionConfig,
    WuerstchenPriorConfig,
)
from trainer.diffusion.posterior import sample_posterior
from trainer.draws import LatentDraws
from trainer.engines.frozen import place_frozen
from trainer.latents.base import find_part
from trainer.latents.trained import Trained, latent_config, latent_objective, vae_channels
from trainer.latents.xl import encode_xl
from trainer.masks import MaskKind, draw_masks, latent_mask
from trainer.models.deprecated import PriorTransformer
from trainer.models.frozen_inputs import TextState, image_states, latents, text_states
from trainer.models.inpainting import masked_pixels
from trainer.models.kandinsky import image_statistics
from trainer.models.stable_diffusion import is_xl
from trainer.models.wuerstchen import to_prior_latents

Cond = dict[str, Tensor]
Encode = Callable[[MicroBatch, LatentDraws, Tensor | None], tuple[Tensor, Cond]]


@final
@dataclass(frozen=True, eq=False)
class Inputs:
    """How a latent model is fed. Frozen encoders are on this rank's device."""

    fields: tuple[Field, ...]
    """What the reader delivers."""
    channels: int
    """Of x_0."""
    cell: int | None
    """Side in pixels of a latent's element; None for embeddings, which have no sides."""
    stored: str
    """The member of shards that x_0 is made of where it is not encoded here."""
    has_posterior: bool
    """Whether x_0 is drawn from an autoencoder's moments."""
    encode: Encode
    """(batch with the prompts that count in `captions`, draws, masks of pixels or None) -> x_0, cond."""
    vae: LatentEncoder | None = None
    text: TextEncoder | None = None
    text_2: TextEncoder | None = None
    """XL's second one."""
    image: ImageEncoder | None = None
    prompts: Callable[[MicroBatch, Bool[Tensor, " b"]], Cond] | None = None
    """(batch, which captions are left out) -> cond, of Stable Diffusion, where it is wanted apart from x_0."""
    unscaled: Callable[[Tensor], Tensor] | None = None
    """x_0 back on its encoder's scale, where a pipeline has to ask for it: of Kandinsky's prior."""

    def shape(self, batch: MicroBatch) -> tuple[int, ...]:
        """Of a micro-batch's x_0. Raises: ValueError for images that have no whole latent."""
        if self.stored in batch.tensors:
            return (len(batch.keys), self.channels, *batch.tensors[self.stored].shape[2:])
        count, _, height, width = batch.images.shape
        return (count, *self.latent_shape(height, width))

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Of one image's x_0, from its sides in pixels. Raises: ValueError if it has no whole latent."""
        if self.cell is None:
            return (self.channels,)
        if height % self.cell or width % self.cell:
            raise ValueError(f"images of {width} x {height} pixels have no whole cells of {self.cell}; set data.image_size to a multiple")
        return (self.channels, height // self.cell, width // self.cell)


def needed_fields(config: RunConfig) -> tuple[Field, ...]:
    """What the reader delivers for a recipe's model."""
    model, fields = config.model, []
    stored_latents, stored_text = getattr(model, "latents", "encode") == "stored", getattr(model, "text", "encode") == "stored"
    match model:
        case LatentBaseConfig() | StableDiffusionConfig():
            fields += ["latents.npy"] if stored_latents else ["image"]
        case WuerstchenPriorConfig() | Kandinsky22PriorConfig():
            fields += ["image.npy"] if stored_latents else ["image"]
        case Kandinsky22DecoderConfig():
            return ("latents.npy", "image.npy") if stored_latents else ("image",)
        case _:
            return ("image",)
    if stored_text:
        fields += ["text.npy", *(["pooled.npy", "text_mask.npy"] if isinstance(model, Kandinsky22PriorConfig) else [])]
    elif config.dreambooth is None or config.dreambooth.instance_prompt is None:
        fields.append("caption")
    if config.objective.kind == "latent_denoising" and config.objective.inpainting and config.objective.inpainting.source == "stored":
        fields.append("mask.png")
    return tuple(fields)


def build_inputs(config: RunConfig, trained: Trained, *, device: torch.device) -> Inputs:
    """The encoders that a recipe needs, and how they are used. Collective where one is large enough to be shared among the ranks.

    Raises: ValueError if one is not there, or of another kind."""
    model = latent_config(config)
    match model:
        case LatentBaseConfig() | StableDiffusionConfig():
            return _stable_diffusion(config, trained, model, device=device)
        case WuerstchenPriorConfig():
            text = None if model.text == "stored" else _text(config, model.base, masks=True, device=device)
            dropped = _dropped_text(config, text, model.base, ("text",), masks=True, device=device)
            image = None if model.latents == "stored" else _image(config, model.image_encoder or model.base, device=device)

            def encode_prior(batch: MicroBatch, draws: LatentDraws, masks: Tensor | None) -> tuple[Tensor, Cond]:
                return to_prior_latents(image_states(batch, image, device=device)), dropped(batch, draws.caption_dropped)

            return Inputs(needed_fields(config), 16, 32, "image.npy", False, encode_prior, text=text, image=image)
        case Kandinsky22PriorConfig():
            assert isinstance(trained.module.prior, PriorTransformer), "Kandinsky's prior is one"
            statistics = image_statistics(trained.module.prior)
            width = int(trained.module.prior.config["embedding_dim"])
            names: tuple[TextState, ...] = ("text", "pooled", "text_mask")
            text = None if model.text == "stored" else _text(config, model.base, masks=False, device=device)
            dropped = _dropped_text(config, text, model.base, names, masks=False, device=device)
            image = None if model.latents == "stored" else _image(config, model.base, device=device)

            def encode_embedding(batch: MicroBatch, draws: LatentDraws, masks: Tensor | None) -> tuple[Tensor, Cond]:
                embeds = statistics.standardise(image_states(batch, image, device=device))
                return embeds, dropped(batch, draws.caption_dropped)

            def unscaled(embeds: Tensor) -> Tensor:
                return embeds * statistics.std.to(embeds) + statistics.mean.to(embeds)

            fields = needed_fields(config)
            return Inputs(fields, width, None, "image.npy", False, encode_embedding, text=text, image=image, unscaled=unscaled)
        case Kandinsky22DecoderConfig():
            image = None if model.latents == "stored" else _image(config, model.prior, device=device)
            movq = None if model.latents == "stored" else _vae(config, model.base, device=device)

            def encode_image(batch: MicroBatch, draws: LatentDraws, masks: Tensor | None) -> tuple[Tensor, Cond]:
                return latents(batch, movq, device=device), {"image": image_states(batch, image, device=device)}

            return Inputs(needed_fields(config), 4, 8, "latents.npy", False, encode_image, vae=movq, image=image)


def _stable_diffusion(
    config: RunConfig, trained: Trained, model: LatentBaseConfig | StableDiffusionConfig, *, device: torch.device
) -> Inputs:
    base = model.autoencoder if isinstance(model, LatentBaseConfig) else model.base
    stored = model.latents == "stored"
    scale, side, channels = _vae_facts(base, config)
    _check_channels(config, trained, base, channels)
    vae = None if stored else _vae(config, base, device=device)
    text, text_2, prompts = None, None, None
    xl = is_xl(trained.network.config)
    layer = "penultimate" if xl else "last"
    if trained.tokenizer is not None:
        prompts = _tokens(trained.tokenizer, device=device)
    else:
        assert isinstance(model, StableDiffusionConfig), "a model from scratch trains its text encoder"
        text = None if model.text == "stored" else _text(config, model.base, masks=False, device=device, layer=layer)
        prompts = _dropped_text(config, text, model.base, ("text",), masks=False, device=device)
    if xl and text is not None:
        text_2 = _text(config, base, masks=False, device=device, layer=layer, part="text_encoder_2")
        prompts = _xl_prompts(text, text_2, side, device=device)

    def encode(batch: MicroBatch, draws: LatentDraws, masks: Tensor | None) -> tuple[Tensor, Cond]:
        assert draws.posterior is not None, "asked for with has_posterior"
        noise = draws.posterior.to(device)
        x_0 = sample_posterior(latents(batch, vae, device=device), noise) * scale
        cond = prompts(batch, draws.caption_dropped)
        if masks is not None:
            assert vae is not None, "the recipe's own check refuses stored latents with masks"
            pixels = batch.images.to(device, torch.float32).mul_(2 / 255).sub_(1)
            masks = masks.to(device)
            moments = vae.encode_scaled(masked_pixels(pixels, masks)).float()
            # The same noise: where nothing is masked, both latents are one.
            cond |= {"mask": latent_mask(masks, side), "masked_latents": sample_posterior(moments, noise) * scale}
        return x_0, cond

    return Inputs(needed_fields(config), channels, side, "latents.npy", True, encode, vae=vae, text=text, text_2=text_2, prompts=prompts)


def _vae_facts(base: str, config: RunConfig) -> tuple[float, int, int]:
    """A VAE's scaling factor, the side of a latent cell in pixels, and a latent's channels."""
    found = read_json_object(find_part(base, "vae", revision=getattr(config.model, "revision", None)).folder / "config.json")
    widths = found.get("block_out_channels")
    assert isinstance(widths, list), "an AutoencoderKL has levels"
    scale = found.get("scaling_factor")
    return (float(scale) if isinstance(scale, int | float) else 0.18215), 2 ** (len(widths) - 1), vae_channels(found)


def _check_channels(config: RunConfig, trained: Trained, base: str, channels: int) -> None:
    """Raises: ValueError if the U-Net does not take and give this VAE's latents."""
    unet = trained.network.config
    inpaints = latent_objective(config).inpainting is not None
    wanted = {"in_channels": 2 * channels + 1 if inpaints else channels, "out_channels": channels}
    for name, number in wanted.items():
        if unet[name] != number:
            what = f"{base}: its VAE makes latents of {channels} channels, of which the U-Net wants {name}={number}"
            mend = "give a pipeline in model.base whose unet/ and vae/ were trained together"
            raise ValueError(f"{what}{' to inpaint' if inpaints else ''}, and has {unet[name]}; {mend}")


def _tokens(tokenizer: PreTrainedTokenizerBase, *, device: torch.device) -> Callable[[MicroBatch, Tensor], Cond]:
    """Captions as tokens, for a text encoder that is trained."""

    def encode(batch: MicroBatch, dropped: Tensor) -> Cond:
        prompts = _kept(batch, dropped)
        padded = tokenizer(prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt")
        return {"input_ids": padded["input_ids"].to(device)}

    return encode


def _dropped_text(
    config: RunConfig, encoder: TextEncoder | None, base: str, names: Sequence[TextState], *, masks: bool, device: torch.device
) -> Callable[[MicroBatch, Bool[Tensor, " b"]], Cond]:
    """Text states of captions, those that are dropped being of the empty one."""
    if encoder is not None and (few := _only_prompts(config)):
        made = {prompt: _states_of(prompt, encoder, names, device=device) for prompt in few}

        def looked_up(batch: MicroBatch, dropped: Bool[Tensor, " b"]) -> Cond:
            states = [made[prompt] for prompt in _kept(batch, dropped)]
            return {name: torch.cat([state[name] for state in states]) for name in states[0]}

        return looked_up
    if encoder is not None:
        return lambda batch, dropped: text_states(replace(batch, captions=_kept(batch, dropped)), encoder, names, device=device)
    empty: Mapping[str, Tensor] = {}
    objective = latent_objective(config)
    if objective.caption_dropout or (objective.halving is not None and objective.halving.guidance_scale != 1):
        # The shards hold the states of captions alone: the empty one's are made once, and the encoder is let go.
        empty = _states_of("", _text(config, base, masks=masks, device=device), names, device=device)

    def stored(batch: MicroBatch, dropped: Bool[Tensor, " b"]) -> Cond:
        states = text_states(batch, None, names, device=device)
        if not empty:
            return states
        left_out = dropped.to(device)
        return {name: torch.where(left_out.view(-1, *[1] * (state.ndim - 1)), empty[name], state) for name, state in states.items()}

    return stored


def _only_prompts(config: RunConfig) -> tuple[str, ...]:
    """All prompts of a run that gives its images none of their own; none where each image has its caption."""
    dreambooth = config.dreambooth
    if dreambooth is None or dreambooth.instance_prompt is None:
        return ()
    return tuple(dict.fromkeys((dreambooth.instance_prompt, dreambooth.class_prompt or "", "")))


def _states_of(prompt: str, encoder: TextEncoder, names: Sequence[TextState], *, device: torch.device) -> dict[str, Tensor]:
    """Of one prompt, encoded alone: the same numbers whatever stands beside it in a micro-batch."""
    alone = MicroBatch(torch.empty(0, 3, 0, 0, dtype=torch.uint8), (prompt,), captions=(prompt,))
    return text_states(alone, encoder, names, device=device)


def _kept(batch: MicroBatch, dropped: Bool[Tensor, " b"]) -> list[str]:
    """Captions, empty ones where they are dropped or missing."""
    return ["" if left_out or caption is None else caption for caption, left_out in zip(batch.captions, dropped.tolist(), strict=True)]


def _vae(config: RunConfig, base: str, *, device: torch.device) -> LatentEncoder:
    precision = latent_config(config).frozen_precision
    vae = LatentEncoder(_named(config, base), precision=precision, device=device, holds_bf16=precision == "bf16")
    place_frozen(vae.module, (), shard_above_gib=config.engine.shard_frozen_above_gib)
    return vae


def _xl_prompts(first: TextEncoder, second: TextEncoder, side: int, *, device: torch.device) -> Callable[[MicroBatch, Tensor], Cond]:
    """XL's conditioning. side: pixels of a latent cell, for latents that are stored."""

    def encode(batch: MicroBatch, dropped: Tensor) -> Cond:
        stored = batch.tensors.get("latents.npy")
        height, width = batch.images.shape[2:] if stored is None else (side * stored.shape[2], side * stored.shape[3])
        return encode_xl(first, second, _kept(batch, dropped), size=(height, width), device=device)

    return encode


def _text(
    config: RunConfig,
    base: str,
    *,
    masks: bool,
    device: torch.device,
    layer: Literal["last", "penultimate"] = "last",
    part: Literal["text_encoder", "text_encoder_2"] = "text_encoder",
) -> TextEncoder:
    precision = latent_config(config).frozen_precision
    text = TextEncoder(
        _named(config, base),
        layer=layer,
        tokens=0,
        masks=masks,
        precision=precision,
        device=device,
        holds_bf16=precision == "bf16",
        part=part,
    )
    place_frozen(text.module, text.units(), shard_above_gib=config.engine.shard_frozen_above_gib)
    return text


def _image(config: RunConfig, base: str, *, device: torch.device) -> ImageEncoder:
    precision = latent_config(config).frozen_precision
    if (
        isinstance(config.model, WuerstchenPriorConfig)
        and config.model.image_encoder is None
        and not (Path(base) / "image_encoder").is_dir()
    ):
        raise ValueError(
            f"{base}: has no image_encoder/, the EfficientNet whose latents the prior learns; fetch its weights with "
            "`hf download dome272/wuerstchen model_v2_stage_b.pt` and set model.image_encoder to that file"
        )
    image = image_encoder(_named(config, base), precision=precision, device=device, holds_bf16=precision == "bf16")
    place_frozen(image.module, image.units(), shard_above_gib=config.engine.shard_frozen_above_gib)
    return image


def _named(config: RunConfig, base: str) -> str:
    """A Hub id of the recipe's base with its revision, as the encoders take it."""
    revision = getattr(config.model, "revision", None)
    return f"{base}@{revision}" if revision is not None and base == getattr(config.model, "base", None) else base


def drawn_masks(config: RunConfig, batch: MicroBatch, step: int, *, side: int) -> Float[Tensor, "b 1 h w"] | None:
    """The masks of a micro-batch, 1 where the model fills: drawn for each sample and step, or the sample's own; None without inpainting."""
    masks = latent_objective(config).inpainting
    if masks is None:
        return None
    if masks.source == "stored":
        return batch.tensors["mask.png"].float()
    shares: dict[MaskKind, float] = {
        "rectangle": masks.rectangle,
        "ellipse": masks.ellipse,
        "brush": masks.brush,
        "outpainting": masks.outpainting,
        "full": masks.full,
    }
    return draw_masks(config.seed, step, batch.keys, size=(batch.images.shape[2], batch.images.shape[3]), shares=shares, cell=side)


def flipped(images: UInt8[Tensor, "b c h w"], flips: Bool[Tensor, " b"]) -> UInt8[Tensor, "b c h w"]:
    """Images or masks of bytes, those with a flip mirrored left to right."""
    return images.where(~flips[:, None, None, None], images.flip(3))
