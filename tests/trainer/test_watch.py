"""A heartbeat always says where a rank stands; a hang ends with 70, stacks and the name of the rank at fault."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from trainer.lease import Lease
from trainer.watch import Heartbeat, Watch, read_heartbeats, verdict

_LIMIT_SECONDS = 0.8
# What a rank does: it says on a line that it begins, then takes steps for as long as its input says so.
_RANK = """
import sys
from pathlib import Path
from trainer.watch import Watch
import logging
logging.basicConfig(level=logging.ERROR)
rank, limit = int(sys.argv[2]), float(sys.argv[3])
watch = Watch(Path(sys.argv[1]), rank=rank, world_size=int(sys.argv[4]), limit_seconds=limit)
for line in sys.stdin:
    watch.phase(line.split()[0], int(line.split()[1]))
    print("done", flush=True)
watch.close()
"""


def _rank(run_dir: Path, rank: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _RANK, str(run_dir), str(rank), str(_LIMIT_SECONDS), str(count)]
    return subprocess.Popen(command, text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@contextmanager
def _ranks(run_dir: Path, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    ranks = [_rank(run_dir, rank, count) for rank in range(count)]
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def _goes(process: subprocess.Popen[str], phase: str, step: int) -> None:
    """Lets a rank's main thread go on to a phase."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{phase} {step}\n")
    assert process.stdout.readline() == "done\n"


def _ends(process: subprocess.Popen[str]) -> str:
    """Waits until a rank has ended with 70; returns what it said."""
    assert process.wait(20) == 70 and process.stderr is not None
    return process.stderr.read()


def _until(condition: Callable[[], bool]) -> None:
    deadline, poll = time.monotonic() + 10, threading.Event()
    while not condition():
        assert time.monotonic() < deadline
        poll.wait(0.01)


def _beat(rank: int, phase: str, step: int, *, seconds: float = 6.0) -> Heartbeat:
    return Heartbeat(rank, f"node{rank}", 100 + rank, step, phase, since=1e9 * rank, saving="", beat=1e9 * rank + seconds)


def test_a_heartbeat_of_several_hosts_is_written_out_with_every_beat(tmp_path: Path) -> None:
    watch = Watch(tmp_path, rank=1, world_size=2, limit_seconds=1, several_hosts=True)
    watch.phase("data", 17)
    first = read_heartbeats(tmp_path)[1].beat
    _until(lambda: read_heartbeats(tmp_path)[1].beat > first)
    assert (read_heartbeats(tmp_path)[1].phase, read_heartbeats(tmp_path)[1].step) == ("data", 17)
    watch.phase("end", 18)
    watch.close()
    assert read_heartbeats(tmp_path)[1].step == 18


def test_a_heartbeat_says_what_the_rank_does_at_every_moment(tmp_path: Path) -> None:
    before = time.time()
    watch = Watch(tmp_path, rank=3, world_size=4, limit_seconds=60)
    path = tmp_path / "heartbeats" / "rank_3.json"
    assert read_heartbeats(tmp_path)[3].phase == "start"
    watch.phase("compute", 123456789012)
    watch.saving('ema "1/3"')
    content = path.read_bytes()
    assert len(content) == 512 and content.endswith(b" \n")
    beat = read_heartbeats(tmp_path)[3]
    assert (beat.rank, beat.host, beat.pid) == (3, socket.gethostname(), os.getpid())
    assert (beat.phase, beat.step, beat.saving) == ("compute", 123456789012, 'ema "1/3"')
    assert before - 0.001 <= beat.since <= time.time() + 0.001
    watch.saving("")
    watch.phase("end", 0)
    watch.close()
    assert read_heartbeats(tmp_path)[3].beat >= beat.beat
    assert json.loads(path.read_bytes())["saving"] == "" and read_heartbeats(tmp_path)[3].step == 0


