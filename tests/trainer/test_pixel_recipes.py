"""The paper's recipes of pixel models: the size of its tiny diffusion, its ablations, the roles of data, and their tiny twins."""

from collections.abc import Mapping

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d import UNet2DModel

from trainer.config import RunConfig, StepDecayLRSchedule, pixel_model
from trainer.config_io import load_recipe, recipe_path
from trainer.models.tiny_unet import build_tiny_unet

SUFFIX = "-tiny"
ROLES = ("source", "finetune", "mixture", "teacher_samples")
MILLION = 1_000_000


def recipe(name: str, *overrides: str) -> RunConfig:
    return load_recipe(recipe_path(name), overrides)


def network(config: RunConfig, image_size: int) -> UNet2DModel:
    with torch.device("meta"):
        return build_tiny_unet(pixel_model(config), image_size)


def weights(model: UNet2DModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def attentions(model: UNet2DModel) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


def test_the_papers_tiny_diffusion_is_as_the_paper_says() -> None:
    config = recipe("tiny_diffusion_53m")
    assert abs(weights(network(config, 64)) - 53 * MILLION) <= 0.01 * 53 * MILLION
    assert (config.noise_schedule.kind, config.noise_schedule.steps, config.data.global_batch_size) == ("cosine", 1000, 16)
    assert (config.optim.kind, config.optim.learning_rate) == ("adam", 1e-4)
    epoch, decay = 3000 // 16, config.lr_schedule
    assert isinstance(decay, StepDecayLRSchedule) and (decay.every_steps, decay.factor) == (2 * epoch, 0.95)
    assert config.train.steps == 60 * epoch and config.steps_may_grow, "60 epochs, and then on to the 120 of the paper's list"


@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize(("name", "image_size"), [("tiny_diffusion_53m", 64), ("tiny_diffusion_53m-tiny", 32)])
def test_every_attention_has_the_heads_that_are_asked_for_and_their_number_costs_nothing(name: str, image_size: int, heads: int) -> None:
    model = network(recipe(name, f"model.attention_heads={heads}"), image_size)
    assert {attention.heads for attention in attentions(model)} == {heads}
    assert weights(model) == weights(network(recipe(name), image_size))


@pytest.mark.parametrize(
    ("name", "channels", "image_size"),
    [("tiny_diffusion_53m", [128, 288, 288, 384], 64), ("tiny_diffusion_53m-tiny", [32, 64, 136, 136], 32)],
)
def test_the_convolutions_in_the_stead_of_attention_have_as_many_weights(name: str, channels: list[int], image_size: int) -> None:
    words = f"model.attention=[false,false,false,false] model.channels={str(channels).replace(' ', '')}"
    assert words in recipe_path(name).read_text(), "the header gives the command"
    model = network(recipe(name, *words.split()), image_size)
    assert not attentions(model), "in the middle neither"
    assert weights(model) == pytest.approx(weights(network(recipe(name), image_size)), rel=0.01)


def how_it_learns(config: RunConfig) -> Mapping[str, object]:
    """What a recipe shares with its twin: everything but sizes, numbers of steps and images, rates and machines."""
    distill = config.distill and config.distill.model_dump(include={"target", "sampler", "loss", "clip_target"})
    return {
        "role": config.data.role,
        "flip": config.data.horizontal_flip,
        "objective": None if config.distill else config.objective,  # the teacher's
        "noise_schedule": None if config.distill else config.noise_schedule,
        "optim": config.optim.kind,
        "lr_schedule": config.lr_schedule.kind,
        "distill": distill,
    }


@pytest.mark.parametrize("name", ["tiny_diffusion_53m", *(f"distill_finetuned_{role}" for role in ROLES)])
def test_a_recipe_has_a_twin_that_learns_as_it_does(name: str) -> None:
    assert how_it_learns(recipe(name + SUFFIX)) == how_it_learns(recipe(name))


@pytest.mark.parametrize("suffix", ["", SUFFIX])
@pytest.mark.parametrize("role", ROLES)
def test_each_role_has_its_recipe_for_both_samplers(role: str, suffix: str) -> None:
    config = recipe(f"distill_finetuned_{role}{suffix}")
    assert config.data.role == role and bool(config.data.mixture) == (role == "mixture")
    assert config.distill is not None and config.distill.teacher is not None and config.distill.target == "ddim"
    ancestral = recipe(f"distill_finetuned_{role}{suffix}", "distill.target=ancestral").distill
    assert ancestral is not None and ancestral.sampler == "ancestral"


def test_the_roles_differ_in_nothing_else() -> None:
    for suffix in ("", SUFFIX):
        configs = [recipe(f"distill_finetuned_{role}{suffix}").model_dump(exclude={"data"}) for role in ROLES]
        assert all(config == configs[0] for config in configs)


def test_the_fine_tuned_teacher_is_the_sources_network_on_another_style() -> None:
    source, tuned = recipe("faces_source"), recipe("faces_finetuned")
    assert pixel_model(tuned).start == "runs/faces_source" and source.data.faces != tuned.data.faces
    assert pixel_model(tuned).model_copy(update={"start": None}) == source.model
    assert (source.objective, source.noise_schedule) == (tuned.objective, tuned.noise_schedule)
