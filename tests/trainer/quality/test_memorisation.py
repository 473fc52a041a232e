"""Nearest training images: copies are found, the most suspicious ones are shown, and the reference is the yardstick."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_shards.index import ShardIndex
from data_shards.packing.pack import pack
from data_shards.reading.read import read_all
from data_shards.reading.sample import BadSampleError
from data_shards.sources.faces import FacesSource
from tests.trainer.quality.conftest import PixelFeatures
from trainer.quality.images import ShardImages
from trainer.quality.memorisation import find_neighbours, neighbours_sheet, prepare_training
from trainer.quality.statistics import prepare_reference


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """30 faces that a model has learnt."""
    return pack(FacesSource("open-peeps", 30, seed=5), tmp_path_factory.mktemp("learnt") / "shards", size=8)


def test_copies_of_training_images_are_found_and_shown_first(
    learnt: ShardIndex, faces: ShardIndex, pixel_net: PixelFeatures, tmp_path: Path
) -> None:
    reference = prepare_reference(faces, pixel_net, tmp_path, side=8)
    training = prepare_training(learnt, pixel_net, reference, tmp_path, side=8)
    assert training.name == f"shards@sha256:{learnt.sha256}"
    assert training.reference_distance > 0.5
    images = read_all(learnt, ("image",)).images
    drawn = torch.cat([read_all(faces, ("image",)).images[:6], images[[17, 4]]])
    neighbours = find_neighbours(pixel_net.features(drawn), training)
    assert neighbours.numbers[6:, 0].tolist() == [17, 4] and neighbours.distances[6:, 0].tolist() == [0.0, 0.0]
    assert neighbours.distances.shape == (8, 5) and neighbours.median_distance > 0.5
    copies = find_neighbours(pixel_net.features(images), training)
    assert copies.median_distance == 0.0
    sheet = np.asarray(neighbours_sheet(drawn, neighbours, training))
    # the first two lines are the copies: the drawn picture and its nearest neighbour are the same pixels
    for line in range(2):
        top = 22 + line * 118
        left, nearest = sheet[top : top + 96, 6:102], sheet[top : top + 96, 126:222]
        assert np.array_equal(left, nearest) and left.std() > 10
    assert not np.array_equal(sheet[258:354, 6:102], sheet[258:354, 126:222])


def test_the_reference_itself_is_no_training_data(faces: ShardIndex, pixel_net: PixelFeatures, tmp_path: Path) -> None:
    reference = prepare_reference(faces, pixel_net, tmp_path, side=8)
    with pytest.raises(ValueError, match="holds the reference's own images"):
        prepare_training(faces, pixel_net, reference, tmp_path, side=8)


def test_images_are_read_by_number_and_brought_to_a_size(learnt: ShardIndex) -> None:
    images = ShardImages(learnt, 8)
    assert len(images) == 30
    assert torch.equal(images.read([29, 3, 3]), read_all(learnt, ("image",)).images[[29, 3, 3]])
    assert ShardImages(learnt, 6).read([0]).shape == (1, 3, 6, 6)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    index = pack(FacesSource("open-peeps", 4), tmp_path / "shards", size=8)
    shard = index.root / index.shards[0].name
    content = bytearray(shard.read_bytes())
    members = next(members for extension, members in index.shards[0].members.items() if extension in ("png", "jpg", "webp"))
    content[members.offsets[2] + 5] ^= 255
    shard.write_bytes(content)
    with pytest.raises(BadSampleError, match=f"sample '{index.shards[0].keys[2]}'"):
        ShardImages(index, 8).read([0, 1, 2, 3])
