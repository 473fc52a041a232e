"""Ranks on this machine: start them, watch them, end them together."""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from launch.cluster import ClusterConfig, LocalCluster
from launch.ends import End, Restarts, log_end, read_end, record_end, take_end
from launch.job import Job
from launch.logs import rank_log
from launch.network import LOOPBACK
from launch.place import Place
from launch.rank_env import rank_environment
from trainer.exit_codes import BAD_INPUT, CALL_AGAIN, CRASH, DATA_BUDGET, DONE, INTERRUPTED, IO_ERROR, NUMERIC, PEER_LOST
from trainer.stop import STOP_SIGNALS

_EXIT_CODES = {DONE, BAD_INPUT, DATA_BUDGET, NUMERIC, PEER_LOST, IO_ERROR, CALL_AGAIN, INTERRUPTED}
_LOG_LINES = 12
_GRACE_SECONDS = 10.0


def run_job(job: Job, cluster: ClusterConfig, *, ranks: int, run_dir: Path | None = None, lock: int | None = None) -> int:
    """Run a job on `ranks` processes of this machine and return its exit code: that of the rank at fault, 0 if all are done.

    run_dir: where logs and exit.json go; None for jobs that own no folder. lock: descriptor of its lock, for the ranks to inherit.
    A rank that is killed by a signal counts as lost (70); when one has failed the others have ten seconds to leave, and none
    where they are stopped (SIGSTOP)."""
    with _ForwardedSignals() as signals:
        return _attempt(job, cluster, signals, ranks=ranks, run_dir=run_dir, lock=lock)


def run_until_done(job: Job, cluster: LocalCluster, *, ranks: int, run_dir: Path, lock: int) -> int:
    """run_job, started again by itself as often as the cluster file allows; never once a person has asked it to stop."""
    first = True
    with _ForwardedSignals() as signals:
        while True:
            restarts = Restarts.begin(run_dir, limit=cluster.max_restarts, first=first)
            code = _attempt(job, cluster, signals, ranks=ranks, run_dir=run_dir, lock=lock)
            end = read_end(run_dir) or End(code, f"exit code {code}")
            decision, why = restarts.decide(end)
            if decision == "again" and (code == CALL_AGAIN or signals.received is not None or cluster.max_restarts == 0):
                decision, why = "stop", end.reason
            log_end(run_dir, end, decision, why, job_id=f"local {os.getpid()}")
            if decision != "again":
                return code
            sys.stderr.write(f"starting again: {why}\n")
            first = False


def _attempt(job: Job, cluster: ClusterConfig, signals: "_ForwardedSignals", *, ranks: int, run_dir: Path | None, lock: int | None) -> int:
    """run_job, whose signals somebody else forwards."""
    previous = take_end(run_dir) if run_dir else None
    if previous:
        job = replace(job, options={**job.options, "previous_end": str(previous)})
    processes = signals.processes = list[subprocess.Popen[bytes]]()
    with socket.create_server((LOOPBACK, 0), backlog=max(16, ranks)) as listening:
        _start(processes, job, cluster, ranks=ranks, run_dir=run_dir, listening=listening, lock=lock)
    signals.repeat()
    codes = _watch(processes)
    failed = [(rank, code) for rank, code in codes if code != DONE]
    if not failed:
        return DONE
    # A rank that lost its peers (70) or stopped as asked (75) is not what went wrong, if another one is; what all refuse, rank 0 has said.
    causes = [(rank, code) for rank, code in failed if code not in (PEER_LOST, CALL_AGAIN)]
    rank, code = (0, BAD_INPUT) if (0, BAD_INPUT) in causes else (causes or failed)[0]
    worker_code = code if code in _EXIT_CODES else PEER_LOST if code < 0 else CRASH
    if run_dir:
        _explain(run_dir, rank, code, worker_code)
    return worker_code


