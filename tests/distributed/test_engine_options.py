"""Every option means the same on every engine: partly frozen models, precisions, layouts, offloading, hybrid sharding."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from tests.distributed.pool import RankPool
from trainer.tiny_models.make import make_tiny

pytestmark = pytest.mark.distributed
Pool = Callable[[int], RankPool]
STEPS = 4
ENGINES = ("replicated", "fsdp", "zero_1", "zero_2", "zero_3")


def take_steps(pool: Pool, ranks: int, **options: object) -> dict[str, object]:
    """The answer of rank 0; the others' numbers are the same."""
    answers = pool(ranks).run("tests.distributed.engine_jobs:take_steps", {"options": options, "steps": STEPS})
    first = cast("dict[str, object]", answers[0])
    assert all(answer == first for answer in answers), "the ranks know different numbers"
    return first


def assert_equal(got: dict[str, object], wanted: dict[str, object], *, tolerance: float) -> None:
    """Losses, norms and what is drawn, each relative to its own size."""
    assert got["state"] == wanted["state"]
    for name in ("losses", "gradient_norms", "raw", "averaged"):
        assert got[name] == pytest.approx(wanted[name], rel=tolerance), name


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind == "fsdp" else [pytest.mark.engines]) for kind in ENGINES])
def test_a_partly_frozen_model_trains_alike_and_its_state_holds_the_rest_alone(pool: Pool, kind: str) -> None:
    wanted = take_steps(pool, 1, kind="replicated", partly_frozen=True)
    got = take_steps(pool, 2, kind=kind, partly_frozen=True)
    assert_equal(got, wanted, tolerance=1e-5)
    names = cast("list[str]", got["state"])
    assert names and all("attentions" in name for name in names)
    assert {name.split("/")[0] for name in names} == {"model", "ema", "ema_1", "optimizer"}


@pytest.mark.engines
@pytest.mark.parametrize("kind", ENGINES)
def test_activations_computed_again_change_nothing(pool: Pool, kind: str) -> None:
    wanted = take_steps(pool, 2, kind=kind)
    assert_equal(take_steps(pool, 2, kind=kind, activation_checkpointing=True), wanted, tolerance=1e-9)


@pytest.mark.engines
@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_stay_near_fp32_on_every_engine(pool: Pool, kind: str, precision: str) -> None:
    wanted = take_steps(pool, 1, kind="replicated")
    got = take_steps(pool, 2, kind=kind, precision=precision)
    # bf16 keeps 8 bits of a number, fp16 11: an activation's error is 2^-9 or 2^-12, a mean's below that.
    assert got["losses"] == pytest.approx(wanted["losses"], rel=2**-9 if precision == "bf16" else 2**-11)
    assert got["losses"] != wanted["losses"]


@pytest.mark.engines
@pytest.mark.parametrize("kind", ENGINES[1:])
def test_channels_last_drops_the_same_activations_on_every_engine(pool: Pool, kind: str) -> None:
    wanted = take_steps(pool, 1, kind="replicated", memory_format="channels_last")
    assert_equal(take_steps(pool, 2, kind=kind, memory_format="channels_last"), wanted, tolerance=1e-5)


@pytest.mark.engines
@pytest.mark.parametrize("ranks", [2, 4])
def test_hybrid_sharding_computes_what_one_process_computes(pool: Pool, ranks: int) -> None:
    wanted = take_steps(pool, 1, kind="replicated")
    assert_equal(take_steps(pool, ranks, kind="fsdp", replicas=2), wanted, tolerance=1e-5)


@pytest.mark.engines
@pytest.mark.parametrize("kind", ["fsdp", "zero_2", "zero_3"])
def test_an_optimizer_in_the_hosts_memory_computes_the_same(pool: Pool, kind: str) -> None:
    wanted = take_steps(pool, 1, kind="replicated")
    answer = pool(2).run(
        "tests.distributed.engine_jobs:take_steps",
        {"options": {"kind": kind, "cpu_offload": True}, "steps": STEPS},
        limit_seconds=600.0,  # DeepSpeed compiles its CPU Adam the first time
    )
    assert_equal(cast("dict[str, object]", answer[0]), wanted, tolerance=1e-5)


def test_a_frozen_model_above_the_limit_is_shared_and_computes_the_same(pool: Pool) -> None:
    for answer in pool(2).run("tests.distributed.engine_jobs:use_a_large_frozen_model", {}):
        whole, shared = cast("list[float]", answer)
        assert shared == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_image_encoders_above_the_limit_are_shared_and_a_shared_vae_encodes_and_decodes(pool: Pool, tmp_path: Path, precision: str) -> None:
    decoder, prior = (str(make_tiny(kind, tmp_path / kind)) for kind in ("kandinsky22_decoder", "kandinsky22_prior"))
    job = "tests.distributed.encoder_jobs:use_kandinskys_encoders"
    assert pool(2).run(job, {"decoder": decoder, "prior": prior, "precision": precision}) == [[], []]


def test_shared_encoders_draw_the_same_pictures(pool: Pool, tmp_path: Path) -> None:
    decoder, prior = (str(make_tiny(kind, tmp_path / kind)) for kind in ("kandinsky22_decoder", "kandinsky22_prior"))
    job = "tests.distributed.encoder_jobs:draw_with_kandinskys_encoders"
    assert pool(2).run(job, {"decoder": decoder, "prior": prior, "run_dir": str(tmp_path)}) == [True, True]
