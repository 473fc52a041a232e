"""Local ranks live and die together, and the launcher tells the truth about how."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.cluster import LocalCluster
from launch.demo import run_demo
from launch.job import Job
from launch.local import _blocked_signals, _explain, _watch, run_job
from launch.run_lock import is_locked, locked
from launch.worker import _exit_code
from trainer.lease import Lease
from trainer.stop import STOP_SIGNALS


def test_bad_input_of_a_job_ends_with_64(tmp_path: Path) -> None:
    assert run_job(Job("hash", tmp_path, {}), LocalCluster(), ranks=1) == 64


def test_a_run_without_a_recipe_leaves_its_reason(tmp_path: Path) -> None:
    assert run_job(Job("train", tmp_path, {}), LocalCluster(), ranks=1, run_dir=tmp_path) == 64
    record = json.loads((tmp_path / "exit.json").read_text())
    assert record["code"] == 64 and "recipe.yaml" in record["reason"]


def test_what_all_ranks_refuse_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_job(Job("train", tmp_path, {}), LocalCluster(), ranks=2, run_dir=tmp_path) == 64
    told = capfd.readouterr().err
    assert told.count("sees no run there") == 1 and "logs of all ranks" not in told


def test_two_commands_never_share_a_run(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert is_locked(tmp_path)
        with pytest.raises(ValueError, match="another process is running this run"), locked(tmp_path):
            pass
    assert not is_locked(tmp_path)


def test_ranks_that_cannot_divide_a_step_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 ranks cannot divide 2 micro-batches"):
        run_demo(tmp_path / "demo", ranks=3)
    assert not (tmp_path / "demo").exists()


def _process(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code])


def test_a_rank_that_the_launcher_had_to_kill_is_not_the_cause_and_a_stopped_one_is_killed_at_once() -> None:
    stopped = _process("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)")
    os.waitid(os.P_PID, stopped.pid, os.WSTOPPED)
    began = time.monotonic()
    assert _watch([_process("raise SystemExit(70)"), stopped]) == [(0, 70)]
    assert time.monotonic() - began < 8 and stopped.returncode == -signal.SIGKILL


def _explained(run_dir: Path, rank: int, code: int, worker_code: int, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, object], str]:
    _explain(run_dir, rank, code, worker_code)
    record = run_dir / "exit.json"
    return json.loads(record.read_text()) if record.exists() else {}, capsys.readouterr().err


def test_bad_input_that_rank_0_has_told_is_not_told_again_by_another_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "exit.json").write_text(json.dumps({"code": 64, "reason": "ValueError: no such target", "rank": 1}))
    assert _explained(tmp_path, 0, 64, 64, capsys)[1] == ""


def test_a_killed_rank_is_named_first_then_where_the_logs_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, terminal = _explained(tmp_path, 1, -signal.SIGKILL, 70, capsys)
    reason = "rank 1 was killed by SIGKILL (by the kernel, if memory ran out: see dmesg)"
    assert record == {"code": 70, "reason": reason, "rank": 1}
    assert terminal.splitlines() == [
        f"rank 1 failed first: {reason}",
        f"logs of all ranks: {tmp_path / 'logs'}",
        "the same command goes on from the newest checkpoint",
    ]


def test_a_rank_that_failed_on_its_own_is_shown_with_the_end_of_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_2.log").write_text("".join(f"line {number}\n" for number in range(20)))
    written = {"code": 74, "reason": "OSError: disk full", "rank": 2}
    (tmp_path / "exit.json").write_text(json.dumps(written))
    record, terminal = _explained(tmp_path, 2, 74, 74, capsys)
    assert record == written
    first, second, *tail, last = terminal.splitlines()
    assert first == "rank 2 failed first: OSError: disk full" and second.endswith("rank_2.log:")
    assert tail == [f"    line {number}" for number in range(8, 20)] and last.startswith("logs of all ranks: ")


def test_the_rank_that_a_hang_names_is_shown_whoever_ended_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "exit.json").write_text('{"code": 70, "reason": "rank 3 on node7 answers no more", "rank": 3}')
    assert _explained(tmp_path, 0, 70, 70, capsys)[1].startswith("rank 3 failed first: rank 3 on node7 answers no more\n")


def test_a_folder_that_is_another_jobs_gets_no_exit_record_and_a_stop_no_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _explained(tmp_path, 0, 64, 64, capsys) == ({}, "")
    assert _explained(tmp_path, 1, 75, 75, capsys) == ({}, "")


def test_a_run_whose_lease_is_held_is_refused_with_64_and_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lease = Lease.take(tmp_path)
    assert run_job(Job("train", tmp_path, {}), LocalCluster(), ranks=1, run_dir=tmp_path) == 64
    assert f"error: {tmp_path / 'lease.json'}: process {os.getpid()} on " in capfd.readouterr().err
    assert lease.held() and not (tmp_path / "exit.json").exists() and not (tmp_path / "heartbeats").exists()


def test_ranks_start_with_signals_held_back_and_the_launcher_without() -> None:
    with _blocked_signals():
        child = subprocess.run(["grep", "SigBlk", "/proc/self/status"], capture_output=True, text=True, check=True)
    held = int(child.stdout.split()[1], 16)
    assert all(held >> (number - 1) & 1 for number in STOP_SIGNALS)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOP_SIGNALS)


def test_a_rank_that_lost_its_peers_inside_an_engine_is_not_the_cause() -> None:
    from torch.distributed import DistBackendError, DistStoreError

    gloo = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242")
    assert [_exit_code(error) for error in (gloo, DistBackendError("nccl"), DistStoreError("store"))] == [70, 70, 70]
    assert [_exit_code(error) for error in (RuntimeError("shape"), ImportError("torch"), FileNotFoundError(2, "gone"))] == [1, 1, 1]
    assert [_exit_code(error) for error in (OSError(errno.ENOSPC, "full"), ValueError("bad"))] == [74, 64]
