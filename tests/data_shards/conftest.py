"""Small packed shards that the tests read, and copies of them to damage."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_shards.index import ShardIndex
from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource

IMAGE_SIZE = 16
SAMPLES = 30
SAMPLES_PER_SHARD = 12


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 faces of 16 px in shards of 12, 12 and 6; never changed."""
    out = tmp_path_factory.mktemp("packed")
    pack(FacesSource("open-peeps", SAMPLES), out, size=IMAGE_SIZE, samples_per_shard=SAMPLES_PER_SHARD)
    return out


@pytest.fixture
def damaged(packed: Path, tmp_path: Path) -> Path:
    """A copy of the shards, to be damaged."""
    return Path(shutil.copytree(packed, tmp_path / "shards"))


@pytest.fixture
def flip_bit(damaged: Path) -> Callable[[int, int], None]:
    """A function (shard, byte): flips the lowest bit of one byte of a copied shard."""

    def flip(shard: int, byte: int) -> None:
        path = damaged / ShardIndex.load(damaged).shards[shard].name
        content = bytearray(path.read_bytes())
        content[byte] ^= 1
        path.write_bytes(content)

    return flip
