"""google's DDPM of 256 pixels in its true shape, with random weights, is fine-tuned and halved on two ranks under FSDP2."""

import json
import logging
import math
from pathlib import Path
from typing import cast

import pytest

from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from launch.chain import planned_stages, student_config, with_teacher
from launch.data import with_data
from launch.run_dir import freeze
from tests.distributed.pool import RankPool
from trainer.architectures import read_architecture
from trainer.checkpoint import read_tensors
from trainer.config import RunConfig
from trainer.config_io import load_recipe, recipe_path
from trainer.manifest import newest_checkpoint
from trainer.tiny_models.pipelines import write_pipeline

pytestmark = [pytest.mark.distributed, pytest.mark.models]

logger = logging.getLogger(__name__)  # --log-cli-level=INFO shows the figures

RANKS, STEPS, GIB_ALLOWED = 2, 3, 20.0
MILLION_WEIGHTS = 113.673
CHANGES = [
    "data.global_batch_size=2",
    "data.micro_batch_size=1",
    "data.workers=0",
    "engine.kind=fsdp",
    f"train.stop_after_steps={STEPS}",  # an export would draw pictures for an hour
    "logging.every_steps=1",
    "logging.sample_every_steps=0",
    "checkpoint.asynchronous=false",
]


def test_the_true_shape_is_fine_tuned_and_halved_on_two_ranks(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_pipeline(read_architecture("ddpm_celebahq_256"), base, seed=0, vocabulary="words")
    pack(FacesSource("open-peeps", 8), tmp_path / "shards", size=256, workers=1)
    changes = [*CHANGES, f"model.base={base}", f"data.shards={tmp_path / 'shards'}"]
    pool = RankPool(RANKS, logs=tmp_path)
    try:
        tuned = _frozen(tmp_path / "tuned", load_recipe(recipe_path("ddpm_celebahq_cartoon"), changes))
        _train(pool, tuned)
        more = [f"distill.teacher={tuned}", "engine.precision=bf16", "data.image_size=256", "train.activation_checkpointing=true"]
        chain = load_recipe(recipe_path("distill_cifar10_500"), [*changes, *more])
        assert chain.distill is not None
        chain = with_teacher(chain, tuned)
        assert chain.distill is not None
        [stage] = planned_stages(chain, chain.distill)
        student = student_config(chain, chain.distill, stage, teacher=str(tuned)).model_copy(update={"distill": None})
        _train(pool, _frozen(tmp_path / "student", student))
    finally:
        pool.close()


def _frozen(run_dir: Path, config: RunConfig) -> Path:
    shards = Path(str(config.data.shards))
    freeze(run_dir, with_data(config, [shards], run_dir=run_dir, root=run_dir), shards=shards)
    return run_dir


def _train(pool: RankPool, run_dir: Path) -> None:
    """Three steps on all ranks: finite losses, a checkpoint of the true number of weights, within the memory that is here."""
    answers = pool.run("tests.models.true_shape_jobs:train_run", {"run_dir": str(run_dir)}, limit_seconds=1500)
    found = [cast("dict[str, float]", answer) for answer in answers]
    losses = [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    taken = sum(answer["taken_gib"] for answer in found)
    logger.info("%s: losses %s, taken %.2f GiB, %.0f seconds", run_dir.name, losses, taken, found[0]["seconds"])
    assert [answer["code"] for answer in found] == [75] * RANKS
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None and checkpoint.step == STEPS
    assert sum(tensor.numel() for tensor in read_tensors(checkpoint, "model").values()) / 1e6 == pytest.approx(MILLION_WEIGHTS, abs=0.001)
    assert taken < GIB_ALLOWED
