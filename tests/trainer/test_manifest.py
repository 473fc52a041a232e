"""Checkpoints are whole or do not exist: every damage is seen and named, and enough good ones are kept."""

import json
import logging
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from trainer.checkpoint import agreed_checkpoint
from trainer.manifest import (
    Checkpoint,
    Retention,
    committed,
    ever_committed,
    newest_checkpoint,
    read_checkpoint,
    seal,
    sweep_leftovers,
    verify_files,
)
from trainer.save import write_checkpoint

PAGE_BYTES = 4096
DAMAGES = {"bit": 1000, "truncation": 200, "page": 50}
"""How many of each kind; a tenth in make test."""


def _write(run_dir: Path, step: int, *, mean_loss: float | None = None, count: int = 30) -> Path:
    weights = torch.randn(count, generator=torch.Generator().manual_seed(step))
    return write_checkpoint(run_dir, step, parts={"model": {"a": weights}}, facts={"mean_loss": mean_loss})


def _steps(run_dir: Path) -> list[int]:
    return [step for step, _ in committed(run_dir)]


def _newest_step(run_dir: Path) -> int | None:
    checkpoint = newest_checkpoint(run_dir)
    return None if checkpoint is None else checkpoint.step


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 10 and 20, the later one of three files: a long manifest and two ranks' tensors."""
    run = tmp_path_factory.mktemp("damage") / "run"
    run.mkdir()
    _write(run, 10)
    path = _write(run, 20, count=30_000)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["manifest_sha256"]
    other = _write(run, 30, count=20_000)
    record = json.loads((other / "manifest.json").read_text())["files"]["rank_0000.safetensors"]
    (other / "rank_0000.safetensors").rename(path / "rank_0001.safetensors")
    (other / "manifest.json").unlink()
    other.rmdir()
    manifest["files"]["rank_0001.safetensors"] = record
    manifest["padding"] = [f"{number:08d}" for number in range(1000)]
    (path / "manifest.json").write_text(seal(manifest))
    assert _newest_step(run) == 20
    return run


def _damages(path: Path, kind: str, count: int, choose: random.Random) -> Iterator[tuple[Path, int]]:
    """Files of a checkpoint in turn, and a place in each; a zeroed page must change bytes."""
    files = sorted(path.iterdir())
    for number in range(count):
        file = files[number % len(files)]
        content = file.read_bytes()
        match kind:
            case "bit":
                yield file, choose.randrange(len(content) * 8)
            case "truncation":
                yield file, choose.randrange(len(content))
            case _:
                pages = [at for at in range(0, len(content), PAGE_BYTES) if any(content[at : at + PAGE_BYTES])]
                yield file, choose.choice(pages)


