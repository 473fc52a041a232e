"""What draws while a model trains: nothing is held twice, companions take half the memory, and no picture changes by it."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from data_shards.reading.sample import MicroBatch
from tests.trainer.latents.finished_runs import SIDE, Bases, recipe
from trainer.config import RunConfig
from trainer.latents import pictures
from trainer.latents.inputs import Inputs, build_inputs
from trainer.latents.pictures import Pictures, shared_parts
from trainer.latents.sizes import picture_side
from trainer.latents.trained import Trained, build_trained
from trainer.models.network import network
from trainer.prompting.folder import load_pipeline

CPU = torch.device("cpu")
LORA = {"kind": "lora", "rank": 2}
HALF = {"kandinsky22_decoder": "prior", "kandinsky22_prior": "decoder", "wuerstchen_prior": "decoder"}


def built(bases: Bases, kind: str) -> tuple[RunConfig, Trained, Inputs]:
    others = {"kandinsky22_decoder": "kandinsky22_prior", "kandinsky22_prior": "kandinsky22_decoder"}
    other = bases(others[kind]) if kind in others else bases(kind) / "decoder"
    section = {"kind": kind, "base": str(bases(kind)), HALF[kind]: str(other)}
    config = recipe(section, adaptation=LORA, validation={"prompts": ["a face"], "guidance_scale": 3.0, "companion_steps": 2})
    trained = build_trained(config)
    return config, trained, build_inputs(config, trained, device=CPU)


def no_examples(count: int) -> MicroBatch:
    raise AssertionError("the recipe names its prompts")


def drawn(run: tuple[RunConfig, Trained, Inputs], run_dir: Path) -> Tensor:
    config, trained, inputs = run
    drawing = Pictures(config, run_dir, trained, inputs, image_size=SIDE, examples=no_examples)
    side = picture_side(config, 2 * SIDE)
    assert side is not None
    requests = pictures.sheet_requests(config, drawing.prompts, [1, 2], size=(side, side))
    return drawing.draw_requests(network(trained.module), requests)


@pytest.mark.parametrize("kind", HALF)
def test_a_companion_held_in_bf16_draws_the_same_bits(bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    run, loaded = built(bases, kind), []

    def load(folder: Path, *, device: torch.device, precision: str, parts: Mapping[str, nn.Module]) -> DiffusionPipeline:
        assert precision == "bf16"
        loaded.append(load_pipeline(folder, device=device, precision="bf16", parts=parts))
        return loaded[-1]

    monkeypatch.setattr(pictures, "load_pipeline", load)
    half = drawn(run, tmp_path)
    [companion] = loaded
    models = [model for model in companion.components.values() if isinstance(model, nn.Module)]
    linear = [layer for model in models for layer in model.modules() if isinstance(layer, nn.Linear)]
    held = [layer for layer in linear if layer.weight.dtype == torch.bfloat16]
    assert len(held) >= len(linear) - len(models) > 3
    monkeypatch.setattr(pictures, "load_pipeline", lambda folder, **_: load_pipeline(folder, device=CPU))
    monkeypatch.setattr(pictures, "place_parts", lambda pipeline, **_: None)
    assert torch.equal(drawn(run, tmp_path), half)


def test_the_image_encoder_of_the_data_is_the_one_of_the_pipelines(bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(pictures, "painter", lambda prior, decoder: used.append(prior.image_encoder) or _nothing)
    for kind in ("kandinsky22_prior", "kandinsky22_decoder"):
        config, trained, inputs = built(bases, kind)
        assert inputs.image is not None
        drawing = Pictures(config, tmp_path, trained, inputs, image_size=SIDE, examples=no_examples)
        assert drawing._paint is _nothing and used[-1] is inputs.image.module  # pyright: ignore[reportPrivateUsage]


def _nothing() -> None:
    pass


def test_an_image_encoder_of_other_weights_stays_the_companions(bases: Bases, tmp_path: Path) -> None:
    _, _, inputs = built(bases, "kandinsky22_decoder")
    assert inputs.image is not None
    companion = load_pipeline(bases("kandinsky22_prior"), device=CPU)
    assert list(shared_parts(inputs, str(bases("kandinsky22_prior")))) == ["image_encoder"]
    nn.init.zeros_(companion.image_encoder.visual_projection.weight)
    companion.save_pretrained(tmp_path / "other")
    assert shared_parts(inputs, str(tmp_path / "other")) == {}
