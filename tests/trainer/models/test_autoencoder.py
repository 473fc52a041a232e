"""The autoencoder that is trained here: its shape, its two halves, and that stock diffusers reads what it became."""

from itertools import chain
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from trainer.models.autoencoder import TrainedAutoencoder, build_autoencoder, latent_scale


def tiny(*, seed: int = 0) -> TrainedAutoencoder:
    """Two levels of 8 and 16 channels: images are halved once."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = build_autoencoder(channels=(8, 16), layers_per_block=1, latent_channels=4, norm_groups=4, image_size=16)
    return TrainedAutoencoder(vae)


def draw(model: TrainedAutoencoder, count: int = 2) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] and posterior noise."""
    stream = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, 16, 16, generator=stream) * 2 - 1, torch.randn(count, *model.latent_shape(16), generator=stream)


def test_each_level_but_the_last_halves_the_image() -> None:
    vae = build_autoencoder(channels=(4, 4, 8), layers_per_block=1, latent_channels=3, norm_groups=4, image_size=16)
    assert TrainedAutoencoder(vae).latent_shape(16) == (3, 4, 4)
    assert vae.encode(torch.zeros(1, 3, 16, 16), return_dict=False)[0].mode().shape == (1, 3, 4, 4)
    assert vae.config["sample_size"] == 16 and vae.config["scaling_factor"] == 1


def test_a_size_that_cannot_be_halved_and_a_width_that_cannot_be_grouped_are_refused() -> None:
    with pytest.raises(ValueError, match=r"image size 18 cannot be halved 2 times for model\.channels=\[4, 4, 8\]; .* a multiple of 4"):
        build_autoencoder(channels=(4, 4, 8), layers_per_block=1, latent_channels=3, norm_groups=4, image_size=18)
    with pytest.raises(ValueError, match=r"model\.channels=\[4, 6\] has \[6\], no multiple of model\.norm_groups=4"):
        build_autoencoder(channels=(4, 6), layers_per_block=1, latent_channels=3, norm_groups=4, image_size=16)


def test_its_output_is_the_stock_encoders_moments_and_the_stock_decoders_image_of_the_noisy_latent() -> None:
    model = tiny()
    images, noise = draw(model)
    reconstruction, moments = model(images, noise, {}).sample
    stock = model.vae.encode(images, return_dict=False)[0]
    assert torch.equal(moments, stock.parameters)
    noisy = stock.mean + stock.std * noise
    torch.testing.assert_close(reconstruction, model.vae.decode(noisy, return_dict=False)[0])  # pyright: ignore[reportArgumentType]
    assert reconstruction.shape == images.shape and moments.shape == (2, 8, 8, 8)


def test_the_same_images_and_noise_give_the_same_bits_and_other_noise_does_not() -> None:
    images, noise = draw(tiny())
    once, again = (tiny().train()(images, noise).sample[0] for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, tiny()(images, -noise).sample[0])


def test_under_bf16_autocast_both_outputs_are_fp32() -> None:
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(part.dtype == torch.float32 for part in model(*draw(model)).sample)


def test_the_gradient_of_the_image_reaches_every_weight_of_both_halves() -> None:
    model = tiny()
    model(*draw(model)).sample[0].square().mean().backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == []
    assert {name.split(".")[1] for name, _ in model.named_parameters()} == {"encoder", "decoder", "quant_conv", "post_quant_conv"}


def test_the_noise_carries_the_gradient_to_the_log_variance() -> None:
    model = tiny()
    images, noise = draw(model)
    for factor, reached in ((1.0, True), (0.0, False)):
        reconstruction, moments = model(images, factor * noise).sample
        (gradient,) = torch.autograd.grad(reconstruction.square().mean(), moments)
        assert bool(gradient[:, 4:].any()) == reached


def test_units_are_distinct_parts_that_share_no_weight() -> None:
    model = tiny()
    weights = [id(weight) for weight in chain.from_iterable(unit.parameters() for unit in model.units())]
    assert len(weights) == len(set(weights))
    assert set(weights) < {id(weight) for weight in model.parameters()}
    assert len(weights) > 0.8 * len(list(model.parameters()))


def test_the_saved_folder_is_a_stock_autoencoder_with_the_measured_scaling_factor(tmp_path: Path) -> None:
    model = tiny()
    images, _ = draw(model)
    model.vae.register_to_config(scaling_factor=0.25)
    model.vae.save_pretrained(tmp_path)
    stock = AutoencoderKL.from_pretrained(tmp_path, local_files_only=True, use_safetensors=True)
    assert stock.config["scaling_factor"] == 0.25
    with torch.no_grad():
        assert torch.equal(stock(images).sample, model.vae.eval()(images).sample)


def test_the_scale_gives_sampled_latents_a_deviation_of_one() -> None:
    stream = torch.Generator().manual_seed(0)
    mean = 3 + 2 * torch.randn(500, 4, 4, 4, generator=stream)
    log_variance = torch.full_like(mean, 1.5**2).log()
    scale = latent_scale(torch.cat([mean, log_variance], dim=1).split(64))
    sampled = mean + 1.5 * torch.randn(mean.shape, generator=stream)
    assert scale == pytest.approx((2**2 + 1.5**2) ** -0.5, rel=0.01)
    assert (scale * sampled).std().item() == pytest.approx(1, rel=0.01)


def test_the_scale_of_no_latents_and_of_infinite_ones_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0 latent elements .* train the autoencoder on images first"):
        latent_scale([])
    with pytest.raises(ValueError, match="give no scaling factor"):
        latent_scale([torch.full((1, 2, 1, 1), float("nan"))])
