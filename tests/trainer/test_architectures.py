"""The true shapes: their numbers of weights are those that are publicly known."""

import pytest
import torch

from trainer.architectures import architecture_names, read_architecture
from trainer.models.from_config import build_empty_model, build_scheduler, is_model

# Millions as they are publicly known, each with as many digits as are known: of the conversion scripts' runs, OpenCLIP's table of models,
# the authors' READMEs and model cards.
KNOWN_MILLIONS = {
    ("stable_diffusion_1_5", "unet"): (859.52, 0.005),
    ("stable_diffusion_1_5", "text_encoder"): (123.06, 0.005),
    ("stable_diffusion_1_5", "vae"): (83.65, 0.005),
    ("stable_diffusion_2_1", "unet"): (865.91, 0.005),
    ("stable_diffusion_2_1", "text_encoder"): (340.4, 0.05),
    ("stable_diffusion_xl", "unet"): (2567, 0.5),
    ("stable_diffusion_xl", "text_encoder_2"): (694.66, 0.005),
    ("wuerstchen_prior", "prior"): (993, 1),
    ("kandinsky22_prior", "prior"): (1000, 50),
    ("kandinsky22_prior", "image_encoder"): (1844.91, 0.005),
    ("kandinsky22_decoder", "unet"): (1250, 10),
    ("kandinsky22_decoder", "movq"): (67, 1),
    ("ddpm_celebahq_256", "unet"): (113.673, 0.0005),
    ("ddpm_cifar10_32", "unet"): (35.746, 0.0005),
}


@pytest.mark.parametrize("name", architecture_names())
def test_every_model_has_the_number_of_weights_that_its_file_says(name: str) -> None:
    shape = read_architecture(name)
    models = {part: entry for part, entry in shape.components.items() if is_model(entry)}
    assert models.keys() == shape.parameters.keys()
    built = {part: sum(weight.numel() for weight in build_empty_model(entry).parameters()) for part, entry in models.items()}
    assert built == dict(shape.parameters)


def test_an_empty_model_takes_no_memory_and_is_not_drawn() -> None:
    before = torch.random.get_rng_state()
    model = build_empty_model(read_architecture("wuerstchen_prior").components["prior"])
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("name", "part"), KNOWN_MILLIONS)
def test_the_numbers_are_those_that_are_publicly_known(name: str, part: str) -> None:
    millions, tolerance = KNOWN_MILLIONS[name, part]
    assert read_architecture(name).parameters[part] / 1e6 == pytest.approx(millions, abs=tolerance)


def test_inpainting_bases_have_five_more_channels_in() -> None:
    for name, base in (
        ("stable_diffusion_1_5_inpainting", "stable_diffusion_1_5"),
        ("stable_diffusion_2_inpainting", "stable_diffusion_2_1"),
    ):
        wide, narrow = read_architecture(name).parameters["unet"], read_architecture(base).parameters["unet"]
        assert wide - narrow == 5 * 320 * 3 * 3


def test_the_noise_schedule_of_21_is_that_of_its_checkpoint() -> None:
    scheduler = build_scheduler(read_architecture("stable_diffusion_2_1").components["scheduler"])
    config = scheduler.config  # pyright: ignore[reportAttributeAccessIssue]
    assert config.prediction_type == "v_prediction"
    assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(0.00466, abs=1e-5)  # pyright: ignore[reportAttributeAccessIssue]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"did you mean stable_diffusion_2_1.*there are ddpm_celebahq_256, .*kandinsky22_decoder, "):
        read_architecture("stable_diffusion_2.1")


def test_a_change_of_a_key_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="UNet2DConditionModel has no chanels in its config; it has act_fn, "):
        read_architecture("stable_diffusion_1_5").components["unet"].with_config({"chanels": 1})
