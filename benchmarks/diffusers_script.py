"""Runs one of diffusers' example scripts without torchvision: `diffusers_script.py SCRIPT ARGUMENTS...` on a rank.

The scripts take a few transforms of torchvision, which stand here as thin as they can be, with Pillow and torch alone; for images that
have the wanted size already, which is what the benchmark feeds, they do no more work than torchvision's own."""

import enum
import runpy
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class InterpolationMode(enum.Enum):
    """Names that the scripts look up in their options."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


def main() -> None:
    """Give the scripts their transforms, then run one as its own main program."""
    import datasets  # noqa: F401  (these look for torchvision once, and must not find what is put there below)
    import diffusers  # noqa: F401
    import transformers
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    transformers.utils.import_utils.is_torchvision_available()
    package, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
    for name, part in PARTS.items():
        setattr(transforms, name, part)
    package.transforms = transforms  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": package, "torchvision.transforms": transforms}
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


def compose(parts: Sequence[Callable]) -> Callable:
    """One transform after the other."""

    def apply(image: object) -> object:
        for part in parts:
            image = part(image)
        return image

    return apply


def resize(size: int, interpolation: InterpolationMode = InterpolationMode.BILINEAR) -> Callable[[Image.Image], Image.Image]:
    """The shorter side brought to `size`; an image that has it is given back as it is, as torchvision does."""

    def apply(image: Image.Image) -> Image.Image:
        shorter = min(image.size)
        if shorter == size:
            return image
        width, height = (size * side // shorter for side in image.size)
        return image.resize((width, height), Image.Resampling[interpolation.name])

    return apply


def crop(size: int) -> Callable[[Image.Image], Image.Image]:
    """A square from the middle."""

    def apply(image: Image.Image) -> Image.Image:
        left, top = ((side - size) // 2 for side in image.size)
        return image.crop((left, top, left + size, top + size))

    return apply


def as_is(function: Callable) -> Callable:
    """Any function; the scripts give one that does nothing where images are not mirrored."""
    return function


def to_tensor() -> Callable[[Image.Image], Tensor]:
    """Values of 0 to 1, channels first."""
    return lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)


def normalize(mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """Less the mean, by the deviation."""
    centre, spread = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return lambda image: image.sub_(centre).div_(spread)


def not_used(*_: object) -> Callable:
    """What the scripts name for options that the benchmarks do not set. Raises: RuntimeError when it is called on an image."""

    def apply(image: object) -> object:
        raise RuntimeError("this transform has no stand-in")

    return apply


PARTS = {
    "InterpolationMode": InterpolationMode,
    "Compose": compose,
    "Resize": resize,
    "CenterCrop": crop,
    "RandomCrop": crop,
    "Lambda": as_is,
    "ToTensor": to_tensor,
    "Normalize": normalize,
    "PILToTensor": not_used,
    "ConvertImageDtype": not_used,
}


if __name__ == "__main__":
    main()
