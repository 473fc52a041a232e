"""What a run reports is written once a step, whatever is resumed, and its speeds are plain arithmetic."""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from trainer.metrics import Reporter, StepMetrics, Workload, measure_step, peak_memory_gib

CPU = torch.device("cpu")
WORK = Workload(images=32, flops_per_image=10**9, peak_flops=None, device=CPU)


def measured(step: int, *, work: Workload = WORK, loss: float = 0.5) -> StepMetrics:
    return measure_step(step, work, loss=loss, gradient_norm=1.5, learning_rate=1e-3, step_seconds=0.25, data_wait_seconds=0.05)


def report(run_dir: Path, metrics: list[StepMetrics], *, start_step: int = 0) -> None:
    run_dir.mkdir(exist_ok=True)
    reporter = Reporter(run_dir, start_step=start_step, total_steps=40, recipe_text="seed: 0", hyperparameters={"seed": 0}, title="run")
    for each in metrics:
        reporter.write_step(each)
    reporter.close()


def read_board(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()


def test_speeds_are_images_and_operations_over_seconds() -> None:
    metrics = measured(7, work=Workload(images=32, flops_per_image=10**9, peak_flops=512e9, device=CPU))
    assert (metrics.images_per_second, metrics.teraflops_per_second, metrics.mfu) == (128.0, 0.128, 0.25)
    assert float.fromhex(metrics.loss_hex) == metrics.loss


def test_mfu_is_null_where_no_peak_is_known(tmp_path: Path) -> None:
    report(tmp_path / "run", [measured(0)])
    [line] = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert line["mfu"] is None and line["teraflops_per_second"] == 0.128 and line["peak_memory_gib"] > 0.05
    tags = read_board(tmp_path / "run").Tags()["scalars"]
    assert "speed/mfu" not in tags and {"speed/teraflops_per_second", "memory/peak_gib", "train/loss"} <= set(tags)


def test_a_processs_peak_of_memory_is_the_systems_own() -> None:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    assert peak_memory_gib(CPU) == pytest.approx(int(line.split()[1]) / 2**20, rel=0.05)


@pytest.mark.parametrize(("peak_flops", "shown"), [(None, "data wait 20%"), (256e9, "data wait 20%  MFU 50%")])
def test_the_progress_line_shows_mfu_where_it_is_known(
    peak_flops: float | None, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Workload(images=32, flops_per_image=10**9, peak_flops=peak_flops, device=CPU)
    report(tmp_path / "lines", [measured(0, work=work), measured(39, work=work)])
    first, last = capsys.readouterr().err.splitlines()
    assert first.endswith(f"images/s  {shown}") and last.endswith(f"images/s  {shown}  ETA 0:00:00")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    report(tmp_path / "bar", [measured(0, work=work)])
    assert shown in capsys.readouterr().err


def test_tensorboard_shows_no_step_twice_after_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three attempts, each resumed from a step that the one before had passed: as many event files in one folder."""
    run_dir = tmp_path / "run"
    for attempt, (start, stop) in enumerate([(0, 10), (6, 14), (6, 12)]):
        # Files are read by name, which begins with the second of their making: real attempts are seconds apart.
        monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=partial(float, 1_700_000_000 + attempt)))
        report(run_dir, [measured(step, loss=100.0 * attempt + step) for step in range(start, stop)], start_step=start)
    assert len(list((run_dir / "tensorboard").iterdir())) == 3
    board = read_board(run_dir)
    for tag in ("train/loss", "speed/images_per_second", "speed/teraflops_per_second", "memory/peak_gib"):
        assert [point.step for point in board.Scalars(tag)] == list(range(12)), tag
    assert [point.value for point in board.Scalars("train/loss")] == [*range(6), *(200.0 + step for step in range(6, 12))]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(point.step, point.value) for point in board.Scalars("train/loss")]


def test_a_step_that_was_left_out_leaves_a_gap_and_stays_out_after_a_resume(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    report(run_dir, [measured(step) for step in (0, 1, 3, 4)])
    report(run_dir, [measured(step) for step in (4, 5)], start_step=3)
    assert [point.step for point in read_board(run_dir).Scalars("train/loss")] == [0, 1, 4, 5]
