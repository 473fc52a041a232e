"""The project's own feature nets in their cache: found again by identity, and whole."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_shards.config import Field
from data_shards.index import ShardIndex
from data_shards.packing.pack import pack
from data_shards.reading.read import read_all
from data_shards.reading.sample import MicroBatch
from data_shards.sources.faces import FacesSource
from data_shards.sources.folder import FolderSource
from trainer.quality import faces_net
from trainer.quality.faces_net import NetTraining, has_attributes, load_feature_net, prepare_feature_net

QUICK = NetTraining(updates=3, faces=40)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """24 faces of 8 px."""
    return pack(FacesSource("open-peeps", 24), tmp_path_factory.mktemp("faces") / "held_out", size=8)


def test_a_net_is_trained_once_and_found_again(faces: ShardIndex, tmp_path: Path) -> None:
    first = prepare_feature_net(faces, tmp_path, training=QUICK)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = prepare_feature_net(faces, tmp_path, training=QUICK)
    assert first.name == again.name
    assert first.name.startswith("faces-attributes-") and len(first.name) == len("faces-attributes-") + 12
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written
    assert all(torch.equal(first.trained.net.state_dict()[name], tensor) for name, tensor in again.trained.net.state_dict().items())
    assert not list(tmp_path.glob(".*tmp*"))


def test_a_damaged_net_is_named(faces: ShardIndex, tmp_path: Path) -> None:
    prepare_feature_net(faces, tmp_path, training=QUICK)
    (weights,) = tmp_path.glob("*/weights.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.safetensors: .*delete"):
        load_feature_net(weights.parent)


def test_a_users_own_images_are_measured_by_a_net_that_reads_faces(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8), (number * 60, 10, 10)).save(tmp_path / "photos" / f"{number}.png")
    index = pack(FolderSource.scan(tmp_path / "photos"), tmp_path / "shards", size=8)
    net = prepare_feature_net(index, tmp_path / "cache", training=QUICK)
    assert net.name.startswith("embedded-faces-attributes-")
    assert not has_attributes(index)


def test_shards_with_attributes_are_told(faces: ShardIndex) -> None:
    assert has_attributes(faces)


def test_of_a_large_reference_the_first_images_train_the_net(faces: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces_net, "_MOST_TRAINING_BYTES", 20 * 3 * 8 * 8)
    asked: list[int | None] = []

    def read(index: ShardIndex, fields: Sequence[Field], *, limit: int | None = None) -> MicroBatch:
        asked.append(limit)
        return read_all(index, fields, limit=limit)

    monkeypatch.setattr(faces_net, "read_all", read)
    prepare_feature_net(faces, tmp_path, training=QUICK)
    assert asked == [20]
