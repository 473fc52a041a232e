"""Feature nets and reference statistics in their cache: found again by identity, whole, never unpickled."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_shards.index import ShardIndex
from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from data_shards.sources.folder import FolderSource
from trainer.reference import NetTraining, load_feature_net, prepare_feature_net, prepare_reference, read_arrays, write_arrays

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


def test_reference_statistics_are_cached_and_belong_to_one_net(faces: ShardIndex, tmp_path: Path) -> None:
    net = prepare_feature_net(faces, tmp_path, training=QUICK)
    reference = prepare_reference(faces, net, tmp_path)
    assert reference.features.shape == (24, 64)
    assert torch.allclose(reference.mean, reference.features.double().mean(dim=0))
    assert reference.name == f"held_out@sha256:{faces.sha256}"
    (file,) = tmp_path.glob("reference_*.npz")
    write_arrays(file, {name: getattr(reference, name).numpy() + 1 for name in ("mean", "covariance", "features")})
    assert torch.allclose(prepare_reference(faces, net, tmp_path).mean, reference.mean + 1)
    other = prepare_feature_net(pack(FacesSource("open-peeps", 24, seed=1), tmp_path / "others", size=8), tmp_path, training=QUICK)
    assert other.name != net.name
    prepare_reference(faces, other, tmp_path)
    assert len(list(tmp_path.glob("reference_*.npz"))) == 2


def test_a_damaged_net_is_named(faces: ShardIndex, tmp_path: Path) -> None:
    prepare_feature_net(faces, tmp_path, training=QUICK)
    (weights,) = tmp_path.glob("*/weights.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.safetensors: .*delete"):
        load_feature_net(weights.parent)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    np.savez(path, mean=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="delete it"):
        read_arrays(path, ("mean",))


def test_a_users_own_images_are_measured_by_a_net_that_reads_faces(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8), (number * 60, 10, 10)).save(tmp_path / "photos" / f"{number}.png")
    index = pack(FolderSource.scan(tmp_path / "photos"), tmp_path / "shards", size=8)
    net = prepare_feature_net(index, tmp_path / "cache", training=QUICK)
    assert net.name.startswith("embedded-faces-attributes-")
    assert prepare_reference(index, net, tmp_path / "cache").features.shape == (4, 64)
