"""The autoencoder's loss: each of its three terms against an independent value."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from trainer.objectives.autoencoding import Autoencoder, autoencoding_loss, edges_at_scales, feature_distance, kl_from_standard_normal


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def knows(reconstruction: Tensor, moments: Tensor) -> Autoencoder:
    """An autoencoder that answers with these, whatever it is asked."""
    return lambda images, noise: (reconstruction, moments)


def itself(images: Tensor) -> Sequence[Tensor]:
    """The pixels as the only feature map."""
    return (images,)


def of(reconstruction: Tensor, images: Tensor, moments: Tensor, *, kl: float = 0.0, feature: float = 0.0) -> Tensor:
    """The loss with the given weights and pixels as features."""
    answer = knows(reconstruction, moments)
    return autoencoding_loss(answer, images, noise=moments[:, :2], features=itself, kl_weight=kl, feature_weight=feature)


def test_the_divergence_is_torch_distributions_own_summed_over_each_latent() -> None:
    moments = draw(3, 4, 5, 5)
    mean, log_variance = moments.chunk(2, dim=1)
    wanted = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(kl_from_standard_normal(moments), wanted)


def test_a_standard_normal_posterior_has_no_divergence_and_a_collapsed_one_a_finite_one() -> None:
    assert kl_from_standard_normal(torch.zeros(2, 4, 3, 3)).tolist() == [0, 0]
    assert bool(kl_from_standard_normal(torch.full((1, 2, 1, 1), -1000.0)).isfinite().all())


def test_the_loss_is_l1_and_weighted_divergence_a_pixel_value_and_weighted_feature_distance() -> None:
    images, reconstruction, moments = draw(2, 3, 8, 8), draw(2, 3, 8, 8, seed=1), draw(2, 4, 4, 4, seed=2)
    l1 = torch.stack([torch.nn.functional.l1_loss(a, b) for a, b in zip(reconstruction, images, strict=True)])
    mean, log_variance = moments.chunk(2, dim=1)
    nats = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(of(reconstruction, images, moments), l1)
    torch.testing.assert_close(of(reconstruction, images, moments, kl=0.5, feature=0.25), 1.25 * l1 + 0.5 * nats / (3 * 8 * 8))


def test_the_loss_is_latent_diffusions_sum_over_a_constant() -> None:
    images, reconstruction, moments = draw(2, 3, 8, 8), draw(2, 3, 8, 8, seed=1), draw(2, 4, 4, 4, seed=2)
    summed = (reconstruction - images).abs().sum((1, 2, 3)) + 1e-6 * kl_from_standard_normal(moments)
    torch.testing.assert_close(of(reconstruction, images, moments, kl=1e-6), summed / images[0].numel())


def test_one_images_loss_does_not_depend_on_the_others() -> None:
    images, reconstruction, moments = draw(3, 3, 8, 8), draw(3, 3, 8, 8, seed=1), draw(3, 4, 4, 4, seed=2)
    together = of(reconstruction, images, moments, kl=0.1, feature=1)
    alone = [of(reconstruction[n : n + 1], images[n : n + 1], moments[n : n + 1], kl=0.1, feature=1) for n in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_a_loss_of_bf16_outputs_is_fp32() -> None:
    loss = of(draw(1, 3, 4, 4).bfloat16(), draw(1, 3, 4, 4, seed=1), draw(1, 4, 2, 2).bfloat16(), kl=1e-6, feature=1)
    assert loss.dtype == torch.float32


def test_no_feature_is_computed_where_its_weight_is_zero() -> None:
    def features(images: Tensor) -> Sequence[Tensor]:
        raise AssertionError("asked for features")

    images, moments = draw(1, 3, 4, 4), draw(1, 4, 2, 2)
    autoencoding_loss(knows(images, moments), images, noise=moments[:, :2], features=features, kl_weight=0, feature_weight=0)


def test_edges_are_differences_of_neighbours_at_every_scale() -> None:
    ramp = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    across, down, across_2, down_2 = edges_at_scales(ramp, scales=2)
    assert across.shape == (1, 1, 8, 7) and bool((across == 1).all()) and not down.any()
    assert across_2.shape == (1, 1, 4, 3) and bool((across_2 == 2).all()) and not down_2.any()


def test_a_change_of_colour_has_no_edge_distance_and_a_blurred_line_has_some() -> None:
    line = torch.zeros(1, 3, 16, 16)
    line[..., 8] = 1
    blurred = torch.nn.functional.avg_pool2d(line, 3, stride=1, padding=1)
    assert feature_distance(line + 0.5, line, edges_at_scales).item() == pytest.approx(0, abs=1e-7)
    assert feature_distance(blurred, line, edges_at_scales).item() > 0.01


def test_the_gradient_of_the_feature_distance_is_that_of_a_finite_difference() -> None:
    images, reconstruction, direction = (draw(1, 3, 8, 8, seed=seed).double() for seed in range(3))
    reconstruction.requires_grad_()
    (gradient,) = torch.autograd.grad(feature_distance(reconstruction, images, edges_at_scales).sum(), reconstruction)
    step = 1e-7 * direction
    both = [feature_distance(reconstruction.detach() + sign * step, images, edges_at_scales).item() for sign in (1, -1)]
    assert (both[0] - both[1]) / 2e-7 == pytest.approx((gradient * direction).sum().item(), rel=1e-4)
