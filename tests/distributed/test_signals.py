"""Whatever signal comes, when and to whom: all ranks stop at one step, with its checkpoint committed, soon."""

import json
import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.distributed.runs import endless, rank_pids, started, wait_until

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_CASES = 30
_EVERY_TIME = (0, 1, 2)
_SAVE_SECONDS = 1.0  # of this model, on a busy machine
_MORE_SECONDS = 5.0


def _cases() -> list[object]:
    marks = {seed: (pytest.mark.distributed, *(() if seed in _EVERY_TIME else (pytest.mark.all_kills,))) for seed in range(_CASES)}
    return [pytest.param(seed, marks=marks[seed]) for seed in range(_CASES)]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return (*endless(tmp_path_factory.mktemp("shards") / "shards"), "engine.kind=replicated")


@pytest.mark.parametrize("seed", _cases())
def test_all_ranks_stop_at_one_step_with_its_checkpoint(tmp_path: Path, overrides: tuple[str, ...], seed: int) -> None:
    dice = random.Random(seed)
    number, told = _SIGNALS[seed % 4], ("all", "rank 1", "group", "rank 0")[(seed + seed // 4) % 4]
    run_dir, terminal = tmp_path / "run", tmp_path / "terminal"
    with open(terminal, "wb") as stderr, started("train", run_dir, ranks=2, overrides=overrides, stderr=stderr) as process:
        assert wait_until(lambda: all(_last_step(run_dir, rank) >= 1 for rank in range(2)), process), terminal.read_text()
        time.sleep(dice.random() * 2)  # anywhere: in a forward pass, a reduction, a save
        began = time.monotonic()
        _tell(process, told, number, dice)
        assert process.wait(60) == 75, terminal.read_text()
        seconds = time.monotonic() - began
    steps = {_last_step(run_dir, rank) + 1 for rank in range(2)}
    assert len(steps) == 1, f"ranks stopped after different steps: {steps}"
    [step] = steps
    checkpoints = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert checkpoints[-1] == f"step_{step:06d}" and (run_dir / "checkpoints" / checkpoints[-1] / "manifest.json").exists()
    assert not [name for name in checkpoints if "tmp" in name]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(step))
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 75 and not (run_dir / "lease.json").exists()
    assert seconds < max(line["step_seconds"] for line in lines) + _SAVE_SECONDS + _MORE_SECONDS


@pytest.mark.distributed
def test_a_signal_in_the_first_moment_of_a_rank_is_not_lost_and_does_not_kill(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    run_dir = tmp_path / "run"
    with started("train", run_dir, ranks=2, overrides=overrides) as process:
        assert wait_until(lambda: len(rank_pids(process.pid)) >= 1, process)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(120) == 75
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_000001"]


def _tell(process: subprocess.Popen[bytes], told: str, number: signal.Signals, dice: random.Random) -> None:
    """Send the signal: to one rank; to all of the process group at once, as a terminal or Slurm does; or to one rank after the other."""
    pids = rank_pids(process.pid)
    match told:
        case "rank 0" | "rank 1":
            os.kill(pids[int(told[-1])], number)
        case "group":
            os.killpg(process.pid, number)
        case "all":
            first, second = dice.sample(sorted(pids.values()), 2)
            os.kill(first, number)
            time.sleep(dice.random() * 2)
            with suppress(ProcessLookupError):  # the first signal may have ended the run
                os.kill(second, number)


def _last_step(run_dir: Path, rank: int) -> int:
    """The last step of which a rank has read a micro-batch; -1 before the first."""
    ledger = run_dir / "ledger" / f"rank_{rank}.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True) if ledger.exists() else []
    return next((json.loads(line)["step"] for line in reversed(lines) if line.endswith(b"\n")), -1)
