"""Every recipe of a latent model has a tiny twin, which trains as it does: the same on every engine, and bit for bit after a kill."""

import math
from collections.abc import Mapping
from itertools import cycle

import pytest

from tests.distributed.grid import largest_difference
from tests.distributed.runs import curves
from tests.models.twins import ENGINES, NAMES, REFERENCE, STEPS, SUFFIX, TOLERANCE, Twins
from trainer.config import DreamBoothConfig, RunConfig, TinyUNetConfig
from trainer.config_io import load_recipe, recipe_path, shipped
from trainer.export_folder import exported_checkpoint
from trainer.hash import hash_run
from trainer.manifest import newest_checkpoint

SAMPLE_STEPS = 5
SAMPLE = list(zip(NAMES, cycle(ENGINES), strict=False))
"""Every twin on one engine, every engine with some twin."""
ALL = pytest.mark.models
SMALL = ("autoencoder_faces", "latent_base_faces", "faces_lora", "faces_dreambooth", "faces_inpaint", "latent_halved_tiny")
"""They run on CPU cores and without a download as they are; benchmarks/latent_learning.py or tests of their own run them."""


@pytest.mark.parametrize("name", [file.stem for file in shipped("recipes") if not file.stem.endswith(SUFFIX) and file.stem not in SMALL])
def test_a_recipe_of_a_latent_model_has_a_twin_that_learns_as_it_does(name: str) -> None:
    config = load_recipe(recipe_path(name))
    if isinstance(config.model, TinyUNetConfig):
        return
    assert f"{name}{SUFFIX}" in NAMES or config.distill is not None
    twin = load_recipe(recipe_path(f"{name}{SUFFIX}"))
    assert how_it_learns(twin) == how_it_learns(config)
    assert twin.train.steps == STEPS and twin.data.faces is not None


def how_it_learns(config: RunConfig) -> Mapping[str, object]:
    """What a recipe shares with its twin: everything but sizes, numbers of steps and images, rates and machines."""
    dreambooth = config.dreambooth and config.dreambooth.model_dump(exclude={"class_images", "class_steps"})
    assert dreambooth is None or set(dreambooth) < set(DreamBoothConfig.model_fields)
    return {
        "model": config.model.model_dump(include={"kind", "latents", "text", "train_text_encoder", "latent_channels"}),
        "adaptation": config.adaptation,
        "dreambooth": dreambooth,
        "objective": config.objective,
        "noise_schedule": config.noise_schedule,
        "optim": config.optim.model_dump(exclude={"learning_rate"}),
        "lr_schedule": config.lr_schedule.kind,
        "validation": config.validation.model_dump(exclude={"companion_steps"}),
        "horizontal_flip": config.data.horizontal_flip,
        "activation_checkpointing": config.train.activation_checkpointing,
    }


@pytest.mark.parametrize(("name", "engine"), [pytest.param(*case, marks=pytest.mark.models_sample) for case in SAMPLE])
def test_a_twin_trains_draws_saves_and_exports(twins: Twins, name: str, engine: str) -> None:
    run_dir = twins.run(name, engine, steps=SAMPLE_STEPS)
    losses, checkpoint = twins.losses(run_dir), newest_checkpoint(run_dir)
    assert len(losses) == SAMPLE_STEPS and all(map(math.isfinite, losses))
    assert checkpoint is not None and checkpoint.step == SAMPLE_STEPS
    assert exported_checkpoint(run_dir / "export") == checkpoint.sha256
    assert (run_dir / "samples" / "step_000000.png").is_file() and (run_dir / "samples" / f"step_{SAMPLE_STEPS:06d}.png").is_file()


def test_every_engine_is_in_the_sample() -> None:
    assert {name for name, _ in SAMPLE} == set(NAMES)
    assert {engine for _, engine in SAMPLE} == set(ENGINES)


@pytest.mark.parametrize("name", [pytest.param(name, marks=ALL) for name in NAMES])
def test_a_twin_learns_the_same_on_every_engine(twins: Twins, name: str) -> None:
    reference = twins.run(name, REFERENCE)
    assert len(twins.losses(reference)) == STEPS
    for engine in set(ENGINES) - {REFERENCE}:
        run_dir = twins.run(name, engine)
        assert largest_difference(twins.losses(run_dir), twins.losses(reference)) <= TOLERANCE, engine
        assert hash_run(run_dir).samples == hash_run(reference).samples


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [pytest.param(name, marks=ALL) for name in NAMES])
def test_a_twin_whose_rank_was_killed_ends_in_the_same_bits(twins: Twins, name: str, engine: str) -> None:
    reference, run_dir = twins.run(name, engine), twins.killed(name, engine)
    assert curves(run_dir) == curves(reference)
    assert hash_run(run_dir) == hash_run(reference)
    sheets = [path.name for path in sorted((reference / "samples").glob("*.png"))]
    assert sheets and all((run_dir / "samples" / name).read_bytes() == (reference / "samples" / name).read_bytes() for name in sheets)


@pytest.mark.models
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ten_thousand_iterations_have_one_curve_on_any_number_of_ranks(twins: Twins, ranks: int) -> None:
    """The global batch of 8 is 8, 4 or 2 micro-batches a rank; each run is stopped in the middle, and the second half has other ranks."""
    name, middle = "sd_inpaint_cartoon_10k-tiny", STEPS // 2
    reference = twins.run(name, REFERENCE, ranks=1)
    run_dir = twins.folder / f"{name}_{ranks}_stopped" / "run"
    twins.freeze(run_dir, name, f"train.stop_after_steps={middle}")
    assert twins.train(run_dir, ranks=ranks) == [75] * ranks
    twins.freeze(run_dir, name)
    others = {1: 1, 2: 4, 4: 2}[ranks]
    assert twins.train(run_dir, ranks=others) == [0] * others
    assert hash_run(run_dir).samples == hash_run(reference).samples
    if ranks == 1:
        assert curves(run_dir) == curves(reference) and hash_run(run_dir) == hash_run(reference)
    assert largest_difference(twins.losses(run_dir), twins.losses(reference)) <= 1e-6
    assert largest_difference(twins.losses(twins.run(name, REFERENCE, ranks=ranks)), twins.losses(reference)) <= 1e-6
