"""A save is whole or leaves nothing; it takes the state as it was when it began."""

import errno
import json
import os
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainer.checkpoint import agree_on_pieces, read_tensors
from trainer.engines.engine import Shard, State
from trainer.manifest import Retention, newest_checkpoint
from trainer.save import Saver, write_checkpoint

Usage = namedtuple("Usage", "total used free")


def _state(tensor: Tensor) -> State:
    return {"model": {"w": Shard(tuple(tensor.shape), 0, tensor)}}


def _saver(run_dir: Path, tensor: Tensor, *, asynchronous: bool, **hooks: Callable[..., object]) -> Saver:
    state = _state(tensor)
    retention = Retention(keep_last=2, keep_every_steps=None, keep_best=0)
    return Saver(
        run_dir,
        state,
        agree_on_pieces(state),
        retention=retention,
        asynchronous=asynchronous,
        timeout_seconds=60.0,
        **hooks,  # type: ignore[arg-type]
    )


def _names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def _saved(run_dir: Path) -> Tensor:
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None
    return read_tensors(checkpoint, "model")["w"]


def test_a_save_in_the_background_takes_the_state_as_it_was(tmp_path: Path) -> None:
    weights, may_write = torch.zeros(5), threading.Event()
    saver = _saver(tmp_path, weights, asynchronous=True, before_commit=may_write.wait)
    saver.start(1, {"engine": "replicated"})
    assert not saver.ended
    weights.fill_(1.0)  # as the next steps do
    may_write.set()
    saver.finish()
    assert torch.equal(_saved(tmp_path), torch.zeros(5))
    saver.start(2, {})
    saver.finish()
    assert torch.equal(_saved(tmp_path), torch.ones(5))
    assert json.loads((tmp_path / "latest.json").read_text()) == {"step": 2, "path": "checkpoints/step_000002"}


def test_a_save_says_what_it_does_and_makes_reports_durable_first(tmp_path: Path) -> None:
    told: list[str] = []
    saver = _saver(tmp_path, torch.zeros(5), asynchronous=False, before_commit=lambda: told.append("reports"), progress=told.append)
    saver.start(1, {})
    assert saver.ended
    saver.finish()
    assert told == ["stage", "write", "reports", "commit", ""]


def test_a_job_that_no_longer_owns_the_run_commits_nothing(tmp_path: Path) -> None:
    saver = _saver(tmp_path, torch.zeros(5), asynchronous=True, may_commit=lambda: False)
    saver.start(1, {})
    with pytest.raises(OSError, match="another job has taken over this run"):
        saver.finish()
    assert _names(tmp_path) == [] and newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_told_with_path_needed_and_free_bytes_and_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    saver = _saver(tmp_path, torch.full((5000,), 3.0), asynchronous=asynchronous)
    saver.start(1, {})
    saver.finish()
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10_000, 9_000, 1_000))
    folder = tmp_path / "checkpoints" / "step_000002"
    room = rf"\({saver.needed_bytes} bytes are needed, 1000 are free\)"
    message = rf"rank 0 cannot save {folder}: No space left on device {room}; older checkpoints are as they were"
    saver.start(2, {})
    with pytest.raises(OSError, match=message) as caught:
        saver.finish()
    assert caught.value.errno == errno.ENOSPC and saver.needed_bytes > 20_000
    assert _names(tmp_path) == ["step_000001"] and torch.equal(_saved(tmp_path), torch.full((5000,), 3.0))
    monkeypatch.undo()
    saver.start(2, {})
    saver.finish()
    assert _names(tmp_path) == ["step_000001", "step_000002"]


def test_the_error_of_a_save_is_raised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = _saver(tmp_path, torch.zeros(5), asynchronous=True)
    monkeypatch.setattr("os.fsync", _refuse)
    saver.start(1, {})
    with pytest.raises(OSError, match="step_000001: Input/output error; older checkpoints are as they were"):
        saver.finish()
    saver.finish()
    monkeypatch.undo()
    saver.start(2, {})
    saver.finish()
    assert _names(tmp_path) == ["step_000002"]


def _refuse(_: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_whatever_goes_wrong_in_the_background_is_raised(tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyError("metrics")

    saver = _saver(tmp_path, torch.zeros(5), asynchronous=True, before_commit=fail)
    saver.start(1, {})
    with pytest.raises(RuntimeError, match=r"rank 0 cannot save .*step_000001: KeyError\('metrics'\)"):
        saver.finish()
    assert _names(tmp_path) == []


def test_what_is_committed_counts_even_if_older_ones_cannot_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = _saver(tmp_path, torch.zeros(5), asynchronous=False)
    monkeypatch.setattr(saver.retention, "delete_old", lambda *_, **__: _refuse(0))
    saver.start(1, {})
    assert _names(tmp_path) == ["step_000001"] and "is committed, but older ones cannot be tidied away: [Errno 5]" in caplog.text


def test_a_write_that_takes_less_than_it_is_given_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    weights = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("os.write", lambda descriptor, content: write(descriptor, content[:777]))
    _saver(tmp_path, weights, asynchronous=False).start(1, {})
    assert torch.equal(_saved(tmp_path), weights)


def test_a_whole_checkpoint_is_kept_and_a_damaged_one_written_anew(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 10, parts={"model": {"w": torch.ones(50)}}, facts={}) / "rank_0000.safetensors"
    before = path.stat().st_mtime_ns
    write_checkpoint(tmp_path, 10, parts={"model": {"w": torch.ones(50)}}, facts={})
    assert path.stat().st_mtime_ns == before and _names(tmp_path) == ["step_000010"]
    path.write_bytes(b"damaged")
    write_checkpoint(tmp_path, 10, parts={"model": {"w": torch.ones(50)}}, facts={})
    assert torch.equal(_saved(tmp_path), torch.ones(50)) and _names(tmp_path) == ["step_000010"]


def test_checkpoints_are_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="checkpoints: is not a plain folder; move it away"):
        write_checkpoint(tmp_path / "run", 1, parts={"model": {"w": torch.ones(5)}}, facts={})
    assert list((tmp_path / "elsewhere").iterdir()) == []
