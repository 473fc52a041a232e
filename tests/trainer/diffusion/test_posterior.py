"""The latents' Gaussian, against diffusers' own reading of the same moments."""

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from trainer.diffusion.posterior import mean_and_log_variance, sample_posterior


def test_moments_are_read_as_diffusers_reads_them_also_beyond_the_clamp() -> None:
    moments = torch.randn(2, 6, 2, 2, generator=torch.Generator().manual_seed(0)) * 40
    stock = DiagonalGaussianDistribution(moments)
    mean, log_variance = mean_and_log_variance(moments)
    assert torch.equal(mean, stock.mean) and torch.equal(log_variance, stock.logvar)
    assert log_variance.min() == -30 and log_variance.max() == 20


def test_a_sample_is_the_mean_and_noise_of_the_posteriors_deviation() -> None:
    stream = torch.Generator().manual_seed(0)
    moments, noise = torch.randn(2, 6, 2, 2, generator=stream), torch.randn(2, 3, 2, 2, generator=stream)
    stock = DiagonalGaussianDistribution(moments)
    torch.testing.assert_close(sample_posterior(moments, noise), stock.mean + stock.std * noise)
    assert torch.equal(sample_posterior(moments, torch.zeros_like(noise)), stock.mode())


def test_moments_of_bf16_are_sampled_in_fp32() -> None:
    assert sample_posterior(torch.zeros(1, 2, 1, 1, dtype=torch.bfloat16), torch.ones(1, 1, 1, 1)).dtype == torch.float32
