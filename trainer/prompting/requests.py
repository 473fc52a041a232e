"""Requests for pictures from what a user says on the command line, checked, and what is written of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from data_shards.files import replace_file
from trainer.options import Options, integer, optional_integer, optional_number, optional_text
from trainer.prompting.folder import Reads
from trainer.prompting.pictures import PictureRequest
from trainer.prompting.sheet import WHITE, SheetGroup, draw_sheet, masked_input
from trainer.sample import png, write_images

SIZE_MULTIPLE = 8
_FORMATS = ("PNG", "JPEG", "WEBP")


@final
@dataclass(frozen=True)
class Asked:
    """What a user says of the pictures. None leaves a choice to the model's pipeline."""

    prompts: tuple[str, ...] = ()
    images: int = 4
    """Of each prompt; image i has the seed `seed` + i, whatever the prompt."""
    seed: int = 0
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    steps: int | None = None
    size: str | None = None
    """512, or WIDTHxHEIGHT such as 768x512, in pixels."""
    image: Path | None = None
    mask: Path | None = None
    decoder_guidance_scale: float | None = None
    decoder_steps: int | None = None


def asked(options: Options, *, images: int = 4) -> Asked:
    """What a job's options say: prompts, images, seed, negative_prompt, guidance, guidance_rescale, steps, size, image, mask,
    decoder_guidance, decoder_steps; `images` is the default of the second."""
    prompts = options.get("prompts") or ()
    assert isinstance(prompts, list | tuple), f"option prompts is {prompts!r}, wanted a list"
    image, mask = optional_text(options, "image"), optional_text(options, "mask")
    return Asked(
        prompts=tuple(str(prompt) for prompt in prompts),
        images=integer(options, "images", images),
        seed=integer(options, "seed", 0),
        negative_prompt=optional_text(options, "negative_prompt"),
        guidance_scale=optional_number(options, "guidance"),
        guidance_rescale=optional_number(options, "guidance_rescale") or 0.0,
        steps=optional_integer(options, "steps"),
        size=optional_text(options, "size"),
        image=None if image is None else Path(image),
        mask=None if mask is None else Path(mask),
        decoder_guidance_scale=optional_number(options, "decoder_guidance"),
        decoder_steps=optional_integer(options, "decoder_steps"),
    )


def requests_from(asked: Asked, reads: Reads, *, has_decoder: bool = False) -> list[PictureRequest]:
    """One request an image, all images of the first prompt first.

    reads: what the model is told; has_decoder: whether a second network draws the pixels, as Wuerstchen's.
    Raises: ValueError naming the option that is missing, out of range or of no use to such a model."""
    _check_numbers(asked, reads, has_decoder=has_decoder)
    if not asked.prompts:
        raise ValueError('this model draws what a text says; give --prompt TEXT, such as --prompt "a couple"')
    size = None if asked.size is None else parse_size(asked.size)
    image, mask = _image_and_mask(asked, reads)
    return [
        PictureRequest(
            prompt=prompt,
            seed=asked.seed + number,
            negative_prompt=asked.negative_prompt,
            guidance_scale=asked.guidance_scale,
            guidance_rescale=asked.guidance_rescale,
            steps=asked.steps,
            size=size,
            image=image,
            mask=mask,
            decoder_guidance_scale=asked.decoder_guidance_scale,
            decoder_steps=asked.decoder_steps,
        )
        for prompt in asked.prompts
        for number in range(asked.images)
    ]


def refuse_prompts(asked: Asked) -> None:
    """For a model of pixels without text. Raises: ValueError naming the first option that only models of prompts have."""
    given = {
        "--prompt": bool(asked.prompts),
        "--negative-prompt": asked.negative_prompt is not None,
        "--guidance": asked.guidance_scale is not None,
        "--guidance-rescale": asked.guidance_rescale != 0.0,
        "--image": asked.image is not None,
        "--mask": asked.mask is not None,
        "--decoder-guidance": asked.decoder_guidance_scale is not None,
        "--decoder-steps": asked.decoder_steps is not None,
    }
    if asked.size is not None:
        raise ValueError("--size: this model draws images of the size that it was trained on; leave --size out")
    for option, is_given in given.items():
        if is_given:
            raise ValueError(f"{option}: this model draws images of one kind and reads no text; leave {option} out")


