"""Checkpoints are whole or absent; a damaged one is named and the one before is used."""

import logging
from pathlib import Path

import pytest
import torch

from trainer.checkpoint import delete_old_checkpoints, newest_checkpoint, read_tensors, write_checkpoint


def _write(run_dir: Path, step: int) -> Path:
    generator = torch.Generator().manual_seed(step)
    parts = {part: {"a": torch.randn(300, generator=generator), "b": torch.randn(2, 3, generator=generator)} for part in ("model", "ema")}
    return write_checkpoint(run_dir, step, parts=parts, facts={"world_size": 2})


def test_what_was_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    _write(tmp_path, 10)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 10 and checkpoint.manifest["world_size"] == 2
    wanted = torch.randn(300, generator=torch.Generator().manual_seed(10))
    assert torch.equal(read_tensors(checkpoint, "model")["a"], wanted)


def test_parameters_that_share_one_buffer_are_written_apart(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    write_checkpoint(tmp_path, 1, parts={"model": {"a": flat[:4], "b": flat[4:].view(2, 4).T}}, facts={})
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    read = read_tensors(checkpoint, "model")
    assert torch.equal(read["a"], flat[:4]) and torch.equal(read["b"], flat[4:].view(2, 4).T)


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "manifest.json"])
def test_every_flipped_bit_is_seen_and_the_checkpoint_before_is_used(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    _write(tmp_path, 10)
    path = _write(tmp_path, 20) / name
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 16)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            checkpoint = newest_checkpoint(tmp_path)
        assert checkpoint is not None
        assert checkpoint.step == 10, f"bit flipped at byte {position} of {name}"
        assert str(path.parent) in caplog.text


def test_a_cut_or_missing_file_is_seen(tmp_path: Path) -> None:
    _write(tmp_path, 10)
    path = _write(tmp_path, 20) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 10
    path.unlink()
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 10


def test_an_unfinished_save_does_not_exist_and_is_swept(tmp_path: Path) -> None:
    _write(tmp_path, 10)
    leftover = tmp_path / "checkpoints" / "step_000020.tmp-0123"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 10
    delete_old_checkpoints(tmp_path, newest=10, keep_last=2)
    assert not leftover.exists()


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        _write(tmp_path, step)
    delete_old_checkpoints(tmp_path, newest=40, keep_last=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000030", "step_000040"]


def test_a_damaged_checkpoint_is_written_anew_and_a_whole_one_kept(tmp_path: Path) -> None:
    path = _write(tmp_path, 10) / "model.safetensors"
    before = path.stat().st_mtime_ns
    _write(tmp_path, 10)
    assert path.stat().st_mtime_ns == before
    path.write_bytes(b"damaged")
    _write(tmp_path, 10)
    assert newest_checkpoint(tmp_path) is not None


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, 10) / "manifest.json"
    path.write_text(path.read_text().replace("model.safetensors", "../../model.safetensors"))
    assert newest_checkpoint(tmp_path) is None


def test_a_damaged_later_checkpoint_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    _write(tmp_path, 20)
    (_write(tmp_path, 60) / "model.safetensors").write_bytes(b"damaged")
    _write(tmp_path, 40)
    delete_old_checkpoints(tmp_path, newest=40, keep_last=1)
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 40
