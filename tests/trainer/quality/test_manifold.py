"""Precision, recall and neighbours: the paper's sums written out in numpy, and cases that are known."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.quality import manifold
from trainer.quality.manifold import nearest, share_within, squared_distances, squared_radii
from trainer.quality.rows import here

Divide = Callable[[int, Callable[[range], Tensor]], Tensor]


def _sets() -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(0)
    return torch.randn(40, 3, generator=stream), 1.5 * torch.randn(55, 3, generator=stream) + 0.5


def in_parts(count: int, part: Callable[[range], Tensor]) -> Tensor:
    """As three ranks would divide the rows, one of them without any."""
    bounds = [0, count // 3, count // 3, count]
    return torch.cat([part(range(first, last)) for first, last in pairwise(bounds)])


def _oracle(reference: np.ndarray, drawn: np.ndarray, k: int) -> tuple[float, float]:
    """Equations 1 and 2: f(phi, Phi) is 1 where |phi - phi'| <= |phi' - NN_k(phi', Phi)| for at least one phi' of Phi."""

    def share(queries: np.ndarray, points: np.ndarray) -> float:
        radii = [
            sorted(np.linalg.norm(point - other) for number, other in enumerate(points) if number != own)[k - 1]
            for own, point in enumerate(points)
        ]
        return float(
            np.mean(
                [any(np.linalg.norm(query - point) <= radius for point, radius in zip(points, radii, strict=True)) for query in queries]
            )
        )

    return share(drawn, reference), share(reference, drawn)


@pytest.mark.parametrize("divide", [here, in_parts])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_the_papers(k: int, divide: Divide, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "_BLOCK_ROWS", 16)
    monkeypatch.setattr(manifold, "_BLOCK_POINTS", 9)
    reference, drawn = _sets()
    precision = share_within(drawn, reference, squared_radii(reference, neighbours=k, divide=divide), divide=divide)
    recall = share_within(reference, drawn, squared_radii(drawn, neighbours=k, divide=divide), divide=divide)
    wanted = _oracle(reference.double().numpy(), drawn.double().numpy(), k)
    assert (precision, recall) == pytest.approx(wanted, abs=1e-12)
    assert 0.3 < precision < recall < 1


def test_a_set_lies_in_its_own_manifold_and_not_in_a_far_one() -> None:
    reference, _ = _sets()
    radii = squared_radii(reference)
    assert share_within(reference, reference, radii) == 1.0
    assert share_within(reference + 100, reference, radii) == 0.0


def test_a_mode_that_is_not_drawn_costs_recall_and_not_precision() -> None:
    stream = torch.Generator().manual_seed(1)
    left, right = torch.randn(50, 2, generator=stream), torch.randn(50, 2, generator=stream) + 50
    reference, drawn = torch.cat([left, right]), torch.randn(100, 2, generator=stream)
    assert share_within(drawn, reference, squared_radii(reference)) > 0.8
    assert share_within(reference, drawn, squared_radii(drawn)) < 0.55


def test_copies_have_no_distance_whatever_rounding_does() -> None:
    rows = torch.randn(6, 2048, generator=torch.Generator().manual_seed(2)) * 30 + 100
    points = rows.repeat(4, 1)
    assert torch.equal(squared_distances(rows, rows).diagonal(), torch.zeros(6, dtype=torch.float64))
    assert torch.equal(squared_radii(points), torch.zeros(24, dtype=torch.float64))
    assert share_within(rows, points, squared_radii(points)) == 1.0
    assert float(squared_distances(rows, rows + 1e-3).diagonal().min()) > 0


@pytest.mark.parametrize("divide", [here, in_parts])
def test_the_nearest_points_come_nearest_first(divide: Divide, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "_BLOCK_ROWS", 7)
    queries, points = _sets()
    values, numbers = nearest(queries, points, count=4, divide=divide)
    all_distances = torch.cdist(queries.double(), points.double())
    assert torch.equal(numbers, all_distances.argsort(dim=1)[:, :4])
    assert torch.allclose(values, all_distances.sort(dim=1).values[:, :4])
    assert nearest(queries, points[:2], count=4)[0].shape == (40, 2)


def test_no_block_is_quadratic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "_BLOCK_ROWS", 8)
    shapes = []
    real = manifold.squared_distances

    def spied(rows: Tensor, points: Tensor) -> Tensor:
        shapes.append(len(rows))
        return real(rows, points)

    monkeypatch.setattr(manifold, "squared_distances", spied)
    reference, drawn = _sets()
    share_within(drawn, reference, squared_radii(reference))
    nearest(drawn, reference, count=1)
    assert max(shapes) == 8


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="--images 4 or more"):
        squared_radii(torch.ones(3, 4))
    with pytest.raises(ValueError, match="no images to look for neighbours"):
        nearest(torch.ones(3, 4), torch.ones(0, 4), count=1)
