"""The inpainting recipe of 10,000 iterations, in small: begun on one rank, gone on with on two Slurm nodes of two, one curve."""

from pathlib import Path

import pytest

from tests.cluster.runs import SlurmRun, halfstep, lines
from tests.cluster.slurm_cluster import Slurm
from trainer.config_io import recipe_path
from trainer.tiny_models.make import make_tiny

pytestmark = [pytest.mark.distributed, pytest.mark.cluster]

RECIPE = recipe_path("sd_inpaint_cartoon_10k-tiny")
STEPS, QUARTER = 12, 3
OVERRIDES = (f"train.steps={STEPS}", "checkpoint.every_steps=3", "logging.sample_every_steps=6")


def losses(run_dir: Path) -> list[float]:
    """Of each step, every one there once."""
    found = lines(run_dir / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(STEPS)), f"{run_dir}: {[line['step'] for line in found]}"
    return [float.fromhex(str(line["loss_hex"])) for line in found]


def test_a_quarter_on_one_rank_and_the_rest_on_slurm_is_one_curve(slurm: Slurm, tmp_path: Path) -> None:
    base = make_tiny("stable_diffusion_inpainting", tmp_path / "base")
    words = (*OVERRIDES, f"model.base={base}")
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    done = halfstep("train", RECIPE, "--run-dir", whole, "--ranks", "1", *words)
    assert done.returncode == 0, done.stderr
    begun = halfstep("train", RECIPE, "--run-dir", run_dir, "--ranks", "1", *words, f"train.stop_after_steps={QUARTER}")
    assert begun.returncode == 75, begun.stderr
    cluster = ("--cluster", "slurm", "cluster.nodes=2", "cluster.ranks_per_node=2", "cluster.exclusive=true")
    run = SlurmRun(slurm, run_dir, ("train", str(RECIPE), "--run-dir", str(run_dir), *cluster, *words))
    queued = run.again()
    assert queued.returncode == 0, queued.stderr
    run.finish()
    attempts = lines(run_dir / "attempts.jsonl")
    assert [(attempt["step"], attempt["world_size"]) for attempt in attempts] == [(0, 1), (QUARTER, 4)]
    assert losses(run_dir) == pytest.approx(losses(whole), abs=1e-6)
    assert (run_dir / "export" / "model_index.json").read_text().count("StableDiffusionInpaintPipeline") == 1
