"""Ranks on this machine: start them, watch them, end them together."""

import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from data_shards.files import json_text, read_json_object, replace_file
from launch.cluster import ClusterConfig
from launch.rank_env import rank_environment

DONE, BAD_INPUT, CRASH, PEER_LOST = 0, 64, 1, 70
_EXIT_CODES = {DONE, 64, 65, 66, 70, 74, 75}
_GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Job:
    """What the ranks are to do: a kind the worker knows, the folder it is about, and JSON options."""

    kind: str
    path: Path
    options: dict[str, object]


def run_job(job: Job, cluster: ClusterConfig, *, ranks: int, run_dir: Path | None = None) -> int:
    """Run a job on `ranks` processes of this machine and return the exit code of the rank that failed first, 0 if none did.

    run_dir: where logs and exit.json go and whose lock is held while any rank lives; None for jobs that own no folder.
    A rank that is killed by a signal counts as lost (70); the others then have ten seconds to leave before they are killed."""
    lock = _lock(run_dir) if run_dir else None
    if run_dir:
        job = replace(job, options={**job.options, "previous_end": _take_exit_record(run_dir)})
    listening = socket.create_server(("127.0.0.1", 0), backlog=max(16, ranks))
    try:
        processes = _start(job, cluster, ranks=ranks, run_dir=run_dir, listening=listening, lock=lock)
    finally:
        listening.close()
    with _ForwardedSignals(processes):
        codes = _watch(processes)
    if lock is not None:
        os.close(lock)
    first = next((rank for rank, code in codes if code != DONE), None)
    if first is None:
        return DONE
    code = dict(codes)[first]
    worker_code = code if code in _EXIT_CODES else PEER_LOST if code < 0 else CRASH
    if run_dir:
        _explain(run_dir, first, code, worker_code)
    return worker_code


def _lock(run_dir: Path) -> int:
    """A lock that lasts while this process or any rank that inherits it lives.

    Raises: ValueError if another run holds it."""
    descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"{run_dir}: another process is running this run; wait for it, stop it, or give another --run-dir") from None
    return descriptor


def _take_exit_record(run_dir: Path) -> str | None:
    """How the last attempt ended, removed so that this one's end is not mistaken for it; None where it could not say."""
    record = run_dir / "exit.json"
    if not record.exists():
        return None
    fields = read_json_object(record)
    record.unlink()
    return f"{fields.get('code')}: {fields.get('reason')}"


def _start(
    job: Job, cluster: ClusterConfig, *, ranks: int, run_dir: Path | None, listening: socket.socket, lock: int | None
) -> list[subprocess.Popen[bytes]]:
    timeout = str(cluster.collective_timeout_seconds)
    inherited = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "HALFSTEP_LAUNCHER": "local", "HALFSTEP_TIMEOUT_SECONDS": timeout}
    command = [sys.executable, "-m", "launch.worker", job.kind, str(job.path), json.dumps(job.options)]
    port = listening.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = rank_environment(
            inherited,
            rank=rank,
            local_rank=rank,
            world_size=ranks,
            master_address="127.0.0.1",
            master_port=port,
            threads=cluster.threads_per_rank,
        )
        passed = [lock] if lock is not None else []
        if rank == 0 and ranks > 1:
            passed.append(listening.fileno())
            environment["HALFSTEP_STORE_FD"] = str(listening.fileno())
        output = _log(run_dir, rank)
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        processes.append(subprocess.Popen(command, env=environment, pass_fds=passed, **streams))
    return processes


def _log(run_dir: Path | None, rank: int) -> int | None:
    """Where a rank's output goes: rank 0's to the terminal (it keeps a log of its own), the others' to their log file."""
    if rank == 0:
        return None
    if run_dir is None:
        return subprocess.DEVNULL
    logs = run_dir / "logs"
    logs.mkdir(exist_ok=True)
    return os.open(logs / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)


def _watch(processes: Sequence[subprocess.Popen[bytes]]) -> list[tuple[int, int]]:
    """Wait for all ranks; (rank, exit code) in the order in which they ended. One that fails ends the others."""
    codes: list[tuple[int, int]] = []
    waiting = {process.pid: rank for rank, process in enumerate(processes)}
    deadline = None
    while waiting:
        ended = _wait_any(waiting, deadline)
        if ended is None:
            for pid in waiting:
                os.kill(pid, signal.SIGKILL)
            deadline = None
            continue
        pid, code = ended
        rank = waiting.pop(pid)
        processes[rank].returncode = code
        codes.append((rank, code))
        if code != DONE and deadline is None:
            deadline = time.monotonic() + _GRACE_SECONDS
    return codes


def _wait_any(waiting: dict[int, int], deadline: float | None) -> tuple[int, int] | None:
    """The next of the processes to end and its code, negative for a signal; None if the deadline comes first."""
    descriptors = {pid: os.pidfd_open(pid) for pid in waiting}
    try:
        poller = select.poll()
        for descriptor in descriptors.values():
            poller.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poller.poll(None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000)}
        for pid, descriptor in descriptors.items():
            if descriptor in ready:
                return pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return None
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


class _ForwardedSignals:
    """While ranks run, SIGTERM and SIGINT of the launcher are theirs: they commit a checkpoint and end with 75."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self.processes = processes

    def __enter__(self) -> None:
        self.previous = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _forward(self, number: int, _: FrameType | None) -> None:
        # Ctrl-C reaches the whole process group by itself; a second SIGINT does the ranks no harm.
        for process in self.processes:
            if process.returncode is None:
                process.send_signal(number)


def _explain(run_dir: Path, rank: int, code: int, worker_code: int) -> None:
    """Put the first failing rank's cause into exit.json, where the rank could not, and on the terminal."""
    record = run_dir / "exit.json"
    if code < 0:
        reason = f"rank {rank} was killed by {signal.Signals(-code).name}"
        replace_file(record, json_text({"code": worker_code, "reason": reason, "rank": rank}))
        sys.stderr.write(f"{reason}; the same command goes on from the newest checkpoint\n")
    elif rank > 0 and worker_code != 75:
        log = run_dir / "logs" / f"rank_{rank}.log"
        tail = log.read_text(errors="replace").splitlines()[-12:]
        sys.stderr.write(f"rank {rank} failed first with exit code {code}; the end of {log}:\n" + "\n".join(tail) + "\n")
