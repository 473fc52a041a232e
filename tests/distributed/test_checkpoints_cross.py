"""A checkpoint that one engine has written on 2 ranks goes on under every engine on 1, 2 and 4 ranks."""

import json
import shutil
from pathlib import Path

import pytest

from tests.distributed.grid import RANKS, STEPS, TOLERANCE, Grid, largest_difference
from tests.distributed.state import PARTS, STATE_TOLERANCE, largest_state_difference, read_state

ENGINES = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")
PAIRS = [(saver, loader, ranks) for saver in ENGINES for loader in ENGINES for ranks in RANKS]
# Every engine saves twice and loads twice, and each number of ranks is among them.
SAMPLE = {
    ("DDP", "FSDP2", 4),
    ("DDP", "ZeRO-3", 1),
    ("FSDP2", "DDP", 4),
    ("FSDP2", "ZeRO-2", 1),
    ("ZeRO-2", "FSDP2", 1),
    ("ZeRO-2", "ZeRO-3", 4),
    ("ZeRO-3", "DDP", 2),
    ("ZeRO-3", "ZeRO-2", 2),
}
SAVING_RANKS = 2


def _marks(pair: tuple[str, str, int]) -> tuple[pytest.MarkDecorator, ...]:
    return (pytest.mark.distributed, pytest.mark.engines_sample if pair in SAMPLE else pytest.mark.engines)


@pytest.mark.parametrize(("saver", "loader", "ranks"), [pytest.param(*pair, marks=_marks(pair)) for pair in PAIRS])
def test_a_checkpoint_goes_on_under_another_engine_and_number_of_ranks(
    grid: Grid, tmp_path: Path, saver: str, loader: str, ranks: int
) -> None:
    undisturbed = grid.run("denoising", saver, SAVING_RANKS, steps=2 * STEPS)
    run_dir = _as_it_was_at_step_20(undisturbed, tmp_path / "run")
    grid.freeze(run_dir, "denoising", loader, steps=2 * STEPS)
    _check_loaded(grid.pools.of(ranks).run("tests.distributed.jobs:load_run", {"run_dir": str(run_dir)}), run_dir, loader)
    grid.train(run_dir, ranks)
    attempts = [json.loads(line) for line in (run_dir / "attempts.jsonl").read_text().splitlines()]
    assert [(attempt["step"], attempt["world_size"]) for attempt in attempts] == [(0, SAVING_RANKS), (STEPS, ranks)]
    assert largest_difference(grid.losses(run_dir)[STEPS:], grid.losses(undisturbed)[STEPS:]) <= TOLERANCE
    # Averages depend on the step count, and no loss on them.
    assert largest_state_difference(run_dir, undisturbed) <= STATE_TOLERANCE


def _as_it_was_at_step_20(finished: Path, run_dir: Path) -> Path:
    """A copy of a run without what came after the checkpoint of step 20; a resume drops the later lines of its files itself."""
    shutil.copytree(finished, run_dir, ignore=shutil.ignore_patterns(f"step_{2 * STEPS:06d}", "export"))
    return run_dir


def _check_loaded(answers: list[object], run_dir: Path, loader: str) -> None:
    """What the ranks hold after loading is what was saved; an engine that shares its state out holds it once in all."""
    state = read_state(run_dir)
    held: dict[str, int] = {}
    for answer in answers:
        assert isinstance(answer, dict)
        assert answer["different"] == []
        held = {part: held.get(part, 0) + count for part, count in answer["elements"].items()}
    copies = len(answers) if loader == "DDP" else 1
    for part in PARTS:
        assert held[part] == copies * sum(tensor.numel() for name, tensor in state.items() if name.startswith(f"{part}."))