def _damage(file: Path, kind: str, at: int) -> bytes:
    """Damage a file in place; returns what it held."""
    whole = file.read_bytes()
    with open(file, "r+b") as writing:
        match kind:
            case "bit":
                writing.seek(at // 8)
                writing.write(bytes([whole[at // 8] ^ 1 << at % 8]))
            case "truncation":
                writing.truncate(at)
            case _:
                writing.seek(at)
                writing.write(bytes(min(PAGE_BYTES, len(whole) - at)))
    return whole


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("share", [pytest.param(0.1, id="a_tenth"), pytest.param(1.0, id="all", marks=pytest.mark.engines)])
def test_every_damage_is_seen_and_named_and_the_checkpoint_before_is_used(
    run_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, kind: str, share: float
) -> None:
    # No tensor may be read before all is verified.
    monkeypatch.setattr("trainer.checkpoint.safe_open", lambda *_, **__: pytest.fail("a tensor was read"))
    count = round(DAMAGES[kind] * share)
    struck: set[str] = set()
    path = run_dir / "checkpoints" / "step_000020"
    for file, at in _damages(path, kind, count, random.Random(f"{kind} {share}")):
        whole = _damage(file, kind, at)
        assert file.read_bytes() != whole
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert _newest_step(run_dir) == 10, f"{kind} at {at} of {file.name}"
        assert f"checkpoint {path} is damaged and not used: {file.name}" in caplog.text
        with open(file, "r+b") as writing:
            writing.write(whole)
        struck.add(file.name)
    assert struck == {"manifest.json", "rank_0000.safetensors", "rank_0001.safetensors"}
    assert _newest_step(run_dir) == 20


@pytest.mark.parametrize("find", [newest_checkpoint, agreed_checkpoint])
def test_a_missing_file_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, find: Callable[[Path], Checkpoint | None]
) -> None:
    for name in ("rank_0000.safetensors", "manifest.json"):
        _write(tmp_path, 10)
        path = _write(tmp_path, 20)
        (path / name).unlink()
        with caplog.at_level(logging.WARNING):
            found = find(tmp_path)
        assert found is not None and found.step == 10
        assert f"step_000020 is damaged and not used: {name} cannot be read: No such file or directory" in caplog.text


def test_a_checkpoint_that_is_deleted_at_this_moment_is_passed_over(tmp_path: Path) -> None:
    """As when `halfstep sample` looks at a run that goes on."""
    with pytest.raises(ValueError, match="step_000020 cannot be read: No such file or directory"):
        read_checkpoint(tmp_path / "checkpoints" / "step_000020")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"step": NaN}', "[]", "\xff", ""])
def test_a_manifest_that_python_cannot_take_is_damage_and_no_crash(tmp_path: Path, text: str) -> None:
    _write(tmp_path, 10)
    (_write(tmp_path, 20) / "manifest.json").write_text(text, encoding="latin-1")
    assert _newest_step(tmp_path) == 10


def test_another_schema_and_another_name_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, 20)
    moved = path.rename(path.with_name("step_000030"))
    with pytest.raises(ValueError, match=r"manifest.json is not one of step_000030 in schema 2"):
        read_checkpoint(moved)


def test_only_what_is_named_is_verified(tmp_path: Path) -> None:
    path = _write(tmp_path, 10)
    checkpoint = read_checkpoint(path)
    (path / "rank_0000.safetensors").write_bytes(b"")
    verify_files(checkpoint, [])
    with pytest.raises(ValueError, match=r"rank_0000.safetensors has 0 bytes, the manifest says "):
        verify_files(checkpoint, ["rank_0000.safetensors"])
    assert checkpoint.size_bytes > 120 and len(checkpoint.sha256) == 64


def test_an_unfinished_save_does_not_exist_and_is_swept(tmp_path: Path) -> None:
    _write(tmp_path, 10)
    folder = tmp_path / "checkpoints"
    (folder / "step_000020.tmp-0123").mkdir()
    (folder / "step_000020.tmp-0123" / "rank_0000.safetensors").write_bytes(b"half")
    (folder / "step_000030.tmp-4567").write_text("no folder")
    (tmp_path / "elsewhere").mkdir()
    (folder / "step_000040.tmp-89ab").symlink_to(tmp_path / "elsewhere")
    assert _newest_step(tmp_path) == 10
    sweep_leftovers(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["step_000010"] and (tmp_path / "elsewhere").is_dir()


def test_that_there_was_a_checkpoint_is_remembered(tmp_path: Path) -> None:
    assert not ever_committed(tmp_path)
    path = _write(tmp_path, 10)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    assert newest_checkpoint(tmp_path) is None and ever_committed(tmp_path)


def _keep(
    run_dir: Path, newest: int, *, keep_last: int = 2, every: int | None = None, best: int = 0, good: tuple[int, ...] = ()
) -> list[int]:
    Retention(keep_last=keep_last, keep_every_steps=every, keep_best=best, good=good).delete_old(run_dir, newest=newest)
    return _steps(run_dir)


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        _write(tmp_path, step)
    assert _keep(tmp_path, 40, keep_last=3) == [20, 30, 40]
    assert _keep(tmp_path, 40) == [30, 40]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_000030", "step_000040"]


def test_every_nth_and_the_best_are_kept_beside_the_last(tmp_path: Path) -> None:
    losses = {10: 0.5, 20: 0.1, 30: 0.4, 40: None, 50: 0.2, 60: 0.3, 70: 0.3}
    for step, loss in losses.items():
        _write(tmp_path, step, mean_loss=loss)
    assert _keep(tmp_path, 70, every=30, best=1) == [20, 30, 60, 70]
    assert _keep(tmp_path, 70, best=1) == [20, 60, 70]


def test_a_damaged_one_does_not_count_as_one_of_the_last(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """If it did, a single good one would be left, and that might be damaged tomorrow."""
    for step in (10, 20, 30, 40):
        _write(tmp_path, step)
    (tmp_path / "checkpoints" / "step_000030" / "rank_0000.safetensors").write_bytes(b"damaged")
    assert _keep(tmp_path, 40) == [20, 40]
    assert "step_000030 is damaged; it does not count as one of the last" in caplog.text


def test_those_that_this_process_has_verified_are_not_read_again(tmp_path: Path) -> None:
    paths = [_write(tmp_path, step) for step in (10, 20, 30)]
    (paths[1] / "rank_0000.safetensors").write_bytes(b"damaged, but good when it was written")
    assert _keep(tmp_path, 30, good=(20,)) == [20, 30]


def test_those_of_later_steps_go_when_a_run_went_back(tmp_path: Path) -> None:
    for step in (20, 40, 60):
        _write(tmp_path, step)
    (tmp_path / "checkpoints" / "step_000060" / "rank_0000.safetensors").write_bytes(b"damaged")
    assert _keep(tmp_path, 40, good=(20,)) == [20, 40]


def test_things_with_a_checkpoints_name_that_are_none_do_no_harm(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        _write(tmp_path, step)
    folder = tmp_path / "checkpoints"
    (folder / "step_000005").write_text("no folder")
    (folder / "step_000006").symlink_to(folder / "step_000040")
    (folder / "step_7").mkdir()
    (folder / "notes.txt").touch()
    assert _keep(tmp_path, 40) == [30, 40]
    assert sorted(os.listdir(folder)) == ["notes.txt", "step_000030", "step_000040", "step_7"]
