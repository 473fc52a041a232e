"""Stock pipelines as painters: what each family of them is called with, and what comes back."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Protocol, cast

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from jaxtyping import Float, UInt8
from torch import Generator, Tensor

from trainer.models.deprecated import KandinskyV22Pipeline, KandinskyV22PriorPipeline, WuerstchenDecoderPipeline, WuerstchenPriorPipeline
from trainer.prompting.pictures import Paint, PictureRequest, Tick, to_bytes


class _Drawn(Protocol):
    """What these pipelines return of images, asked for as np."""

    images: Float[np.ndarray, "b h w c"]


class _Latents(Protocol):
    """What Wuerstchen's prior returns, asked for as pt."""

    image_embeddings: Tensor


class _Embeds(Protocol):
    """What Kandinsky's prior returns, asked for as pt."""

    image_embeds: Tensor
    negative_image_embeds: Tensor


def painter(pipeline: DiffusionPipeline, decoder: DiffusionPipeline | None = None) -> Paint:
    """A pipeline, or a prior's with its decoder's, as a painter; switches progress bar and safety checker off.

    Raises: ValueError if these two do not make one."""
    match pipeline, decoder:
        case StableDiffusionPipeline(), None:
            return stable_diffusion(pipeline)
        case StableDiffusionXLPipeline(), None:
            return stable_diffusion_xl(pipeline)
        case StableDiffusionInpaintPipeline(), None:
            return inpainting(pipeline)
        case WuerstchenPriorPipeline(), WuerstchenDecoderPipeline():
            return wuerstchen(pipeline, decoder)
        case KandinskyV22PriorPipeline(), KandinskyV22Pipeline():
            return kandinsky22(pipeline, decoder)
    beside = f" with {type(decoder).__name__}" if decoder is not None else ""
    raise ValueError(f"{type(pipeline).__name__}{beside} does not draw prompts; wanted Stable Diffusion's, or a prior with its decoder")


def stable_diffusion(pipeline: StableDiffusionPipeline) -> Paint:
    """Text to image by Stable Diffusion 1 and 2."""
    pipeline.register_modules(safety_checker=None)
    return _of_text(pipeline)


def stable_diffusion_xl(pipeline: StableDiffusionXLPipeline) -> Paint:
    """Text to image by Stable Diffusion XL."""
    return _of_text(pipeline)


def _of_text(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline) -> Paint:
    pipeline.set_progress_bar_config(disable=True)
    run = cast("Callable[..., _Drawn]", pipeline)

    def paint(requests: Sequence[PictureRequest], generators: list[Generator], tick: Tick) -> UInt8[Tensor, "b h w c"]:
        rescale = requests[0].guidance_rescale
        return to_bytes(run(generator=generators, guidance_rescale=rescale, **_text(requests), **_size(requests), **_output(tick)).images)

    return paint


def inpainting(pipeline: StableDiffusionInpaintPipeline) -> Paint:
    """Inpainting by a U-Net of 9 channels, or by one of 4 that is shown the kept part at every step."""
    pipeline.register_modules(safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    run = cast("Callable[..., _Drawn]", pipeline)

    def paint(requests: Sequence[PictureRequest], generators: list[Generator], tick: Tick) -> UInt8[Tensor, "b h w c"]:
        _check_no_rescale(requests)
        if requests[0].image is None or requests[0].mask is None:
            raise ValueError("an inpainting model needs an image and a mask; give --image FILE and --mask FILE")
        given = {"image": [request.image for request in requests], "mask_image": [request.mask for request in requests]}
        return to_bytes(run(generator=generators, **given, **_text(requests), **_size(requests), **_output(tick)).images)

    return paint


def wuerstchen(prior: WuerstchenPriorPipeline, decoder: WuerstchenDecoderPipeline) -> Paint:
    """Text to image by Wuerstchen: the prior draws 16-channel latents, the decoder images of them, from the same generators."""
    prior.set_progress_bar_config(disable=True)
    decoder.set_progress_bar_config(disable=True)
    compose, render = cast("Callable[..., _Latents]", prior), cast("Callable[..., _Drawn]", decoder)

    def paint(requests: Sequence[PictureRequest], generators: list[Generator], tick: Tick) -> UInt8[Tensor, "b h w c"]:
        _check_no_rescale(requests)
        latents = compose(generator=generators, output_type="pt", **_text(requests), **_size(requests), **_ticking(tick)).image_embeddings
        settings = {**_decoder(requests), **_output(tick)}
        images = []
        # The decoder repeats every prompt for every latent, so that one call of it takes one prompt only.
        for texts, numbers in groupby(range(len(requests)), lambda number: (requests[number].prompt, requests[number].negative_prompt)):
            part = list(numbers)
            named = {"prompt": texts[0], "negative_prompt": texts[1], "generator": [generators[number] for number in part]}
            images.append(to_bytes(render(latents[part], **named, **settings).images))
        return torch.cat(images)

    return paint


def kandinsky22(prior: KandinskyV22PriorPipeline, decoder: KandinskyV22Pipeline) -> Paint:
    """Text to image by Kandinsky 2.2: the prior draws CLIP image embeddings, the decoder images of them, from the same generators."""
    prior.set_progress_bar_config(disable=True)
    decoder.set_progress_bar_config(disable=True)
    compose, render = cast("Callable[..., _Embeds]", prior), cast("Callable[..., _Drawn]", decoder)

    def paint(requests: Sequence[PictureRequest], generators: list[Generator], tick: Tick) -> UInt8[Tensor, "b h w c"]:
        _check_no_rescale(requests)
        # A negative prompt is an image embedding too, drawn in the same call from the same generators, which then are twice as many.
        own = generators if requests[0].negative_prompt is None else generators * 2
        embeds = compose(generator=own, output_type="pt", **_text(requests), **_ticking(tick))
        settings = {**_decoder(requests), **_size(requests), **_output(tick)}
        return to_bytes(render(embeds.image_embeds, embeds.negative_image_embeds, generator=generators, **settings).images)

    return paint


def _text(requests: Sequence[PictureRequest]) -> Mapping[str, object]:
    """The texts, and of the other settings what the requests say."""
    first = requests[0]
    negative = None if first.negative_prompt is None else [request.negative_prompt for request in requests]
    given = {"num_inference_steps": first.steps, "guidance_scale": first.guidance_scale, "negative_prompt": negative}
    return {"prompt": [request.prompt for request in requests], **_named(given)}


def _size(requests: Sequence[PictureRequest]) -> Mapping[str, object]:
    size = requests[0].size
    return {} if size is None else {"height": size[0], "width": size[1]}


def _decoder(requests: Sequence[PictureRequest]) -> Mapping[str, object]:
    return _named({"num_inference_steps": requests[0].decoder_steps, "guidance_scale": requests[0].decoder_guidance_scale})


def _named(given: Mapping[str, object]) -> Mapping[str, object]:
    return {name: value for name, value in given.items() if value is not None}


def _output(tick: Tick) -> Mapping[str, object]:
    return {"output_type": "np", **_ticking(tick)}


def _ticking(tick: Tick) -> Mapping[str, object]:
    def after_step(pipeline: DiffusionPipeline, step: int, timestep: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tick()
        return {}

    return {"callback_on_step_end": after_step}


def _check_no_rescale(requests: Sequence[PictureRequest]) -> None:
    if requests[0].guidance_rescale:
        raise ValueError(f"guidance_rescale={requests[0].guidance_rescale} is for text to image by Stable Diffusion alone; leave it at 0")
