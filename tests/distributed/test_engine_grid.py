"""Every engine on 1, 2 and 4 ranks computes what one process computes: equal losses at each of 20 steps."""

import json
from pathlib import Path

import pytest

from tests.distributed.grid import CASES, REFERENCE, TOLERANCE, Case, Grid
from tests.distributed.state import STATE_TOLERANCE, largest_state_difference

SAMPLE = {("denoising", "DDP", 2), ("denoising", "FSDP2", 2), ("denoising", "ZeRO-2", 2), ("halving", "FSDP2", 2), ("halving", "ZeRO-3", 2)}


def _marks(case: Case) -> tuple[pytest.MarkDecorator, ...]:
    return (pytest.mark.distributed, pytest.mark.engines_sample if case in SAMPLE else pytest.mark.engines)


@pytest.mark.parametrize(("objective", "engine", "ranks"), [pytest.param(*case, marks=_marks(case)) for case in CASES])
def test_an_engine_computes_what_one_process_computes(grid: Grid, objective: str, engine: str, ranks: int) -> None:
    assert grid.difference(objective, engine, ranks) <= TOLERANCE
    # The losses know nothing of the averages, and of clipping only what it does to the weights.
    got, reference = grid.run(objective, engine, ranks), grid.run(objective, REFERENCE, 1)
    assert gradient_norms(got) == pytest.approx(gradient_norms(reference), rel=STATE_TOLERANCE)
    assert largest_state_difference(got, reference) <= STATE_TOLERANCE


def gradient_norms(run_dir: Path) -> list[float]:
    """Before clipping, in step order."""
    return [json.loads(line)["gradient_norm"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
