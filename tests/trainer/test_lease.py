"""Two jobs never hold one run, wherever they are; a dead job's lease is taken over."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trainer.lease import Lease, may_be_held, start_ticks

_RENEW_SECONDS = 0.04


def _record(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / "lease.json").read_bytes())


def _left_by(run_dir: Path, **changes: object) -> None:
    """A lease like one of this process, but for the changes."""
    lease = Lease.take(run_dir)
    (run_dir / "lease.json").write_text(json.dumps({**_record(run_dir), "owner": "0" * 32, **changes}))
    assert not lease.held()


def test_a_lease_names_its_holder_and_is_gone_after_release(tmp_path: Path) -> None:
    lease = Lease.take(tmp_path)
    record = _record(tmp_path)
    assert (record["host"], record["pid"], record["started"]) == (socket.gethostname(), os.getpid(), start_ticks(os.getpid()))
    assert lease.held()
    lease.renew()
    assert _record(tmp_path) == {**record, "renewed": 1} and lease.held()
    lease.release()
    assert list(tmp_path.iterdir()) == []


def test_a_living_job_on_this_host_keeps_its_run(tmp_path: Path) -> None:
    lease = Lease.take(tmp_path)
    with pytest.raises(ValueError, match=f"process {os.getpid()} on {socket.gethostname()} is running this run; wait for it, stop it"):
        Lease.take(tmp_path)
    assert lease.held()


def test_a_dead_job_on_this_host_is_succeeded_at_once(tmp_path: Path) -> None:
    code = "from pathlib import Path; import sys; from trainer.lease import Lease; Lease.take(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    assert Lease.take(tmp_path, renew_seconds=1000.0).held()


def test_what_asks_a_run_to_stop_knows_whether_a_job_may_hold_it(tmp_path: Path) -> None:
    assert not may_be_held(tmp_path)
    lease = Lease.take(tmp_path)
    assert may_be_held(tmp_path)
    lease.release()
    _left_by(tmp_path, started=(start_ticks(os.getpid()) or 0) - 1)
    assert not may_be_held(tmp_path), "its process is gone"
    (tmp_path / "lease.json").write_text(json.dumps({**_record(tmp_path), "pid_space": "elsewhere"}))
    assert may_be_held(tmp_path), "who can say what runs elsewhere"
    (tmp_path / "lease.json").write_text("")
    assert may_be_held(tmp_path), "it is just being written"


def test_a_process_id_that_was_given_again_is_another_process(tmp_path: Path) -> None:
    _left_by(tmp_path, started=(start_ticks(os.getpid()) or 0) - 1)
    assert Lease.take(tmp_path, renew_seconds=1000.0).held()


def test_a_process_that_is_dead_but_not_reaped_has_no_start_time() -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert start_ticks(process.pid) is None
    assert start_ticks(2**22 + 1) is None


@pytest.mark.parametrize("pid", [os.getpid(), 2**22 + 1], ids=["that runs", "that nobody has"])
def test_a_silent_job_of_another_host_is_succeeded_whatever_runs_here(tmp_path: Path, pid: int, caplog: pytest.LogCaptureFixture) -> None:
    _left_by(tmp_path, host="node7", pid_space="elsewhere", pid=pid)
    lease = Lease.take(tmp_path, renew_seconds=_RENEW_SECONDS)
    assert lease.held() and "taken over from the job of node7, which has not renewed it" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["lease.json"]


def test_a_job_of_another_host_that_renews_keeps_its_run(tmp_path: Path) -> None:
    held = Lease.take(tmp_path)
    content = (tmp_path / "lease.json").read_bytes().replace(_record(tmp_path)["pid_space"].__str__().encode(), b"elsewhere")
    (tmp_path / "lease.json").write_bytes(content)
    elsewhere = json.loads(content)
    ended = threading.Event()

    def renew() -> None:
        counter = 0
        while not ended.wait(_RENEW_SECONDS):
            counter += 1
            (tmp_path / "lease.json").write_text(json.dumps({**elsewhere, "renewed": counter}))

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(ValueError, match=r"process \d+ on .* is running this run"):
        Lease.take(tmp_path, renew_seconds=_RENEW_SECONDS)
    ended.set()
    thread.join()
    assert held.held()


def test_a_file_that_its_writer_never_finished_is_succeeded(tmp_path: Path) -> None:
    (tmp_path / "lease.json").touch()
    assert Lease.take(tmp_path, renew_seconds=_RENEW_SECONDS).held()


def test_a_job_whose_lease_was_taken_over_knows_it_and_disturbs_nobody(tmp_path: Path) -> None:
    first = Lease.take(tmp_path)
    content = {**_record(tmp_path), "pid_space": "elsewhere"}
    (tmp_path / "lease.json").write_text(json.dumps(content))
    second = Lease.take(tmp_path, renew_seconds=_RENEW_SECONDS)
    assert second.held() and not first.held()
    before = _record(tmp_path)
    first.renew()
    first.release()
    assert _record(tmp_path) == before and second.held()


def test_of_many_that_take_a_run_at_once_one_has_it(tmp_path: Path) -> None:
    _left_by(tmp_path, started=0)
    code = (
        "from pathlib import Path; import sys; from trainer.lease import Lease\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try: Lease.take(Path(sys.argv[1])); print('held', flush=True)\n"
        "except ValueError as error: print(error, flush=True)\n"
        "sys.stdin.readline()"
    )
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(8)
    ]
    pipes = [(job.stdin, job.stdout) for job in jobs]
    for _, output in pipes:
        assert output is not None and output.readline() == "ready\n"
    for stdin, _ in pipes:
        assert stdin is not None
        stdin.write("\n")
        stdin.flush()
    said = [output.readline() for _, output in pipes if output is not None]
    assert said.count("held\n") == 1, said
    for job in jobs:
        job.communicate("\n")
