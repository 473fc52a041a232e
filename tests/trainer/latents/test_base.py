"""A base's noise levels and parts, the shapes that models take, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from data_shards.reading.sample import MicroBatch
from tests.trainer.latents.finished_runs import SIDE, Bases, recipe
from trainer.latents.base import base_levels, find_part, scheduler_config
from trainer.latents.example import example
from trainer.latents.inputs import build_inputs, drawn_masks, flipped, needed_fields
from trainer.latents.stand_ins import TextStandIn, stand_in
from trainer.latents.trained import build_trained, latent_config, latent_objective
from trainer.tasks.latent import levels_of

CPU = torch.device("cpu")
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def test_a_base_says_what_it_predicts_unless_the_recipe_does() -> None:
    assert base_levels(SCALED).prediction == "eps"
    assert base_levels({**SCALED, "prediction_type": "v_prediction"}).prediction == "v"
    assert base_levels({**SCALED, "prediction_type": "sample"}).prediction == "x_0"
    assert base_levels(SCALED, prediction="v").prediction == "v"
    with pytest.raises(ValueError, match=r"prediction_type is 'flow', wanted one of epsilon, v_prediction, sample"):
        base_levels({**SCALED, "prediction_type": "flow"})


def test_zero_terminal_snr_makes_the_last_level_noise_alone_and_wants_no_eps() -> None:
    own = base_levels({**SCALED, "prediction_type": "v_prediction"})
    shifted = base_levels({**SCALED, "prediction_type": "v_prediction"}, zero_terminal=True)
    assert float(own.alpha_bar[-1]) > 0 == float(shifted.alpha_bar[-1])
    torch.testing.assert_close(shifted.alpha_bar[0], own.alpha_bar[0])
    again = base_levels({**SCALED, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, zero_terminal=True)
    assert torch.equal(again.alpha_bar, shifted.alpha_bar), "a base that has it already is left as it is"
    with pytest.raises(ValueError, match=r"objective.zero_terminal_snr=true: the base predicts eps.* set objective.prediction=v"):
        base_levels(SCALED, zero_terminal=True)


def test_a_part_without_a_scheduler_beside_it_names_the_file(tmp_path: Path, bases: Bases) -> None:
    for name in ("unet", "model_index.json"):
        (tmp_path / name).symlink_to(bases("stable_diffusion") / name)
    files = find_part(str(tmp_path), "unet", revision=None)
    with pytest.raises(ValueError, match=r"scheduler_config.json is missing.* give a whole pipeline in model.base"):
        scheduler_config(files)


def test_a_base_that_does_not_fit_the_recipe_is_refused(bases: Bases) -> None:
    plain, inpainting = str(bases("stable_diffusion")), str(bases("stable_diffusion_inpainting"))
    with pytest.raises(ValueError, match=r"takes 9 channels: it is an inpainting base; set objective.inpainting=\{\}"):
        build_trained(recipe({"kind": "stable_diffusion", "base": inpainting}))
    masked = {"kind": "latent_denoising", "inpainting": {}}
    with pytest.raises(ValueError, match=r"takes 4 channels, and LoRA leaves its first layer as it is.* set adaptation.kind=full"):
        build_trained(recipe({"kind": "stable_diffusion", "base": plain}, objective=masked, adaptation={"kind": "lora"}))
    with pytest.raises(ValueError, match=r"LoRA target 'to_z' matches no module"):
        build_trained(recipe({"kind": "stable_diffusion", "base": plain}, adaptation={"kind": "lora", "targets": ["to_z"]}))


def test_a_pixel_models_recipe_is_no_latent_one() -> None:
    config = recipe({"kind": "tiny_unet"}, objective={"kind": "denoising"})
    with pytest.raises(ValueError, match=r"model.kind=tiny_unet does not denoise latents"):
        latent_config(config)
    with pytest.raises(ValueError, match=r"objective.kind=denoising is not of a latent model; set objective.kind=latent_denoising"):
        latent_objective(config)


FAMILIES = {
    "stable_diffusion": (4, 8, 8),
    "stable_diffusion_inpainting": (4, 8, 8),
    "wuerstchen_prior": (16, 2, 2),
    "kandinsky22_prior": (32,),
    "kandinsky22_decoder": (4, 8, 8),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_takes_the_example_of_its_shape(kind: str, bases: Bases) -> None:
    family = kind.removesuffix("_inpainting")
    model: dict[str, object] = {"kind": family, "base": str(bases(kind))}
    if family == "kandinsky22_decoder":
        model["prior"] = str(bases("kandinsky22_prior"))
    masked = {"kind": "latent_denoising", "inpainting": {}} if kind != family else {"kind": "latent_denoising"}
    config = recipe({**model, "frozen_precision": "fp32"}, objective=masked, engine={"precision": "fp32"})
    trained = build_trained(config)
    inputs = build_inputs(config, trained, device=CPU)
    shape = inputs.latent_shape(SIDE, SIDE)
    assert shape == FAMILIES[kind]
    with torch.no_grad():
        output = trained.module(*example(config, trained, shape, count=2)).sample
    assert output.shape[0] == 2 and output.shape[2:] == shape[1:]
    images = torch.full((2, 3, SIDE, SIDE), 100, dtype=torch.uint8)
    assert inputs.shape(MicroBatch(images, ("a", "b"), ("a cat", None))) == (2, *shape)
    if inputs.cell is not None:
        with pytest.raises(ValueError, match=r"images of 64 x 60 pixels have no whole cells of .*; set data.image_size to a multiple"):
            inputs.latent_shape(60, 64)


def test_a_small_base_from_scratch_starts_the_same_and_has_levels_of_its_own(bases: Bases) -> None:
    model = {"kind": "latent_base", "autoencoder": str(bases("stable_diffusion") / "vae"), "channels": [32, 64], "attention": [False, True]}
    config = recipe(
        {**model, "text_width": 32, "text_layers": 1}, objective={"kind": "latent_denoising", "zero_terminal_snr": True, "prediction": "v"}
    )
    first = build_trained(config)
    torch.rand(3)
    second = build_trained(config).module.state_dict()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.module.state_dict().items())
    assert all(parameter.requires_grad for parameter in first.module.parameters())
    levels = levels_of(config, first)
    assert levels is not None and levels.prediction == "v" and float(levels.alpha_bar[-1]) == 0
    with torch.no_grad():
        assert first.module(*example(config, first, (4, 8, 8))).sample.shape == (1, 4, 8, 8)


FIELDS = {
    "images and captions": ({}, {}, ("image", "caption")),
    "stored latents": ({"latents": "stored"}, {}, ("latents.npy", "caption")),
    "both stored": ({"latents": "stored", "text": "stored"}, {}, ("latents.npy", "text.npy")),
    "one prompt": ({}, {"dreambooth": {"instance_prompt": "a face"}}, ("image",)),
    "stored masks": ({}, {"objective": {"kind": "latent_denoising", "inpainting": {"source": "stored"}}}, ("image", "caption", "mask.png")),
    "Wuerstchen": ({"kind": "wuerstchen_prior", "latents": "stored"}, {}, ("image.npy", "caption")),
    "Kandinsky's prior": (
        {"kind": "kandinsky22_prior", "latents": "stored", "text": "stored"},
        {},
        ("image.npy", "text.npy", "pooled.npy", "text_mask.npy"),
    ),
    "Kandinsky's decoder": ({"kind": "kandinsky22_decoder"}, {}, ("image",)),
    "Kandinsky's decoder stored": ({"kind": "kandinsky22_decoder", "latents": "stored"}, {}, ("latents.npy", "image.npy")),
}


@pytest.mark.parametrize(("model", "sections", "fields"), FIELDS.values(), ids=FIELDS.keys())
def test_the_reader_delivers_what_the_model_is_told(
    model: dict[str, object], sections: dict[str, dict[str, object]], fields: tuple[str, ...]
) -> None:
    whole = {"data": {"shards": "x", "global_batch_size": 4, "micro_batch_size": 1}, **sections}
    assert needed_fields(recipe({"kind": "stable_diffusion", **model}, **whole)) == fields


def test_masks_follow_seed_step_and_key_and_none_is_drawn_for_text_to_image() -> None:
    batch = MicroBatch(torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8), ("a", "b"))
    assert drawn_masks(recipe({"kind": "stable_diffusion"}), batch, 0, side=8) is None
    config = recipe({"kind": "stable_diffusion"}, objective={"kind": "latent_denoising", "inpainting": {"brush": 1}})
    first, again, next_step = (drawn_masks(config, batch, step, side=8) for step in (3, 3, 4))
    assert first is not None and again is not None and next_step is not None
    assert torch.equal(first, again) and not torch.equal(first, next_step)
    alone = drawn_masks(config, MicroBatch(batch.images[1:], ("b",)), 3, side=8)
    assert alone is not None and torch.equal(alone[0], first[1]), "what else is in the micro-batch does not matter"


def test_flips_mirror_those_that_are_told() -> None:
    images = torch.arange(24, dtype=torch.uint8).view(2, 1, 3, 4)
    found = flipped(images, torch.tensor([True, False]))
    assert torch.equal(found[0], images[0].flip(2)) and torch.equal(found[1], images[1])


def test_a_text_encoder_that_is_trained_gets_its_tokens_through_a_stock_pipelines_states(bases: Bases) -> None:
    config = recipe({"kind": "stable_diffusion", "base": str(bases("stable_diffusion")), "train_text_encoder": True})
    trained, asked = build_trained(config), list[dict[str, torch.Tensor]]()

    def network(x_t: torch.Tensor, timestep: torch.Tensor, cond: dict[str, torch.Tensor]) -> torch.Tensor:
        asked.append(cond)
        return x_t

    unet = stand_in(trained, network, device=CPU, tick=lambda: None)  # type: ignore[arg-type]
    ids = torch.tensor([[1000, 3, 49407]])
    [states] = TextStandIn()(ids)
    unet(torch.zeros(1, 4, 8, 8), torch.tensor(5), encoder_hidden_states=states.to(torch.float32), return_dict=False)
    assert asked[0].keys() == {"input_ids"} and torch.equal(asked[0]["input_ids"], ids)


def test_meaning_of_a_scheduler_file_is_read_from_the_pipeline(bases: Bases) -> None:
    folder = bases("stable_diffusion")
    config = scheduler_config(find_part(str(folder), "unet", revision=None))
    assert config == json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
