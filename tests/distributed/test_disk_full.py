"""A run on a full disk keeps what it has committed, says what it needs, and goes on when there is room."""

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.data import pack_faces
from tests.distributed.runs import run, started
from trainer.config import FacesConfig
from trainer.manifest import committed, newest_checkpoint

pytestmark = pytest.mark.distributed

DISK_MIB = 10
"""Room for two checkpoints of 3.4 MiB and the run's other files, but not for a third, which a save needs for a moment."""
MODEL = "model={kind: tiny_unet, channels: [16, 40], attention: [false, false], norm_groups: 8}"
EVERY, THIRD = 6, 18
"""Steps between two saves; the step of the first save for which there is no room."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of DISK_MIB of its own."""
    mount = tmp_path / "disk"
    mount.mkdir()
    tried = _mount(f"size={DISK_MIB}m", mount)
    if tried.returncode:
        pytest.skip(f"a small file system cannot be mounted here, which takes root: {tried.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images, on another file system."""
    return pack_faces(FacesConfig(count=32, size=8), tmp_path_factory.mktemp("images") / "shards")


def _mount(options: str, mount: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(mount)], capture_output=True, text=True, check=False)


def _make_room(mount: Path) -> None:
    assert _mount("remount,size=40m", mount).returncode == 0


def _overrides(shards: Path, *, steps: int, on_disk_full: str, asynchronous: bool = True) -> tuple[str, ...]:
    return (
        f"data.shards={shards}",
        "distill=null",
        MODEL,
        f"train.steps={steps}",
        f"checkpoint.every_steps={EVERY}",
        f"checkpoint.on_disk_full={on_disk_full}",
        f"checkpoint.asynchronous={str(asynchronous).lower()}",
        "logging.sample_every_steps=0",
        "lr_schedule={kind: constant, warmup_steps: 0}",
    )


def _steps(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _check_committed(run_dir: Path, steps: list[int]) -> None:
    """Of the checkpoints the newest verifies, and nothing half done lies beside them."""
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None and checkpoint.step == steps[-1]
    assert [step for step, _ in committed(run_dir)] == steps
    assert len(os.listdir(run_dir / "checkpoints")) == len(steps)


def _check_message(run_dir: Path, text: str) -> None:
    found = re.search(
        rf"cannot save {run_dir}/checkpoints/step_\d+: No space left on device \((\d+) bytes are needed, (\d+) are free\)", text
    )
    assert found, text
    needed, free = map(int, found.groups())
    assert 3.2 * 2**20 < needed < 4.5 * 2**20 and free < needed


def test_a_full_disk_ends_the_run_with_74_and_with_room_the_same_command_goes_on(disk: Path, shards: Path) -> None:
    run_dir, overrides = disk / "run", _overrides(shards, steps=24, on_disk_full="stop")
    full = run("train", run_dir, ranks=2, overrides=overrides)
    assert full.returncode == 74, full.stderr
    _check_message(run_dir, full.stderr)
    _check_message(run_dir, json.loads((run_dir / "exit.json").read_text())["reason"])
    _check_committed(run_dir, [EVERY, 2 * EVERY])
    _make_room(disk)
    done = run("train", run_dir, ranks=2, overrides=overrides)
    assert done.returncode == 0, done.stderr
    _check_committed(run_dir, [18, 24])
    assert _steps(run_dir) == list(range(24))


@pytest.mark.engines
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_that_is_to_go_on_trains_to_its_end_and_stops_at_its_last_save(disk: Path, shards: Path, asynchronous: bool) -> None:
    run_dir = disk / "run"
    overrides = _overrides(shards, steps=24, on_disk_full="go_on", asynchronous=asynchronous)
    full = run("train", run_dir, ranks=2, overrides=overrides)
    assert full.returncode == 74, full.stderr
    _check_message(run_dir, full.stderr)
    assert re.search(rf"step_0000{THIRD}: No space left on device .*; the run goes on without it", full.stderr), full.stderr
    _check_committed(run_dir, [EVERY, 2 * EVERY])
    assert _steps(run_dir) == list(range(24)), "nothing but its last checkpoint was missing"
    _make_room(disk)
    done = run("train", run_dir, ranks=2, overrides=overrides)
    assert done.returncode == 0, done.stderr
    _check_committed(run_dir, [18, 24])


@pytest.mark.engines
def test_a_run_that_is_to_go_on_ends_well_if_room_is_made_meanwhile(disk: Path, shards: Path, tmp_path: Path) -> None:
    run_dir, terminal, steps = disk / "run", tmp_path / "terminal", 300
    overrides = _overrides(shards, steps=steps, on_disk_full="go_on")
    with open(terminal, "wb") as stderr, started("train", run_dir, ranks=2, overrides=overrides, stderr=stderr) as process:
        deadline = time.monotonic() + 200
        while b"the run goes on without it" not in terminal.read_bytes():
            assert process.poll() is None and time.monotonic() < deadline, terminal.read_text()
            time.sleep(0.01)
        _make_room(disk)
        assert process.wait(200) == 0, terminal.read_text()
    _check_committed(run_dir, [steps - EVERY, steps])
    assert _steps(run_dir) == list(range(steps))
