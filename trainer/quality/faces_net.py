"""The project's own feature net, trained on the attributes of the reference images, or of embedded faces; cached by its identity."""

import hashlib
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

from safetensors.torch import load_file, save

from data_shards import ranks
from data_shards.files import fsync_directory, json_text, read_json_object, write_durable
from data_shards.index import ShardIndex
from data_shards.packing.pack import pack
from data_shards.reading.read import read_all
from data_shards.sources.faces import FacesSource
from trainer.feature_net import (
    ARCHITECTURE,
    LARGEST_PIXELS,
    UPDATES,
    Attribute,
    FeatureNet,
    TrainedFeatureNet,
    choose_attributes,
    train_feature_net,
)
from trainer.hash import tensors_sha256

logger = logging.getLogger(__name__)

_EMBEDDED_STYLE = "open-peeps"
_MOST_TRAINING_BYTES = 2**31
"""Of pixels in memory: of a larger reference its first images train the net."""
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
    weights_sha256: str


def feature_net_on_ranks(index: ShardIndex, cache: Path, *, training: NetTraining = DEFAULT_TRAINING) -> NamedFeatureNet:
    """As prepare_feature_net, made by rank 0 and read by the others. Collective."""
    if ranks.is_rank_0():
        prepare_feature_net(index, cache, training=training)
    ranks.barrier()
    return prepare_feature_net(index, cache, training=training)


def prepare_feature_net(index: ShardIndex, cache: Path, *, training: NetTraining) -> NamedFeatureNet:
    """The net trained on the attributes of these images, from the cache where it is there.

    Images without attributes (a user's own) are measured by a net that reads embedded cartoon faces; its name starts with
    `embedded-`. One process at a time. Raises: ValueError if the cache is damaged."""
    folder = cache / f"feature_net_{_digest(index.sha256, ARCHITECTURE, repr(training))}"
    if not (folder / _NET_FILE).exists():
        _train_into(folder, index, cache, training)
    return load_feature_net(folder)


def has_attributes(index: ShardIndex) -> bool:
    """Whether the images of these shards have attributes that a net can learn to read."""
    return bool(choose_attributes(read_all(index, ("attributes",)).attributes))


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
    return NamedFeatureNet(name, TrainedFeatureNet(net.requires_grad_(False).eval(), attributes, accuracy), sha256)


def _train_into(folder: Path, index: ShardIndex, cache: Path, training: NetTraining) -> None:
    """Train a net and commit its folder by one rename."""
    batch = read_all(index, ("image", "attributes"), limit=_MOST_TRAINING_BYTES // (3 * index.side() ** 2))
    own = len(batch.images) and choose_attributes(batch.attributes)
    if not own:
        logger.info("%s has no attributes: the feature net learns from %d embedded faces", index.root, training.faces)
        size = min(index.side(), LARGEST_PIXELS)
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
