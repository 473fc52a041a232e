"""Features of shards and what is made of them once, cached on disk under all that decides them: data, net, size, this code's version."""

import hashlib
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from data_shards import ranks
from data_shards.files import replace_file
from data_shards.index import ShardIndex
from trainer.frechet import mean_and_covariance
from trainer.quality.images import ShardImages
from trainer.quality.manifold import NEIGHBOURS, squared_radii
from trainer.quality.nets import ImageFeatures
from trainer.quality.rows import batches_of_rank, gather_rows, on_ranks

logger = logging.getLogger(__name__)

_VERSION = "halfstep statistics 2"
"""Changes with anything that changes cached numbers."""
_READ_IMAGES = 256


@final
@dataclass(frozen=True, eq=False)
class Reference:
    """Features of the reference images, with their mean and covariance; name is folder@sha256:index hash.

    radii: squared, of each image's part of the manifold; None where there are too few images for one."""

    name: str
    mean: Float64[Tensor, " d"]
    covariance: Float64[Tensor, "d d"]
    features: Float[Tensor, "b d"]
    radii: Float64[Tensor, " b"] | None


def reference_name(index: ShardIndex) -> str:
    """How evaluation.json names images of shards: their folder, and what alone decides whether two are the same."""
    return f"{index.root.resolve().name}@sha256:{index.sha256}"


def prepare_reference(index: ShardIndex, net: ImageFeatures, cache: Path, *, side: int) -> Reference:
    """Features and statistics of all images of the shards at `side` pixels, from the cache where they are there. Collective."""
    features = shard_features(index, net, cache, side=side)
    identity = f"{_identity(index, net, side)}\nneighbours {NEIGHBOURS}"
    names = ("mean", "covariance", "radii")

    def make() -> dict[str, Tensor]:
        mean, covariance = mean_and_covariance(features)
        held = features.to(ranks.device())
        radii = squared_radii(held, divide=on_ranks).cpu() if len(features) > NEIGHBOURS else torch.empty(0, dtype=torch.float64)
        return {"mean": mean, "covariance": covariance, "radii": radii}

    arrays = cached(cache, "statistics", identity, names, make)
    radii = arrays["radii"] if len(arrays["radii"]) else None
    return Reference(reference_name(index), arrays["mean"], arrays["covariance"], features, radii)


def shard_features(index: ShardIndex, net: ImageFeatures, cache: Path, *, side: int) -> Float[Tensor, "b d"]:
    """Features of all images of the shards, brought to `side` pixels first; made by all ranks together. Collective."""

    def make() -> dict[str, Tensor]:
        images = ShardImages(index, side)
        logger.info("features of the %d images of %s by %s", len(images), index.root, net.name)
        mine = [net.features(images.read(batch)) for batch in batches_of_rank(len(images), _READ_IMAGES)]
        return {"features": gather_rows(torch.cat(mine) if mine else torch.empty((0, 0)))}

    return cached(cache, "features", _identity(index, net, side), ("features",), make)["features"]


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays of numbers as .npz, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, buffer.getvalue())


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named arrays of an .npz; nothing is unpickled.

    Raises: ValueError naming the file if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read ({error}); delete it, it is computed again") from error


def cached(cache: Path, kind: str, identity: str, names: Sequence[str], make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The named tensors of this identity: from the cache, or made by all ranks together and kept there by rank 0.

    The whole identity stands in the file too: a name that is only its beginning's hash never stands for another one.
    Raises: ValueError naming the file if it is damaged, or another identity's. Collective."""
    path = cache / f"{kind}_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"
    if ranks.any_rank(not path.exists()):
        made = dict(make())
        if ranks.is_rank_0():
            write_arrays(path, {**{name: tensor.cpu().numpy() for name, tensor in made.items()}, "identity": np.array(identity)})
        ranks.barrier()
        return made
    arrays = read_arrays(path, (*names, "identity"))
    if str(arrays["identity"]) != identity:
        raise ValueError(f"{path}: was made of other data or by another net; delete it, it is computed again")
    return {name: torch.from_numpy(arrays[name]) for name in names}


def _identity(index: ShardIndex, net: ImageFeatures, side: int) -> str:
    return f"{_VERSION}\ndata {index.sha256}\nside {side}\nnet {net.identity}"
