"""A stage that ends by need: the same end after a resume, and no more of it afterwards."""

from pathlib import Path

import pytest
import torch

from launch.run_dir import freeze
from launch.status import is_done, run_status
from trainer.config import RunConfig
from trainer.exit_codes import CALL_AGAIN, DONE
from trainer.hash import hash_run
from trainer.manifest import newest_checkpoint
from trainer.stop import StopRequest
from trainer.train import train
from trainer.watch import Watch

RECIPE = {
    "data": {"global_batch_size": 8, "micro_batch_size": 4, "image_size": 8},
    "model": {"kind": "tiny_unet", "channels": [8], "attention": [False], "norm_groups": 4},
    "train": {"steps": 2},
    "logging": {"sample_every_steps": 0, "sample_images": 1, "sample_steps": 1},
    "checkpoint": {"every_steps": 3, "asynchronous": False},
}
STOP_WHEN = {"every_steps": 2, "images": 8, "patience": 2, "least_gain": 0.1}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As a rank has on the CPU."""
    torch.set_num_threads(1)


def go(run_dir: Path) -> int:
    """Train a frozen run in this process."""
    watch = Watch(run_dir, rank=0, world_size=1, limit_seconds=60.0)
    try:
        return train(run_dir, StopRequest(), watch)
    finally:
        watch.close()


def student(folder: Path, shards: Path, *, learning_rate: float, stop_after_steps: int | None = None) -> Path:
    """A frozen run of 40 steps at most that learns from the teacher beside it."""
    objective = {"kind": "progressive_distillation", "teacher": "../teacher", "teacher_steps": 8, "student_steps": 4}
    recipe = {
        **RECIPE,
        "data": {**RECIPE["data"], "shards": str(shards)},
        "objective": {**objective, "stop_when": STOP_WHEN},
        "optim": {"learning_rate": learning_rate},
        "train": {"steps": 40, "stop_after_steps": stop_after_steps},
    }
    freeze(folder, RunConfig.model_validate(recipe), shards=shards)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, faces: Path) -> Path:
    """A trained run of two steps."""
    folder = tmp_path_factory.mktemp("stages") / "teacher"
    freeze(folder, RunConfig.model_validate({**RECIPE, "data": {**RECIPE["data"], "shards": str(faces)}}), shards=faces)
    assert go(folder) == DONE
    return folder


def test_a_student_that_learns_nothing_ends_after_its_patience(teacher: Path, faces: Path) -> None:
    run_dir = student(teacher.parent / "idle", faces, learning_rate=1e-12)
    assert go(run_dir) == DONE
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None and checkpoint.step == 4, "two measurements, at steps 2 and 4, without a fall"
    errors = checkpoint.manifest["student_errors"]
    assert isinstance(errors, list) and len(errors) == 3 and checkpoint.manifest["final"] is True
    status = run_status(run_dir, ended=None)
    assert is_done(run_dir) and (status.step, status.total_steps, status.state) == (4, 4, "done")
    metrics = (run_dir / "metrics.jsonl").read_text()
    assert go(run_dir) == DONE and (run_dir / "metrics.jsonl").read_text() == metrics, "there is nothing left to do"


def test_a_resumed_student_ends_at_the_same_step_with_the_same_bits(teacher: Path, faces: Path) -> None:
    straight = student(teacher.parent / "straight", faces, learning_rate=2e-3)
    assert go(straight) == DONE
    broken = student(teacher.parent / "broken", faces, learning_rate=2e-3, stop_after_steps=5)
    codes = [go(broken)]
    while codes[-1] == CALL_AGAIN and len(codes) < 20:
        codes.append(go(broken))
    ends = [newest_checkpoint(run_dir) for run_dir in (straight, broken)]
    assert codes[-1] == DONE and len(codes) > 1
    assert ends[0] is not None and ends[1] is not None and ends[0].step == ends[1].step
    assert ends[0].manifest["student_errors"] == ends[1].manifest["student_errors"]
    assert 4 < ends[0].step < 40, "it has learnt something, and then no more"
    assert hash_run(straight) == hash_run(broken)
