"""Kernel distances: torchmetrics is the oracle of KID, the papers' formulas in numpy that of CMMD, limits and invariances the rest."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from trainer.quality.discrepancy import chosen_subset, cmmd, kernel_distance, subset_distances, subset_images


class _Rows(nn.Module):
    """The features that torchmetrics is given as they are."""

    num_features = 12

    def forward(self, rows: Tensor) -> Tensor:
        return rows


def _feature_sets(count_a: int = 60, count_b: int = 70) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(0)
    return torch.randn(count_a, 12, generator=stream), 1.3 * torch.randn(count_b, 12, generator=stream) + 0.2


def _oracle_kid(a: Tensor, b: Tensor) -> float:
    oracle = KernelInceptionDistance(feature=_Rows(), subsets=1, subset_size=len(a), normalize=False)
    oracle.update(a, real=True)
    oracle.update(b, real=False)
    return float(oracle.compute()[0])


def in_parts(count: int, part: Callable[[range], Tensor]) -> Tensor:
    """As three ranks would divide the rows, one of them perhaps without any."""
    bounds = [0, count // 3, count // 3, count]
    return torch.cat([part(range(first, last)) for first, last in pairwise(bounds)])


@pytest.mark.filterwarnings("ignore:Metric .Kernel Inception Distance. will save:UserWarning")
def test_kernel_distance_equals_that_of_torchmetrics() -> None:
    a, b = _feature_sets(60, 60)
    assert kernel_distance(a, b) == pytest.approx(_oracle_kid(a, b), rel=1e-4)


@pytest.mark.filterwarnings("ignore:Metric .Kernel Inception Distance. will save:UserWarning")
def test_every_subset_has_the_distance_that_torchmetrics_gives_it() -> None:
    a, b = _feature_sets()
    distances = subset_distances(a, b, seed=3, subsets=4)
    assert len(distances) == 4 and subset_images(60, 70) == 30
    for number, distance in enumerate(distances.tolist()):
        first, second = chosen_subset(3, number, counts=(60, 70), size=30)
        assert len(set(first.tolist())) == len(set(second.tolist())) == 30
        assert distance == pytest.approx(_oracle_kid(a[first], b[second]), rel=1e-3, abs=1e-6)


def test_subsets_are_a_function_of_the_seed_alone() -> None:
    a, b = _feature_sets()
    one = subset_distances(a, b, seed=3, subsets=5)
    torch.manual_seed(9)
    assert torch.equal(one, subset_distances(a, b, seed=3, subsets=5, divide=in_parts))
    assert not torch.equal(one, subset_distances(a, b, seed=4, subsets=5))
    assert len(one.unique()) == 5


@pytest.mark.parametrize(("counts", "size"), [((50_000, 10_000), 1000), ((1000, 5000), 1000), ((999, 5000), 499), ((3, 2), 2)])
def test_subsets_have_a_thousand_images_where_there_are_so_many(counts: tuple[int, int], size: int) -> None:
    assert subset_images(*counts) == size


def test_the_mean_over_subsets_is_the_distance_over_all_pairs() -> None:
    a, b = _feature_sets()
    distances = subset_distances(a, b, seed=0, subsets=200)
    assert float(distances.mean()) == pytest.approx(kernel_distance(a, b), abs=4 * float(distances.std()) / 200**0.5)


def test_cmmd_is_the_papers_formula() -> None:
    a, b = (each.double().numpy() for each in _feature_sets())
    a, b = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (a, b))

    def kernel_mean(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean([[np.exp(-np.sum((one - other) ** 2) / (2 * 10.0**2)) for other in y] for one in x]))

    wanted = 1000 * (kernel_mean(a, a) + kernel_mean(b, b) - 2 * kernel_mean(a, b))
    assert wanted > 0.1
    assert cmmd(*_feature_sets()) == pytest.approx(wanted, rel=1e-9)
    a, b = _feature_sets()
    assert cmmd(3 * a, b / 7) == pytest.approx(wanted, rel=1e-5)
    assert cmmd(a, a) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("distance", [kernel_distance, cmmd])
def test_distances_depend_neither_on_blocks_nor_on_ranks(distance: Callable[..., float]) -> None:
    a, b = _feature_sets()
    assert distance(a, b, block_images=7) == pytest.approx(distance(a, b), rel=1e-10)
    assert distance(a, b, divide=in_parts) == pytest.approx(distance(a, b), rel=1e-10)


def test_kernel_distance_is_unbiased_around_zero_for_one_distribution() -> None:
    stream = torch.Generator().manual_seed(5)
    distances = torch.tensor(
        [kernel_distance(torch.randn(20, 4, generator=stream), torch.randn(20, 4, generator=stream)) for _ in range(400)]
    )
    assert abs(float(distances.mean())) < 3 * float(distances.std()) / 20
    assert (distances < 0).any()


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="--images 2 or more"):
        kernel_distance(torch.ones(1, 4), torch.ones(5, 4))
    with pytest.raises(ValueError, match="--images 2 or more"):
        cmmd(torch.ones(0, 4), torch.ones(5, 4))
