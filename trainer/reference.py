"""What samples are measured against: the feature net and the statistics of the reference images, cached by their identity."""

import hashlib
import io
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Float64
from safetensors.torch import load_file, save
from torch import Tensor

from data_shards import ranks
from data_shards.files import fsync_directory, json_text, read_json_object, replace_file, write_durable
from data_shards.index import ShardIndex
from data_shards.packing.pack import pack
from data_shards.reading.read import read_all
from data_shards.sources.faces import FacesSource
from trainer.feature_net import (
    ARCHITECTURE,
    UPDATES,
    Attribute,
    FeatureNet,
    TrainedFeatureNet,
    choose_attributes,
    features_of,
    train_feature_net,
)
from trainer.frechet import mean_and_covariance
from trainer.hash import tensors_sha256

logger = logging.getLogger(__name__)

_EMBEDDED_STYLE = "open-peeps"
_LARGEST_FACES_PIXELS = 64
_NET_FILE, _WEIGHTS_FILE = "feature_net.json", "weights.safetensors"


@final
@dataclass(frozen=True)
class NetTraining:
    """How feature nets are made; part of their identity."""

    updates: int = UPDATES
    """Optimizer steps."""
    faces: int = 4000
    """Embedded faces to learn from where the reference has no attributes."""
    seed: int = 0


DEFAULT_TRAINING = NetTraining()


@final
@dataclass(frozen=True, eq=False)
class NamedFeatureNet:
    """A feature net under the name that every number made with it carries; equal names mean equal weights."""

    name: str
    trained: TrainedFeatureNet


@final
@dataclass(frozen=True, eq=False)
class Reference:
    """Features of the reference images, with their mean and covariance; name is folder@sha256:index hash."""

    name: str
    mean: Float64[Tensor, " d"]
    covariance: Float64[Tensor, "d d"]
    features: Float[Tensor, "b d"]


def prepare_measure(index: ShardIndex, cache: Path, *, training: NetTraining = DEFAULT_TRAINING) -> tuple[NamedFeatureNet, Reference]:
    """Feature net and statistics of reference images, made by rank 0 and read by the others. Collective."""
    if ranks.is_rank_0():
        prepare_reference(index, prepare_feature_net(index, cache, training=training), cache)
    ranks.barrier()
    net = prepare_feature_net(index, cache, training=training)
    return net, prepare_reference(index, net, cache)


def prepare_feature_net(index: ShardIndex, cache: Path, *, training: NetTraining) -> NamedFeatureNet:
    """The net trained on the attributes of these images, from the cache where it is there.

    Images without attributes (a user's own) are measured by a net that reads embedded cartoon faces; its name starts with
    `embedded-`. One process at a time. Raises: ValueError if the cache is damaged."""
    folder = cache / f"feature_net_{_digest(index.sha256, ARCHITECTURE, repr(training))}"
    if not (folder / _NET_FILE).exists():
        _train_into(folder, index, cache, training)
    return load_feature_net(folder)


def load_feature_net(folder: Path) -> NamedFeatureNet:
    """A net that `prepare_feature_net` wrote.

    Raises: ValueError if the files are not whole, naming them."""
    record = read_json_object(folder / _NET_FILE)
    match record:
        case {"name": str(name), "weights_sha256": str(sha256), "attributes": dict(values), "held_out_accuracy": dict(accuracy)}:
            attributes = tuple(Attribute(attribute, tuple(known)) for attribute, known in values.items())
        case _:
            raise ValueError(f"{folder / _NET_FILE}: not the record of a feature net; delete {folder} to train it again")
    tensors = load_file(folder / _WEIGHTS_FILE)
    if tensors_sha256(tensors) != sha256:
        raise ValueError(f"{folder / _WEIGHTS_FILE}: the weights are not those of {_NET_FILE}; delete {folder} to train the net again")
    net = FeatureNet(attributes)
    net.load_state_dict(tensors)
    return NamedFeatureNet(name, TrainedFeatureNet(net.requires_grad_(False).eval(), attributes, accuracy))


def prepare_reference(index: ShardIndex, net: NamedFeatureNet, cache: Path) -> Reference:
    """Features of all images of the shards, from the cache where they are there. One process at a time."""
    path = cache / f"reference_{_digest(index.sha256, net.name, str(index.image_size))}.npz"
    if not path.exists():
        features = features_of(net.trained.net, read_all(index, ("image",)).images)
        mean, covariance = mean_and_covariance(features)
        write_arrays(path, {"mean": mean.numpy(), "covariance": covariance.numpy(), "features": features.numpy()})
    arrays = read_arrays(path, ("mean", "covariance", "features"))
    return Reference(
        name=reference_name(index),
        mean=torch.from_numpy(arrays["mean"]),
        covariance=torch.from_numpy(arrays["covariance"]),
        features=torch.from_numpy(arrays["features"]),
    )


def reference_name(index: ShardIndex) -> str:
    """How evaluation.json names the reference: its folder, and what alone decides whether two are the same."""
    return f"{index.root.resolve().name}@sha256:{index.sha256}"


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays of numbers as .npz, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, buffer.getvalue())


def read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The named arrays of an .npz; nothing is unpickled.

    Raises: ValueError naming the file if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); delete it, it is computed again") from error


def _train_into(folder: Path, index: ShardIndex, cache: Path, training: NetTraining) -> None:
    """Train a net and commit its folder by one rename."""
    batch = read_all(index, ("image", "attributes"))
    own = len(batch.images) and choose_attributes(batch.attributes)
    if not own:
        logger.info("%s has no attributes: the feature net learns from %d embedded faces", index.root, training.faces)
        size = min(index.side(), _LARGEST_FACES_PIXELS)
        faces = pack(
            FacesSource(_EMBEDDED_STYLE, training.faces, seed=training.seed),
            cache / f"faces_{_EMBEDDED_STYLE}_{size}_px",
            size=size,
            seed=training.seed,
        )
        batch = read_all(faces, ("image", "attributes"))
    trained = train_feature_net(batch.images, batch.attributes, seed=training.seed, updates=training.updates)
    tensors = {name: tensor.contiguous() for name, tensor in trained.net.state_dict().items()}
    sha256 = tensors_sha256(tensors)
    kind = "embedded-faces" if not own else "faces" if index.source.get("kind") == "faces" else "own"
    record = {
        "name": f"{kind}-attributes-{sha256[:12]}",
        "architecture": ARCHITECTURE,
        "training": asdict(training),
        "weights_sha256": sha256,
        "index_sha256": index.sha256,
        "attributes": {attribute.name: list(attribute.values) for attribute in trained.attributes},
        "held_out_accuracy": dict(trained.held_out_accuracy),
    }
    logger.info("feature net %s: names %.1f %% of held-out attributes", record["name"], 100 * trained.mean_accuracy)
    _commit(folder, {_WEIGHTS_FILE: save(tensors), _NET_FILE: json_text(record).encode()})


def _commit(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Make a folder of files appear at once; one that another process made in the meantime is kept."""
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_durable(temporary / name, content)
    fsync_directory(temporary)
    try:
        os.rename(temporary, folder)
    except OSError:
        if not (folder / _NET_FILE).exists():
            raise
        shutil.rmtree(temporary)
    fsync_directory(folder.parent)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
