"""What a latent model draws while it trains: fixed prompts and seeds, the base beside it, by stock pipelines around the engine."""

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from data_shards import ranks
from data_shards.encoders.files import encoder_sha256, find_pipeline
from data_shards.encoders.precision import autocast
from data_shards.files import replace_file
from data_shards.reading.sample import MicroBatch
from trainer.config import Kandinsky22DecoderConfig, Kandinsky22PriorConfig, RunConfig, WuerstchenPriorConfig
from trainer.latents.inputs import Inputs
from trainer.latents.pipelines import Parts, assemble
from trainer.latents.sizes import picture_side
from trainer.latents.stand_ins import TextStandIn, stand_in
from trainer.latents.trained import Trained, latent_config, latent_objective
from trainer.masks import draw_masks
from trainer.metrics import Drawn
from trainer.models.network import Network
from trainer.prompting.clip_score import ClipScore, mean_scores
from trainer.prompting.folder import load_pipeline, place_parts
from trainer.prompting.painters import painter
from trainer.prompting.pictures import Paint, PictureRequest, Tick, draw_on_ranks, no_tick
from trainer.prompting.sheet import SheetGroup, draw_sheet, masked_input
from trainer.sample import png

logger = logging.getLogger(__name__)

Examples = Callable[[int], MicroBatch]
"""The first so many training samples, the same in every run of this data."""
_BATCH_SIZE = 4
_ROWS = 3
"""Prompts of a recipe that names none: captions of the first samples."""
_BASE = "base"


def companion_of(config: RunConfig) -> str | None:
    """What a prior or a decoder draws together with, as its recipe says; None for models that draw on their own."""
    match latent_config(config):
        case WuerstchenPriorConfig() | Kandinsky22PriorConfig() as model:
            return model.decoder
        case Kandinsky22DecoderConfig() as model:
            return model.prior
        case _:
            return None


def can_draw(config: RunConfig) -> bool:
    """Whether a recipe says what is needed to turn what its model draws into pixels."""
    return companion_of(config) is not None or not isinstance(config.model, WuerstchenPriorConfig | Kandinsky22PriorConfig)


def shared_parts(inputs: Inputs, companion: str) -> dict[str, nn.Module]:
    """Of the models that encode the data those that the companion's pipeline has, too, by their name there: its files are the same."""
    folder = find_pipeline(companion) / "image_encoder"
    if inputs.image is None or not folder.is_dir() or encoder_sha256(folder) != inputs.image.to_json().get("sha256"):
        return {}
    return {folder.name: inputs.image.module}


def sheet_requests(
    config: RunConfig,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    size: tuple[int, int] | None,
    masked: Sequence[tuple[Image.Image, Image.Image]] | None = None,
) -> list[PictureRequest]:
    """Every prompt with every seed, as a recipe validates. masked: of each prompt the image and the mask that is filled."""
    validation, steps, decoder_steps = config.validation, config.logging.sample_steps, config.validation.companion_steps
    if isinstance(config.model, Kandinsky22DecoderConfig):
        steps, decoder_steps = decoder_steps, steps
    return [
        PictureRequest(
            prompt=prompt,
            seed=seed,
            negative_prompt=validation.negative_prompt or None,
            guidance_scale=validation.guidance_scale,
            steps=steps,
            decoder_steps=decoder_steps,
            size=size,
            image=masked[row][0] if masked else None,
            mask=masked[row][1] if masked else None,
        )
        for row, prompt in enumerate(prompts)
        for seed in seeds
    ]