def parse_size(text: str) -> tuple[int, int]:
    """Height and width in pixels of `512` or `WIDTHxHEIGHT`.

    Raises: ValueError if it is neither, or no multiple of 8."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and side.isascii() for side in sides):
        raise ValueError(f"--size {text} is no size; give pixels a side such as 512, or WIDTHxHEIGHT such as 768x512")
    width, height = int(sides[0]), int(sides[-1])
    for side in (width, height):
        if side < SIZE_MULTIPLE or side % SIZE_MULTIPLE:
            near = max(SIZE_MULTIPLE, round(side / SIZE_MULTIPLE) * SIZE_MULTIPLE)
            raise ValueError(f"--size {text}: {side} is no multiple of {SIZE_MULTIPLE}; give {near}")
    return height, width


def write_pictures(out: Path, requests: Sequence[PictureRequest], images: UInt8[Tensor, "b h w c"], *, title: str) -> Path:
    """Write a .png, or a folder of grid.png and single images; returns the picture of all.

    It is a sheet with texts where there are several prompts or a mask, of the same number of images each; else a plain grid."""
    prompts = list(dict.fromkeys(request.prompt for request in requests))
    written = write_images(out, images)
    first = requests[0]
    if len(prompts) == 1 and first.mask is None:
        return written
    seeds = list(dict.fromkeys(request.seed for request in requests))
    assert len(requests) == len(prompts) * len(seeds), "requests_from asks for all seeds of every prompt"
    grouped = images.unflatten(0, (len(prompts), len(seeds)))
    given = None
    if first.image is not None and first.mask is not None:
        shown = torch.from_numpy(masked_input(first.image, first.mask, (images.shape[1], images.shape[2])))
        given = shown.expand(len(prompts), -1, -1, -1)
    replace_file(written, png(draw_sheet(prompts, [SheetGroup(title, grouped)], seeds=seeds, given=given)))
    return written


def _check_numbers(asked: Asked, reads: Reads, *, has_decoder: bool) -> None:
    limits = {"--images": asked.images, "--steps": asked.steps, "--decoder-steps": asked.decoder_steps}
    for option, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"{option} {value} must be at least 1")
    for option, value in {"--guidance": asked.guidance_scale, "--decoder-guidance": asked.decoder_guidance_scale}.items():
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"{option} {value} must be at least 0; 1 is no guidance, 7.5 is usual")
    if not 0 <= asked.seed < 2**63 - asked.images:
        raise ValueError(f"--seed {asked.seed} must be at least 0 and below 2^63")
    if not 0 <= asked.guidance_rescale <= 1:
        raise ValueError(f"--guidance-rescale {asked.guidance_rescale} must be from 0 to 1; 0.7 is usual with zero-terminal SNR")
    if asked.guidance_rescale and (has_decoder or reads != "text"):
        raise ValueError("--guidance-rescale is for text to image by Stable Diffusion alone; leave it out")
    if asked.negative_prompt is not None and asked.guidance_scale is not None and asked.guidance_scale <= 1:
        raise ValueError(f"--negative-prompt has no effect at --guidance {asked.guidance_scale}; give more than 1, or leave it out")
    if not has_decoder and (asked.decoder_steps is not None or asked.decoder_guidance_scale is not None):
        option = "--decoder-guidance" if asked.decoder_steps is None else "--decoder-steps"
        raise ValueError(f"{option}: this model has no second network; leave {option} out")
    if len(set(asked.prompts)) < len(asked.prompts):
        raise ValueError("--prompt is given twice with the same text; ask for more --images of it instead")


def _image_and_mask(asked: Asked, reads: Reads) -> tuple[Image.Image | None, Image.Image | None]:
    if reads != "inpainting":
        for option, path in {"--image": asked.image, "--mask": asked.mask}.items():
            if path is not None:
                raise ValueError(f"{option} {path}: this model does not inpaint; leave {option} out, or name an inpainting model")
        return None, None
    if asked.image is None or asked.mask is None:
        missing = "--image FILE" if asked.image is None else "--mask FILE, white where it is to paint"
        raise ValueError(f"this model paints the masked part of an image; give {missing}")
    image, mask = _open(asked.image, "--image").convert("RGB"), _open(asked.mask, "--mask").convert("L")
    if image.size != mask.size:
        raise ValueError(
            f"--mask {asked.mask} is {mask.width}x{mask.height} pixels, --image {asked.image} is {image.width}x{image.height}; "
            "give a mask of the image's size"
        )
    if asked.size is None and image.width != image.height:
        near = "x".join(str(max(SIZE_MULTIPLE, round(side / SIZE_MULTIPLE) * SIZE_MULTIPLE)) for side in image.size)
        raise ValueError(f"--image {asked.image} is not square and would be squeezed to the model's size; give --size {near}")
    if int(np.asarray(mask).max()) < WHITE:
        raise ValueError(f"--mask {asked.mask} is black all over, so that nothing is to be painted; make the part white that is")
    return image, mask


def _open(path: Path, option: str) -> Image.Image:
    """An image, upright."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise ValueError(f"{option} {path}: not there; give an image file") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{option} {path}: not read as an image: {error}; give a {', '.join(_FORMATS)} file") from error
