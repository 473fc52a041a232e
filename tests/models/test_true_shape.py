"""Stable Diffusion 2.1 in its true shape goes through real steps on two ranks, in the memory that was planned for it."""

import logging
from pathlib import Path
from typing import cast

import pytest

from tests.distributed.pool import RankPool
from trainer.config_io import load_recipe, recipe_path
from trainer.plan.fake_step import measure
from trainer.plan.from_recipe import plan_input

pytestmark = [pytest.mark.distributed, pytest.mark.models]

logger = logging.getLogger(__name__)  # --log-cli-level=INFO shows the figures

RANKS, GIB_ALLOWED = 2, 20.0
OVERRIDES = [
    "data.image_size=512",
    "data.global_batch_size=2",
    "data.micro_batch_size=1",
    "data.horizontal_flip=false",
    "engine.kind=fsdp",
    "engine.precision=bf16",
]


@pytest.mark.parametrize("checkpointing", [True, False], ids=["gradient_checkpointing", "activations_kept"])
def test_sd_2_1_takes_real_steps_by_lora_within_its_plan(tmp_path: Path, checkpointing: bool) -> None:
    overrides = [*OVERRIDES, f"train.activation_checkpointing={str(checkpointing).lower()}"]
    recipe = recipe_path("sd21_lora_cartoon")
    plan = plan_input(load_recipe(recipe, overrides), world_size=RANKS, ranks_per_node=RANKS, on_gpu=False)
    predicted = measure(plan).peak
    pool = RankPool(RANKS, logs=tmp_path)
    try:
        arguments = {"recipe": str(recipe), "overrides": overrides, "ranks": RANKS}
        answers = pool.run("tests.models.true_shape_jobs:two_steps", arguments, limit_seconds=1500)
    finally:
        pool.close()
    found = [cast("dict[str, float]", answer) for answer in answers]
    taken = sum(answer["taken_gib"] for answer in found)
    counted = [answer["peak_bytes"] for answer in found]
    logger.info("predicted %.3f GiB, counted %s, taken %.2f GiB", predicted / 2**30, [f"{one / 2**30:.3f}" for one in counted], taken)
    assert taken < GIB_ALLOWED
    for one in counted:
        assert predicted == pytest.approx(one, rel=0.15)
