"""The Frechet distance of feature sets: torchmetrics is the oracle, Gaussians of known distance and limits the rest."""

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from trainer.frechet import frechet_distance, mean_and_covariance


class _Pixels(nn.Module):
    """Features an image that torchmetrics and the code under test share: its pixels, weighted."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(12, 12, generator=torch.Generator().manual_seed(1)) / 100

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() @ self.weight


def _image_sets() -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(0)
    real = torch.randint(0, 200, (60, 3, 2, 2), generator=stream, dtype=torch.uint8)
    fake = torch.randint(30, 256, (60, 3, 2, 2), generator=stream, dtype=torch.uint8)
    return real, fake


def _frechet(a: Tensor, b: Tensor) -> float:
    return frechet_distance(*mean_and_covariance(a), *mean_and_covariance(b))


def test_frechet_distance_equals_that_of_torchmetrics() -> None:
    real, fake = _image_sets()
    oracle = FrechetInceptionDistance(feature=_Pixels(), normalize=False, input_img_size=(3, 2, 2))
    oracle.set_dtype(torch.float64)
    oracle.update(real, real=True)
    oracle.update(fake, real=False)
    assert _frechet(_Pixels()(real), _Pixels()(fake)) == pytest.approx(float(oracle.compute()), rel=1e-4)


def test_frechet_distance_of_known_gaussians() -> None:
    mean = torch.tensor([1.0, -2.0], dtype=torch.float64)
    spread = torch.diag(torch.tensor([4.0, 9.0], dtype=torch.float64))
    # per axis (mean difference)^2 + (std difference)^2: 1 + (2 - 1)^2 and 4 + (3 - 1)^2
    distance = frechet_distance(mean, spread, torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    assert distance == pytest.approx(10.0, abs=1e-12)


def test_frechet_distance_is_symmetric_and_zero_for_equal_sets() -> None:
    stream = torch.Generator().manual_seed(2)
    a, b = torch.randn(50, 6, generator=stream), 2 * torch.randn(70, 6, generator=stream)
    assert _frechet(a, b) == pytest.approx(_frechet(b, a), rel=1e-10)
    assert _frechet(a, a) == pytest.approx(0.0, abs=1e-9)


def test_fewer_images_than_features_still_have_a_frechet_distance() -> None:
    stream = torch.Generator().manual_seed(3)
    a, b = torch.randn(5, 16, generator=stream), torch.randn(6, 16, generator=stream) + 3
    assert _frechet(a, b) > 16 * 4
    constant = torch.ones(8, 16)
    assert _frechet(constant, constant) == 0.0


def test_one_image_is_refused() -> None:
    with pytest.raises(ValueError, match="--images 2 or more"):
        mean_and_covariance(torch.ones(1, 4))
