"""What a pool's ranks do in tests of frozen encoders: one micro-batch of each, whole on every rank and shared by the ranks."""

from pathlib import Path

import torch
from diffusers import VQModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from data_shards import ranks
from data_shards.derive.request import Precision
from data_shards.encoders.precision import autocast
from data_shards.reading.sample import MicroBatch
from tests.trainer.latents.finished_runs import SIDE, recipe
from trainer.config import RunConfig
from trainer.latents.inputs import Inputs, build_inputs
from trainer.latents.pictures import Pictures, sheet_requests
from trainer.latents.trained import build_trained
from trainer.models.network import network


def use_kandinskys_encoders(decoder: str, prior: str, precision: Precision) -> list[str]:
    """Which of the numbers of shared encoders differ from those of whole ones: latents, decoded, embeddings."""
    whole, shared = (_inputs(decoder, prior, precision, shard_above_gib=limit) for limit in (1.0, 1e-9))
    assert [_is_shared(part) for inputs in (whole, shared) for part in _modules(inputs)] == [False, False, True, True]
    wanted, made = (_made(inputs, precision) for inputs in (whole, shared))
    return [name for name, tensor in wanted.items() if not torch.equal(made[name], tensor)]


def draw_with_kandinskys_encoders(decoder: str, prior: str, run_dir: str) -> bool:
    """Whether pipelines around shared encoders draw the pictures of those around whole ones, where one prompt is left over."""
    drawn = []
    for limit in (1.0, 1e-9):
        config = _recipe(decoder, prior, "bf16", shard_above_gib=limit)
        trained = build_trained(config)
        inputs = build_inputs(config, trained, device=ranks.device())
        drawing = Pictures(config, Path(run_dir), trained, inputs, image_size=SIDE, examples=_no_examples)
        requests = sheet_requests(config, ["a couple", "a woman", "a girl"], [1], size=(SIDE, SIDE))
        drawn.append(drawing.draw_requests(network(trained.module), requests))
    return torch.equal(*drawn)


def _no_examples(count: int) -> MicroBatch:
    raise AssertionError("the prompts are given")


def _recipe(decoder: str, prior: str, precision: Precision, *, shard_above_gib: float) -> RunConfig:
    model = {"kind": "kandinsky22_decoder", "base": decoder, "prior": prior, "frozen_precision": precision}
    engine = {"kind": "fsdp", "shard_frozen_above_gib": shard_above_gib}
    return recipe(model, adaptation={"kind": "lora", "rank": 2}, engine=engine, validation={"companion_steps": 2})


def _inputs(decoder: str, prior: str, precision: Precision, *, shard_above_gib: float) -> Inputs:
    config = _recipe(decoder, prior, precision, shard_above_gib=shard_above_gib)
    return build_inputs(config, build_trained(config), device=ranks.device())


def _modules(inputs: Inputs) -> tuple[nn.Module, nn.Module]:
    assert inputs.vae is not None and inputs.image is not None, "the recipe encodes its images"
    return inputs.vae.module, inputs.image.module


def _is_shared(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def _made(inputs: Inputs, precision: Precision) -> dict[str, Tensor]:
    assert inputs.vae is not None and inputs.image is not None and isinstance(inputs.vae.module, VQModel), "Kandinsky's"
    images = torch.arange(2 * 3 * 64 * 64).remainder(251).to(torch.uint8).view(2, 3, 64, 64)
    latents = inputs.vae.encode(images)
    with torch.no_grad(), autocast(ranks.device(), precision):
        decoded = inputs.vae.module.decode(latents, force_not_quantize=True, return_dict=False)[0]  # pyright: ignore[reportArgumentType]
    return {"latents": latents, "decoded": decoded, "embeddings": inputs.image.encode(images)}