@final
class Pictures:
    """The validation pictures of one run."""

    def __init__(self, config: RunConfig, run_dir: Path, trained: Trained, inputs: Inputs, *, image_size: int, examples: Examples) -> None:
        """image_size: side of the training images in pixels."""
        self.config, self.run_dir, self.trained, self.inputs = config, run_dir, trained, inputs
        self.image_size, self.examples = picture_side(config, image_size) or image_size, examples
        self.seeds = [config.validation.seed + number for number in range(config.logging.sample_images)]
        self.network: Network | None = None
        """The one that draws at the moment."""

    def draw(self, network: Network, step: int) -> Drawn:
        """The sheet of a network, beside the base's pictures, which the network itself draws at step 0. Collective."""
        pictures = self._drawn(network, self.prompts)
        if step == 0:
            bases = self.config.validation.base_prompts
            base = pictures if not bases or bases == self.prompts else self._drawn(network, bases)
            self._keep_base(base)
        scores = self._scores(pictures)
        notes = [f"CLIP score {score:.1f}" for score in scores]
        groups = [SheetGroup(f"step {step}", pictures)]
        if (base := self._base(pictures)) is not None:
            groups.insert(0, SheetGroup(_BASE, base))
        sheet = draw_sheet(self.prompts, groups, seeds=self.seeds, given=self._given(), notes=notes)
        return Drawn(sheet, {"clip_score": sum(scores) / len(scores)} if scores else {})

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """The recipe's, else the captions of the first samples."""
        if self.config.validation.prompts:
            return tuple(self.config.validation.prompts)
        if self.config.dreambooth and self.config.dreambooth.instance_prompt:
            return (self.config.dreambooth.instance_prompt,)
        captions = self.examples(_ROWS).captions
        return tuple(dict.fromkeys(caption or "" for caption in captions)) or ("",)

    @cached_property
    def masked(self) -> list[tuple[Image.Image, Image.Image]] | None:
        """Of each prompt what is filled: one of the first samples and a mask; None for text to image."""
        masks = latent_objective(self.config).inpainting
        if masks is None:
            return None
        batch = self.examples(len(self.prompts))
        size = (self.image_size, self.image_size)
        drawn = draw_masks(self.config.seed, 0, batch.keys, size=size, shares={"rectangle": 1.0})
        pairs = []
        for image, mask in zip(batch.images, drawn, strict=True):
            pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
            pairs.append((pixels.resize(size), Image.fromarray((mask[0].numpy() * 255).astype(np.uint8))))
        return [pairs[number % len(pairs)] for number in range(len(self.prompts))]

    def draw_requests(self, network: Network, requests: Sequence[PictureRequest], *, tick: Tick = no_tick) -> UInt8[Tensor, "b h w c"]:
        """What a network draws of any requests. Collective."""
        self.network = network
        with autocast(ranks.device(), latent_config(self.config).frozen_precision), torch.no_grad():
            return draw_on_ranks(self._paint, requests, batch_size=_BATCH_SIZE, tick=tick)

    def _drawn(self, network: Network, prompts: Sequence[str]) -> UInt8[Tensor, "p s h w c"]:
        size = (self.image_size, self.image_size)
        drawn = self.draw_requests(network, sheet_requests(self.config, prompts, self.seeds, size=size, masked=self.masked))
        return drawn.view(len(prompts), len(self.seeds), *drawn.shape[1:])

    def _predict(self, *inputs: object) -> Tensor:
        assert self.network is not None, "a network draws"
        return self.network(*inputs)

    @cached_property
    def _paint(self) -> Paint:
        """Stock pipelines around the network, put together once; frozen parts are those that encode the data, where there are any."""
        device, precision = ranks.device(), latent_config(self.config).frozen_precision
        image = None if self.inputs.image is None else self.inputs.image.module
        parts = Parts(
            text_encoder=TextStandIn() if self.trained.tokenizer is not None else self.inputs.text and self.inputs.text.module,
            text_encoder_2=self.inputs.text_2 and self.inputs.text_2.module,
            tokenizer=self.trained.tokenizer,
            vae=self.inputs.vae and self.inputs.vae.module,
            image_encoder=image,
        )
        network = stand_in(self.trained, self._predict, device=device, tick=no_tick, unscaled=self.inputs.unscaled)
        pipeline = assemble(self.config, network, parts, device=torch.device("cpu"))
        place_parts(pipeline, device=device, precision=precision, but=[parts.text_encoder, parts.text_encoder_2, parts.vae, image])
        other = companion_of(self.config)
        if other is None:
            return painter(pipeline)
        companion = load_pipeline(find_pipeline(other), device=device, precision=precision, parts=shared_parts(self.inputs, other))
        is_decoder = isinstance(self.config.model, Kandinsky22DecoderConfig)
        return painter(companion, pipeline) if is_decoder else painter(pipeline, companion)

    def _given(self) -> UInt8[Tensor, "p h w c"] | None:
        if self.masked is None:
            return None
        size = (self.image_size, self.image_size)
        return torch.stack([torch.from_numpy(masked_input(image, mask, size)) for image, mask in self.masked])

    def _scores(self, pictures: UInt8[Tensor, "p s h w c"]) -> list[float]:
        """The CLIP score of each prompt's pictures, where the recipe names a model for it."""
        if self.config.validation.clip is None:
            return []
        repeated = [prompt for prompt in self.prompts for _ in self.seeds]
        scores = mean_scores(self._clip.scores(pictures.flatten(0, 1), repeated), repeated)
        return [scores[prompt] for prompt in self.prompts]

    @cached_property
    def _clip(self) -> ClipScore:
        assert self.config.validation.clip is not None, "asked only where the recipe names one"
        return ClipScore(self.config.validation.clip, device=ranks.device())

    def _keep_base(self, pictures: UInt8[Tensor, "p s h w c"]) -> None:
        """What the base draws, kept for the sheets of later steps and attempts."""
        if not ranks.is_rank_0():
            return
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        strip = torch.cat([torch.cat(list(row), dim=1) for row in pictures], dim=0)
        replace_file(folder / f"{_BASE}.png", png(Image.fromarray(strip.numpy())))

    def _base(self, like: UInt8[Tensor, "p s h w c"]) -> Float[Tensor, "p s h w c"] | None:
        """The base's pictures as they were kept, or None where there are none of this shape."""
        path = self.run_dir / "samples" / f"{_BASE}.png"
        if not path.exists():
            return None
        strip = torch.from_numpy(np.array(Image.open(path)))
        prompts, seeds, height, width, channels = like.shape
        if strip.shape != (prompts * height, seeds * width, channels):
            return None
        return strip.view(prompts, height, seeds, width, channels).transpose(1, 2)