def _start(
    processes: list[subprocess.Popen[bytes]],
    job: Job,
    cluster: ClusterConfig,
    *,
    ranks: int,
    run_dir: Path | None,
    listening: socket.socket,
    lock: int | None,
) -> None:
    """Start the ranks, adding each to `processes` at once."""
    inherited = dict(os.environ)
    command = job.command(sys.executable)
    port = listening.getsockname()[1]
    if lock is not None:
        inherited["HALFSTEP_LOCK_FD"] = str(lock)
    for rank in range(ranks):
        place = Place(rank, rank, ranks, ranks, LOOPBACK, port)
        environment = rank_environment(inherited, place, cluster, launcher="local", interface="lo")
        passed = [lock] if lock is not None else []
        if rank == 0 and ranks > 1:
            passed.append(listening.fileno())
            environment["HALFSTEP_STORE_FD"] = str(listening.fileno())
        output = _log(run_dir, rank)
        with _blocked_signals():
            processes.append(
                subprocess.Popen(command, env=environment, pass_fds=passed, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            )


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Keep signals back, from a rank that starts until it can answer them: they wait for it, and none is lost or kills it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _log(run_dir: Path | None, rank: int) -> int | None:
    """Where a rank's output goes: rank 0's to the terminal (it keeps a log of its own), the others' to their log file."""
    if rank == 0:
        return None
    if run_dir is None:
        return subprocess.DEVNULL
    return rank_log(run_dir, rank)


def _watch(processes: Sequence[subprocess.Popen[bytes]]) -> list[tuple[int, int]]:
    """Wait for all ranks; (rank, exit code) of those that ended by themselves, in that order. One that fails ends the others."""
    codes: list[tuple[int, int]] = []
    waiting = {process.pid: rank for rank, process in enumerate(processes)}
    killed: set[int] = set()
    deadline = None
    while waiting:
        ended = _wait_any(waiting, deadline)
        if ended is None:
            deadline = None
            killed |= _kill(waiting)
            continue
        pid, code = ended
        rank = waiting.pop(pid)
        processes[rank].returncode = code
        if pid not in killed:
            codes.append((rank, code))
        if code != DONE and not killed:
            deadline = deadline or time.monotonic() + _GRACE_SECONDS
            killed |= _kill(pid for pid in waiting if _is_stopped(pid))
    return codes


def _kill(pids: Iterable[int]) -> set[int]:
    """End ranks that have not left; returns those it has killed."""
    doomed = set(pids)
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    return doomed


def _is_stopped(pid: int) -> bool:
    """Whether a process of ours was stopped (SIGSTOP) and so cannot leave."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "T"


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
    """While ranks run, the launcher's signals are theirs: they commit a checkpoint and end with 75."""

    def __init__(self) -> None:
        self.processes: Sequence[subprocess.Popen[bytes]] = ()
        self.received: int | None = None

    def __enter__(self) -> "_ForwardedSignals":
        # Under nohup a closed terminal is to end nothing.
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        self.previous = {number: signal.signal(number, self._forward) for number in STOP_SIGNALS if number not in ignored}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def repeat(self) -> None:
        """Tell all ranks of a signal that came while they were being started."""
        if self.received is not None:
            self._forward(self.received, None)

    def _forward(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            sys.stderr.write(f"\n{signal.Signals(number).name}: stopping after this step\n")
        self.received = number
        # Ctrl-C reaches the ranks by itself too; a second SIGINT does them no harm.
        for process in self.processes:
            if process.returncode is None:
                process.send_signal(number)


def _explain(run_dir: Path, rank: int, code: int, worker_code: int) -> None:
    """Put the cause into exit.json, where the rank could not, and on the terminal: which rank, why, and where the logs are."""
    if worker_code == CALL_AGAIN or (rank == 0 and code == BAD_INPUT):
        return  # as asked; or it has said so itself
    if code < 0:
        reason = f"rank {rank} was killed by {signal.Signals(-code).name}"
        reason += " (by the kernel, if memory ran out: see dmesg)" if -code == signal.SIGKILL else ""
        record_end(run_dir, End(worker_code, reason, rank))
    elif end := read_end(run_dir):
        reason, rank = end.reason, rank if end.rank is None else end.rank
    else:
        reason = f"rank {rank} lost the other ranks" if code == PEER_LOST else f"rank {rank} ended with exit code {code}"
        if worker_code != BAD_INPUT:  # that rank left none on purpose: the folder is another job's
            record_end(run_dir, End(worker_code, reason, rank))
    if rank == 0 and code > 0 and worker_code != PEER_LOST:
        return  # it has said so itself
    lines = [f"rank {rank} failed first: {reason}"]
    log = run_dir / "logs" / f"rank_{rank}.log"
    if code > 0 and log.exists() and (tail := log.read_text(errors="replace").splitlines()[-_LOG_LINES:]):
        lines += [f"the end of {log}:", *(f"    {line}" for line in tail)]
    lines.append(f"logs of all ranks: {run_dir / 'logs'}")
    if worker_code == PEER_LOST:
        lines.append("the same command goes on from the newest checkpoint")
    sys.stderr.write("\n".join(lines) + "\n")
