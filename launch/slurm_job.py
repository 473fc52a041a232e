"""Inside a Slurm job, on its first node: start the ranks, pass signals on, decide what follows their end."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import final

from launch.cluster import SlurmCluster, load_cluster
from launch.ends import Decision, End, Restarts, log_end, read_end, record_end, take_end
from launch.job import Job, from_flags
from launch.network import LOOPBACK, address_of, address_towards, reserve_port
from launch.rank_env import cluster_variables
from launch.slurm_commands import find_job, slurm
from trainer.exit_codes import BAD_INPUT, CALL_AGAIN, CRASH, DATA_BUDGET, DONE, IO_ERROR, NUMERIC, PEER_LOST
from trainer.stop import STOP_SIGNALS

_KNOWN = frozenset({BAD_INPUT, DATA_BUDGET, NUMERIC, PEER_LOST, IO_ERROR, CALL_AGAIN})
_LAST_SECONDS = 120.0
"""How long the batch step waits to be ended after it has asked to be queued again."""
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@final
@dataclass(frozen=True)
class Allocation:
    """The nodes that Slurm has given this job."""

    job_id: str
    """As scontrol takes it and submissions have it: of an array's element ARRAY_INDEX."""
    hosts: tuple[str, ...]
    restarts: int

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> "Allocation":
        """From SLURM_* variables. Raises: ValueError outside of a job."""
        if "SLURM_JOB_ID" not in variables:
            raise ValueError("SLURM_JOB_ID is not set: this runs inside a Slurm job (sbatch, salloc); leave --here out to submit one")
        job_id = variables["SLURM_JOB_ID"]
        if "SLURM_ARRAY_TASK_ID" in variables:
            # one of the elements has the array's own number as its own: by that, scontrol would queue all of them again
            job_id = f"{variables['SLURM_ARRAY_JOB_ID']}_{variables['SLURM_ARRAY_TASK_ID']}"
        hosts = slurm(["scontrol", "show", "hostnames", variables["SLURM_JOB_NODELIST"]]).split()
        return cls(job_id, tuple(hosts), int(variables.get("SLURM_RESTART_COUNT", "0")))


def main() -> int:
    """`python -m launch.slurm_job KIND RUN_DIR [--allow-fresh] [--profile]` or `... KIND SWEEP_DIR --array`, as the job script says."""
    kind, folder, *flags = sys.argv[1:]
    run_dir = Path(folder)
    if "--array" in flags:
        from launch.sweep import run_of_element

        run_dir = run_of_element(run_dir, int(os.environ["SLURM_ARRAY_TASK_ID"]))
    cluster = load_cluster(str(run_dir / "cluster.yaml"), [])
    assert isinstance(cluster, SlurmCluster), "a job script is written for Slurm"
    return run_here(Job(kind, run_dir, from_flags(flags)), cluster)


def allocated() -> list[str]:
    """Overrides of a cluster file by what this job was given, for a job script that was submitted by hand.

    Raises: ValueError outside of a job, and where its nodes have different numbers of tasks."""
    allocation = Allocation.read(os.environ)
    counts = os.environ.get("SLURM_NTASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE", "1")
    if "," in counts:
        raise ValueError(f"this job's nodes have {counts} tasks, and ranks are as many on every node; give sbatch --ntasks-per-node=N")
    tasks = re.match(r"\d+", counts)
    overrides = {
        "nodes": len(allocation.hosts),
        "ranks_per_node": int(tasks[0]) if tasks else 1,
        "cpus_per_rank": int(os.environ.get("SLURM_CPUS_PER_TASK", "1")),
    }
    return [f"{key}={value}" for key, value in overrides.items()]


def run_here(job: Job, cluster: SlurmCluster) -> int:
    """Run a job's ranks on the nodes of this allocation and do what their end asks for; returns the exit code of the job."""
    allocation, run_dir = Allocation.read(os.environ), job.path
    previous = take_end(run_dir)
    restarts = Restarts.begin(run_dir, limit=cluster.max_restarts, first=allocation.restarts == 0)
    lost = "the job was lost: preempted at once, or its node failed"
    if restarts.spent:
        end = previous or End(PEER_LOST, lost)
        record_end(run_dir, end)
    else:
        before = str(previous) if previous else lost if allocation.restarts else None
        end = _run_ranks(replace(job, options={**job.options, "previous_end": before}), cluster, allocation)
    decision, why = restarts.decide(end)
    if decision in ("again", "hold") and _has_been_ended(allocation):
        decision, why = "stop", f"{why}, with the same command: the job was cancelled (after a preemption Slurm itself brings it back)"
    log_end(run_dir, end, decision, why, job_id=allocation.job_id)
    sys.stderr.write(f"halfstep: exit code {end.code}: {why}\n")
    sys.stderr.flush()
    return _follow(decision, end, allocation)