@pytest.mark.parametrize("name", ["x" * 200, "\u00fc" * 200, '"' * 200, "\x01" * 200])
def test_no_text_of_a_save_breaks_a_heartbeat(tmp_path: Path, name: str) -> None:
    watch = Watch(tmp_path, rank=0, world_size=1, limit_seconds=60)
    watch.saving(name)
    assert name.startswith(read_heartbeats(tmp_path)[0].saving) and read_heartbeats(tmp_path)[0].saving
    watch.close()


def test_a_phase_costs_microseconds(tmp_path: Path) -> None:
    watch = Watch(tmp_path, rank=0, world_size=1, limit_seconds=60)
    # 0.8 us a call on an idle core; the bound is for a busy one.
    assert min(timeit.repeat(lambda: watch.phase("compute", 1), number=1000, repeat=10)) < 1000 * 20e-6
    watch.close()


def test_a_new_attempt_leaves_the_file_of_a_rank_that_still_runs_alone(tmp_path: Path) -> None:
    old = Watch(tmp_path, rank=0, world_size=1, limit_seconds=60)
    (tmp_path / "heartbeats" / "hang").touch()
    (tmp_path / "logs" / "stacks_rank_0.txt").touch()
    new = Watch(tmp_path, rank=0, world_size=1, limit_seconds=60)
    old.phase("reduce", 7)
    assert read_heartbeats(tmp_path)[0].phase == "start"
    assert [path.name for path in (tmp_path / "heartbeats").iterdir()] == ["rank_0.json"]
    assert list((tmp_path / "logs").iterdir()) == []
    old.close()
    new.close()


def test_a_lease_is_renewed_with_every_beat(tmp_path: Path) -> None:
    lease = Lease.take(tmp_path)
    watch = Watch(tmp_path, rank=0, world_size=1, limit_seconds=1, lease=lease)
    _until(lambda: json.loads((tmp_path / "lease.json").read_bytes())["renewed"] >= 2)
    watch.close()
    assert watch.lease is lease and lease.held()


def test_a_rank_that_says_nothing_ends_with_70_its_stacks_and_its_place(tmp_path: Path) -> None:
    with _ranks(tmp_path, 1) as [rank]:
        _goes(rank, "data", 5)
        said = _ends(rank)
    reason = json.loads((tmp_path / "exit.json").read_text())
    assert reason["code"] == 70 and reason["rank"] == 0
    assert f"rank 0 on {socket.gethostname()} (pid {rank.pid}) is stuck: phase data of step 5 for " in reason["reason"]
    assert reason["reason"] in said
    assert "Thread 0x" in (tmp_path / "logs" / "stacks_rank_0.txt").read_text()


def test_a_stopped_rank_is_named_and_the_others_leave_their_stacks(tmp_path: Path) -> None:
    with _ranks(tmp_path, 3) as ranks:
        for rank in ranks:
            _goes(rank, "compute", 8)
        stopped = ranks[1]
        os.kill(stopped.pid, signal.SIGSTOP)
        frozen = (tmp_path / "heartbeats" / "rank_1.json").read_bytes()
        for rank in (ranks[0], ranks[2]):
            _goes(rank, "reduce", 8)
        began = time.monotonic()
        said = _ends(ranks[0]) + _ends(ranks[2])
        assert time.monotonic() - began < _LIMIT_SECONDS + 5
        assert (tmp_path / "heartbeats" / "rank_1.json").read_bytes() == frozen
    record = json.loads((tmp_path / "exit.json").read_text())
    assert (record["code"], record["rank"]) == (70, 1)
    named = f"rank 1 on {socket.gethostname()} (pid {stopped.pid}) answers no more (stopped, or its host is gone): phase compute of step 8"
    assert named in record["reason"] and "the other ranks: 2 in reduce of step 8" in record["reason"] and named in said
    stacks = {path.name for path in (tmp_path / "logs").iterdir()}
    assert stacks == {"stacks_rank_0.txt", "stacks_rank_2.txt"}


