"""Weights of inpainting losses: their mean is 1, they are finite for every mask, and the loss is the weighted error."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.objectives.inpainting import mask_weight
from trainer.objectives.losses import squared_error

WEIGHTS = st.floats(0, 100).map(lambda weight: round(weight, 3))


@settings(max_examples=80, deadline=None)
@given(inside=WEIGHTS, outside=WEIGHTS, share=st.sampled_from([0.0, 0.1, 0.5, 0.99, 1.0]), seed=st.integers(0, 2**32))
@example(inside=0.001, outside=9.0, share=0.1, seed=0)
def test_weights_have_a_mean_of_one_and_stay_in_proportion(inside: float, outside: float, share: float, seed: int) -> None:
    if inside == outside == 0:
        return
    mask = (torch.rand(3, 1, 8, 6, generator=torch.Generator().manual_seed(seed)) < share).float()
    weight = mask_weight(mask, inside=inside, outside=outside)
    assert weight.shape == mask.shape and bool(weight.isfinite().all()) and bool((weight >= 0).all())
    torch.testing.assert_close(weight.flatten(1).mean(1), torch.ones(3), rtol=1e-5, atol=0)
    for one, its_mask in zip(weight, mask, strict=True):
        if 0 < its_mask.mean() < 1:
            assert one[its_mask == 1][0].item() * outside == pytest.approx(one[its_mask == 0][0].item() * inside, rel=1e-4)


@pytest.mark.parametrize(("inside", "outside"), [(5.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("filled", [0.0, 1.0])
def test_a_full_and_an_empty_mask_weigh_all_alike(inside: float, outside: float, filled: float) -> None:
    assert torch.equal(mask_weight(torch.full((2, 1, 4, 4), filled), inside=inside, outside=outside), torch.ones(2, 1, 4, 4))


def test_the_weighted_error_equals_the_formula_and_equal_weights_the_plain_one() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 4, 8, 8, generator=generator)
    mask = (torch.rand(3, 1, 8, 8, generator=generator) < 0.3).float()
    error = ((prediction - target) ** 2).mean(1, keepdim=True)
    wanted = [
        ((4 * (one * m).sum() + (one * (1 - m)).sum()) / (4 * m.sum() + (1 - m).sum())).item() for one, m in zip(error, mask, strict=True)
    ]
    found = squared_error(prediction, target, weight_map=mask_weight(mask, inside=4.0, outside=1.0))
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)
    plain = squared_error(prediction, target)
    assert torch.equal(squared_error(prediction, target, weight_map=mask_weight(mask, inside=2.0, outside=2.0)), plain)
    assert torch.equal(plain, (prediction - target).square().flatten(1).mean(1))


@pytest.mark.parametrize(("inside", "outside"), [(0.0, 0.0), (-1.0, 1.0), (1.0, -0.5)])
def test_weights_below_zero_or_none_above_it_are_refused(inside: float, outside: float) -> None:
    with pytest.raises(ValueError, match="wanted none below 0 and one above it"):
        mask_weight(torch.zeros(1, 1, 2, 2), inside=inside, outside=outside)
