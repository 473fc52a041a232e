"""The distance to the teacher's images: equation 1 of LPIPS in numpy with unit weights, and pixels."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer.quality.conftest import PixelFeatures
from trainer.quality import perceptual
from trainer.quality.perceptual import distances, feature_distance


def _pair(count: int = 5) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 256, (count, 3, 4, 4), generator=stream, dtype=torch.uint8) for _ in range(2))
    return a, b


def test_the_feature_distance_is_equation_1(pixel_net: PixelFeatures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "_CHUNK_IMAGES", 2)
    a, b = _pair()
    wanted = np.zeros(5)
    for layer_a, layer_b in zip(pixel_net.layers(a), pixel_net.layers(b), strict=True):
        for image in range(5):
            places = layer_a.shape[2]
            for place in range(places):
                x, y = (layer[image, :, place].double().numpy() for layer in (layer_a, layer_b))
                wanted[image] += np.sum((x / np.linalg.norm(x) - y / np.linalg.norm(y)) ** 2) / places
    assert feature_distance(pixel_net, a, b).numpy() == pytest.approx(wanted, rel=1e-6)


def test_both_distances_are_means_over_the_images(pixel_net: PixelFeatures) -> None:
    a, b = _pair()
    features, rmse = distances(pixel_net, a, b)
    assert features == pytest.approx(float(feature_distance(pixel_net, a, b).mean()))
    assert rmse == pytest.approx(float(((a.double() - b.double()) / 255).square().mean().sqrt()))
    assert distances(pixel_net, a, a) == (0.0, 0.0)
    assert distances(pixel_net, torch.zeros_like(a), torch.full_like(a, 255))[1] == 1.0
    assert distances(pixel_net, torch.zeros_like(a), torch.zeros_like(a)) == (0.0, 0.0)