def _run_ranks(job: Job, cluster: SlurmCluster, allocation: Allocation) -> End:
    """One srun task a rank, until all have ended."""
    first = _first_address(cluster, allocation.hosts)
    name = f"{allocation.job_id}_{allocation.restarts}"
    refusal = job.path / "job" / f"refused_{name}"
    refusal.unlink(missing_ok=True)
    with _Signals() as signals, contextlib.closing(_reserve(first, cluster, allocation)) as reserved:
        inherited = {key: value for key, value in os.environ.items() if key not in _INTERFACES}
        environment = {
            **inherited,
            **cluster_variables(cluster, launcher="slurm"),
            "HALFSTEP_MASTER_ADDRESS": first,
            "HALFSTEP_MASTER_PORT": str(reserved.getsockname()[1]),
            "HALFSTEP_INTERFACE": cluster.network_interface or "",
            "HALFSTEP_JOB_ID": allocation.job_id,
            "HALFSTEP_REFUSAL": str(refusal),
        }
        code = signals.wait_for(subprocess.Popen(srun_words(job, cluster), env=environment, stdin=subprocess.DEVNULL))
    if refusal.exists():
        reason = refusal.read_text(encoding="utf-8").strip()
        refusal.unlink()
        return End(PEER_LOST, f"refused: {reason}")
    end = read_end(job.path) or _end_of(code)
    record_end(job.path, end)
    return end


def srun_words(job: Job, cluster: SlurmCluster) -> list[str]:
    """The command that starts one task a rank; the first that fails ends the others."""
    return [
        "srun",
        "--kill-on-bad-exit=1",
        f"--nodes={cluster.nodes}",
        f"--ntasks={cluster.ranks}",
        f"--ntasks-per-node={cluster.ranks_per_node}",
        f"--cpus-per-task={cluster.cpus_per_rank}",
        "--distribution=block:block",
        "--unbuffered",
        *shlex.split(cluster.container or ""),
        cluster.python or sys.executable,
        "-m",
        "launch.slurm_rank",
        job.kind,
        str(job.path),
        json.dumps(job.options),
    ]


def _first_address(cluster: SlurmCluster, hosts: tuple[str, ...]) -> str:
    """The address of this node, the first one, by which the others reach it."""
    if len(hosts) == 1:
        return LOOPBACK
    if cluster.network_interface:
        return address_of(cluster.network_interface)
    facts = slurm(["scontrol", "--oneliner", "show", "node", hosts[1]])
    address = re.search(r"\bNodeAddr=(\S+)", facts)
    return address_towards(address[1] if address else hosts[1])


def _reserve(address: str, cluster: SlurmCluster, allocation: Allocation) -> socket.socket:
    """A free port for rank 0, which runs on this node too."""
    number = int(re.sub(r"\D", "", allocation.job_id) or 0) * 7 + allocation.restarts
    return reserve_port(address, cluster.rendezvous_ports, start=number)


def _end_of(code: int) -> End:
    """How the ranks ended, where none of them could say it."""
    if code == DONE:
        return End(DONE, "done")
    if code in _KNOWN:
        return End(code, f"a rank ended with exit code {code}; see logs/")
    number = -code if code < 0 else code - 128
    if number in set(signal.Signals):
        text = f"a rank was killed by {signal.Signals(number).name}"
        if number == signal.SIGKILL:
            text += "; if memory ran out (the log says oom-kill): cluster.memory_gib_per_rank, or a smaller data.micro_batch_size"
        return End(PEER_LOST, text)
    return End(CRASH, f"a rank ended with exit code {code}; see logs/")


def _has_been_ended(allocation: Allocation) -> bool:
    """Whether Slurm ends the job already, and not for its time limit: it was cancelled, or is queued again without our asking."""
    try:
        job = find_job(allocation.job_id)
    except (RuntimeError, ValueError):
        return False
    return job is not None and job.word in ("CANCELLED", "COMPLETING") and not job.over_limit


def _follow(decision: Decision, end: End, allocation: Allocation) -> int:
    """Do what was decided, last of all: Slurm ends this process as soon as it is asked to queue the job again."""
    words = {"again": "requeue", "hold": "requeuehold"}.get(decision)
    if words is None:
        return end.code
    with _Signals() as signals:
        try:
            slurm(["scontrol", words, allocation.job_id])
        except (RuntimeError, ValueError) as error:
            code = _requeue_exit()
            told = "leaving with an exit code that this site requeues" if code else "give the same halfstep command again to go on"
            sys.stderr.write(f"halfstep: {error}; {told}\n")
            return code or end.code
        signals.wait(_LAST_SECONDS)  # Slurm ends this step; leaving before would look like an end of the job
    return end.code


def _requeue_exit() -> int | None:
    """An exit code on which this site queues a job again by itself (RequeueExit)."""
    try:
        found = re.search(r"^RequeueExit\s*=\s*(\d+)", slurm(["scontrol", "show", "config"]), re.MULTILINE)
    except (RuntimeError, ValueError):
        return None
    return int(found[1]) if found else None


@final
@dataclass
class _Signals:
    """While ranks run, the signals of this step are theirs: USR1 through srun, which hands it to every task."""

    received: int | None = None
    process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "_Signals":
        self._before = {number: signal.signal(number, self._pass_on) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait_for(self, process: subprocess.Popen[bytes]) -> int:
        """The exit code of srun."""
        self.process = process
        if self.received is not None:  # it came while srun was being started
            self._pass_on(self.received, None)
        return process.wait()

    def wait(self, seconds: float) -> None:
        """Return when a signal has come."""
        deadline = time.monotonic() + seconds
        while self.received is None and time.monotonic() < deadline:
            time.sleep(0.1)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self.received = number
        if self.process and self.process.returncode is None:
            sys.stderr.write(f"halfstep: {signal.Signals(number).name}: the ranks are told to stop\n")
            self.process.send_signal(signal.SIGUSR1)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(BAD_INPUT)