def test_a_rank_that_moves_or_ticks_is_left_alone(tmp_path: Path) -> None:
    watch = Watch(tmp_path, rank=0, world_size=1, limit_seconds=0.5)
    watch.phase("sample", 1)
    pause, until = threading.Event(), time.monotonic() + 1.2
    while time.monotonic() < until:
        watch.tick()
        pause.wait(0.05)
    watch.close()
    assert not (tmp_path / "exit.json").exists()


def test_ranks_that_measure_or_wait_for_that_may_take_much_longer_than_the_limit(tmp_path: Path) -> None:
    watches = [Watch(tmp_path, rank=rank, world_size=2, limit_seconds=0.4) for rank in range(2)]
    for watch, phase in zip(watches, ("measure", "wait"), strict=True):
        watch.phase(phase, 0)
    threading.Event().wait(1.0)
    for watch in watches:
        watch.close()
    assert not (tmp_path / "exit.json").exists()


def test_a_rank_that_was_stopped_as_a_whole_and_goes_on_is_no_hang(tmp_path: Path) -> None:
    with _ranks(tmp_path, 1) as [rank]:
        _goes(rank, "compute", 1)
        os.kill(rank.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, rank.pid, os.WSTOPPED)
        with suppress(subprocess.TimeoutExpired):
            rank.wait(1.5 * _LIMIT_SECONDS)
        os.kill(rank.pid, signal.SIGCONT)
        with suppress(subprocess.TimeoutExpired):
            rank.wait(0.3)  # a beat
        _goes(rank, "compute", 2)


def test_the_reason_of_a_rank_that_failed_before_is_kept(tmp_path: Path) -> None:
    (tmp_path / "exit.json").write_text('{"code": 74}')
    with _ranks(tmp_path, 1) as [rank]:
        _goes(rank, "reduce", 1)
        _ends(rank)
    assert (tmp_path / "exit.json").read_text() == '{"code": 74}'


@pytest.mark.parametrize(
    ("places", "silent", "at_fault", "why"),
    [
        ([("reduce", 4), ("reduce", 4), None], {}, 2, "rank 2 never started: it has no heartbeat"),
        ([("reduce", 4), ("data", 4), ("compute", 3)], {1: 5.0}, 1, "rank 1 on node1 (pid 101) answers no more"),
        ([("reduce", 4), ("data", 4), ("reduce", 4)], {}, 1, "rank 1 on node1 (pid 101) is stuck: phase data of step 4 for 6.0 s"),
        ([("compute", 5), ("compute", 5), ("compute", 4)], {}, 2, "rank 2 on node2 (pid 102) is stuck: phase compute of step 4"),
        ([("reduce", 5), ("data", 5), ("data", 5)], {}, 1, "rank 1 on node1"),
        ([("reduce", 5), ("reduce", 4), ("reduce", 5)], {}, 1, "the other ranks: 2 in reduce of step 5"),
        ([("join", 9), ("join", 9), ("stage", 9)], {}, 2, "phase stage of step 9"),
        ([("measure", 0), ("wait", 0), ("wait", 0)], {}, 0, "phase measure of step 0"),
    ],
)
def test_the_rank_at_fault_is_the_one_that_the_others_wait_for(
    places: list[tuple[str, int] | None], silent: dict[int, float], at_fault: int, why: str
) -> None:
    beats = {rank: _beat(rank, *place) for rank, place in enumerate(places) if place}
    rank, reason = verdict(beats, silent, world_size=3, limit_seconds=6)
    assert rank == at_fault and why in reason
    assert "; nothing moved for 6 s (cluster.collective_timeout_seconds); the same command goes on" in reason


def test_of_ranks_that_all_do_the_same_the_one_longest_in_it_is_named() -> None:
    beats = {rank: _beat(rank, "sample", 3, seconds=seconds) for rank, seconds in enumerate((6.0, 7.5, 6.1))}
    assert verdict(beats, {}, world_size=3, limit_seconds=6)[0] == 1
