"""A diffusers U-Net from tensors of other names: each is used exactly once, and what is missing or left over is named."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from jaxtyping import Float
from torch import Tensor

from trainer.importing.settings import Settings

Tensors = Mapping[str, Tensor]
NORM_GROUPS = 32
_NAMED = 4
"""So many names stand in a message; of further ones their number."""


@final
@dataclass(frozen=True)
class Piece:
    """Where a tensor of the U-Net lies in a checkpoint: whole, or the queries (0), keys (1) or values (2) of a joint projection."""

    name: str
    third: int | None = None


@final
@dataclass(frozen=True)
class ImportedModel:
    """What a checkpoint holds. assumed: the settings that neither it nor the command line says; learned_variance: whether the U-Net
    gives one behind its prediction; classes: labels that it is conditioned on."""

    unet: UNet2DModel
    settings: Settings
    assumed: Mapping[str, object]
    image_size: int
    learned_variance: bool = False
    classes: int | None = None


def build_unet(
    tensors: Tensors,
    config: Mapping[str, object],
    *,
    piece_of: Callable[[str], Piece],
    third_of: Callable[[Tensor, int], Tensor] | None = None,
) -> UNet2DModel:
    """The stock U-Net of a config with a checkpoint's tensors in fp32, for evaluation.

    piece_of: where the U-Net's tensor of a name lies. third_of: cuts a joint projection of attention.
    Raises: ValueError naming tensors that are missing, left over or of another shape than the config makes."""
    with torch.device("meta"):
        unet = UNet2DModel(**config)  # pyright: ignore[reportArgumentType]
    wanted = unet.state_dict()
    pieces = {target: piece_of(target) for target in wanted}
    used = {piece.name for piece in pieces.values()}
    _check_names(missing=[name for name in used if name not in tensors], left=[name for name in tensors if name not in used])
    assert len(set(pieces.values())) == len(pieces), "no tensor is used twice"
    state = {}
    for target, piece in pieces.items():
        tensor = tensors[piece.name]
        if piece.third is not None:
            assert third_of is not None, "only families with joint projections have thirds"
            tensor = third_of(tensor, piece.third)
        state[target] = _shaped(tensor, wanted[target].shape, name=piece.name)
    unet.load_state_dict(state, assign=True)
    return unet.requires_grad_(False).eval()


def size_of(tensors: Tensors, name: str, dimension: int = 0) -> int:
    """One side of a tensor. Raises: ValueError if the tensor is not there, or has no such dimension."""
    if name not in tensors:
        raise ValueError(f"it lacks {name}")
    shape = tensors[name].shape
    if len(shape) <= dimension:
        raise ValueError(f"{name} has shape {tuple(shape)}, wanted {dimension + 1} dimensions or more")
    return shape[dimension]


def count_of(tensors: Tensors, prefix: str) -> int:
    """How many numbered parts there are below `prefix`, one more than the highest number; 0 for none."""
    numbers = {name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)}
    return max((int(number) + 1 for number in numbers if number.isdecimal() and len(number) < 4), default=0)


def widths_of(tensors: Tensors, names: Sequence[str]) -> tuple[int, ...]:
    """Channels of the levels, whose first convolutions have these names.

    Raises: ValueError if one is not there, or its channels cannot be normalized in groups."""
    widths = tuple(size_of(tensors, name) for name in names)
    for width in widths:
        if width < 1 or width % NORM_GROUPS:
            raise ValueError(f"it has a level of {width} channels, wanted a multiple of {NORM_GROUPS}, the groups of its normalization")
    return widths


def _check_names(*, missing: list[str], left: list[str]) -> None:
    faults = [f"it {verb} {_listed(names)}" for verb, names in (("lacks", missing), ("has left over", left)) if names]
    if faults:
        raise ValueError("; ".join(faults))


def _listed(names: list[str]) -> str:
    first, more = sorted(names)[:_NAMED], len(names) - _NAMED
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def _shaped(tensor: Tensor, shape: torch.Size, *, name: str) -> Float[Tensor, "..."]:
    """In fp32; a convolution of one pixel as the matrix that it is."""
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise ValueError(f"{name} is of {tensor.dtype} and {tensor.layout}, wanted plain floating-point weights")
    matrix = tensor.flatten(1) if len(shape) == 2 and tensor.dim() > 2 and tensor.shape[2:].numel() == 1 else tensor
    if matrix.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the other tensors make it {tuple(shape)}")
    return matrix.float().contiguous()
