"""Nets and images for what is measured."""

from pathlib import Path

import pytest
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from data_shards.index import ShardIndex
from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from trainer.quality.inception import Inception


class PixelFeatures:
    """A net whose features are an image's own pixels, and which counts the images that it is given."""

    def __init__(self, name: str = "pixels") -> None:
        self.name, self.identity, self.resize = name, f"pixels {name}", "none"
        self.seen = 0

    def features(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """All pixels, in 0 ... 1."""
        self.seen += len(images)
        return images.flatten(1).float() / 255

    def layers(self, images: UInt8[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b c n"], ...]:
        """The pixels, and their means in blocks of four."""
        pixels = images.float() / 255
        return pixels.flatten(2), torch.nn.functional.avg_pool2d(pixels, 2).flatten(2)


@pytest.fixture
def pixel_net() -> PixelFeatures:
    """A net that needs no weights."""
    return PixelFeatures()


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """24 faces of 8 px."""
    return pack(FacesSource("open-peeps", 24), tmp_path_factory.mktemp("faces") / "held_out", size=8)


@pytest.fixture(scope="session")
def inception_weights() -> dict[str, Tensor]:
    """Random weights under the names of the usual file, with its classifier, of such a size that activations neither vanish nor burst."""
    stream = torch.Generator().manual_seed(0)
    made = {}
    for name, tensor in Inception().state_dict().items():
        if name.endswith("conv.weight"):
            made[name] = torch.randn(tensor.shape, generator=stream) * (2 / tensor[0].numel()) ** 0.5
        elif name.endswith("running_var"):
            made[name] = 0.5 + torch.rand(tensor.shape, generator=stream)
        elif name.endswith("bn.weight"):
            made[name] = 0.8 + 0.4 * torch.rand(tensor.shape, generator=stream)
        elif not name.endswith("num_batches_tracked"):
            made[name] = 0.1 * torch.randn(tensor.shape, generator=stream)
    return {**made, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


@pytest.fixture(scope="session")
def inception_file(inception_weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights as a .pth of the old format, as the usual file has it."""
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(dict(inception_weights), path, _use_new_zipfile_serialization=False)
    return path
