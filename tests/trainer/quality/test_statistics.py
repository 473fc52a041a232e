"""Cached features and statistics: found again under all that decides them, never under less, never unpickled."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_shards.index import ShardIndex
from data_shards.packing.pack import pack
from data_shards.reading.read import read_all
from data_shards.sources.faces import FacesSource
from tests.trainer.quality.conftest import PixelFeatures
from trainer.quality import statistics
from trainer.quality.manifold import squared_radii
from trainer.quality.statistics import prepare_reference, read_arrays, shard_features, write_arrays


def test_statistics_are_those_of_all_images_and_are_made_once(
    faces: ShardIndex, pixel_net: PixelFeatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "_READ_IMAGES", 7)
    reference = prepare_reference(faces, pixel_net, tmp_path, side=8)
    wanted = read_all(faces, ("image",)).images.flatten(1).float() / 255
    assert torch.equal(reference.features, wanted)
    assert torch.allclose(reference.mean, wanted.double().mean(dim=0))
    assert torch.allclose(reference.covariance, torch.cov(wanted.double().T))
    assert reference.radii is not None and torch.equal(reference.radii, squared_radii(wanted))
    assert reference.name == f"held_out@sha256:{faces.sha256}"
    assert pixel_net.seen == 24
    again = prepare_reference(faces, pixel_net, tmp_path, side=8)
    assert pixel_net.seen == 24
    for name in ("features", "mean", "covariance", "radii"):
        assert torch.equal(getattr(again, name), getattr(reference, name))


def test_other_data_another_net_and_another_size_are_never_taken_for_it(faces: ShardIndex, tmp_path: Path) -> None:
    first = shard_features(faces, PixelFeatures(), tmp_path / "cache", side=8)
    others = pack(FacesSource("open-peeps", 24, seed=1), tmp_path / "held_out", size=8)
    assert others.sha256 != faces.sha256
    for index, net, side in ((others, PixelFeatures(), 8), (faces, PixelFeatures("other"), 8), (faces, PixelFeatures(), 6)):
        found = shard_features(index, net, tmp_path / "cache", side=side)
        assert net.seen == 24 and not (found.shape == first.shape and torch.equal(found, first) and net.name == "pixels")
    assert len(list((tmp_path / "cache").glob("features_*.npz"))) == 4


def test_a_copy_of_the_shards_elsewhere_is_the_same_data(faces: ShardIndex, tmp_path: Path) -> None:
    net = PixelFeatures()
    shard_features(faces, net, tmp_path / "cache", side=8)
    copy = pack(FacesSource("open-peeps", 24), tmp_path / "copy", size=8)
    shard_features(copy, net, tmp_path / "cache", side=8)
    assert net.seen == 24


def test_a_file_of_another_identity_under_this_name_is_refused(faces: ShardIndex, pixel_net: PixelFeatures, tmp_path: Path) -> None:
    shard_features(faces, pixel_net, tmp_path, side=8)
    (path,) = tmp_path.glob("features_*.npz")
    write_arrays(path, {**read_arrays(path, ("features",)), "identity": np.array("another")})
    with pytest.raises(ValueError, match=r"features_\w+\.npz: was made of other data or by another net; delete it"):
        shard_features(faces, pixel_net, tmp_path, side=8)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cannot be read .* delete it"):
        shard_features(faces, pixel_net, tmp_path, side=8)


def test_a_reference_of_three_images_has_no_manifold(pixel_net: PixelFeatures, tmp_path: Path) -> None:
    few = pack(FacesSource("open-peeps", 3), tmp_path / "few", size=8)
    for _ in range(2):
        assert prepare_reference(few, pixel_net, tmp_path / "cache", side=8).radii is None


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    np.savez(path, mean=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="delete it"):
        read_arrays(path, ("mean",))
