"""Ray: a rank in each worker of a Ray Train group, started again by this driver as often as the cluster file allows."""

import json
import math
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, cast, final

from launch.cluster import RayCluster, load_cluster
from launch.ends import End, Restarts, log_end, read_end, record_end, take_end
from launch.job import Job
from launch.ray_connect import check_installed, connected
from trainer.exit_codes import BAD_INPUT, CALL_AGAIN, CRASH, DONE, PEER_LOST
from trainer.stop import STOP_SIGNALS, is_stop_requested, request_stop

if TYPE_CHECKING:
    from ray.train.torch import TorchConfig

_OWN_WAIT_SECONDS = 30.0
"""For room on a Ray of our own, which does not grow."""
_LOOK_SECONDS = 0.5


def run_on_ray(job: Job, cluster: RayCluster, *, follow: bool) -> int:
    """Run a job on Ray and return its exit code; one that is submitted over http is queued (0), or followed.

    Raises: ValueError for an address that cannot be used; RuntimeError, ConnectionError in Ray's words."""
    check_installed()
    job = replace(job, path=Path(os.path.abspath(job.path)))
    address = address_of(cluster)
    if address is None or not address.startswith(("http://", "https://")):
        return _drive(job, cluster, address, name=None)
    from launch.ray_jobs import submit

    submit(job, cluster, address)
    if not follow:
        return DONE
    from launch.queued import follow as follow_queued

    return follow_queued(job.path)


def address_of(cluster: RayCluster) -> str | None:
    """Where the cluster is; None for a Ray of our own."""
    address = cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    return None if address == "local" else address


def main() -> int:
    """`python -m launch.ray_train KIND RUN_DIR OPTIONS NAME`, the driver of a submitted job, on the cluster; KIND may be sweep."""
    kind, folder, options, name = sys.argv[1:]
    job = Job(kind, Path(folder), json.loads(options))
    cluster = load_cluster(str(job.path / "cluster.yaml"), [])
    assert isinstance(cluster, RayCluster), "a job is submitted for a Ray cluster"
    with _CopiedOutput(job.path / "job" / f"{name}.out"):
        try:
            if kind == "sweep":
                from launch.ray_sweep import drive_sweep

                return drive_sweep(job, cluster, "auto", name=name)
            return _drive(job, cluster, "auto", name=name)
        except (ValueError, RuntimeError, OSError) as error:
            sys.stderr.write(f"error: {error}\n")
            return BAD_INPUT if isinstance(error, ValueError) else CRASH


def _drive(job: Job, cluster: RayCluster, address: str | None, *, name: str | None) -> int:
    """A run to its end. address: None for a Ray of our own. name: of the job that this driver is."""
    with driver(address, cluster, [job.path]) as wait_seconds:
        return drive_run(job, cluster, name or own_job_id(), wait_seconds=wait_seconds, turns=Turns())


@contextmanager
def driver(address: str | None, cluster: RayCluster, run_dirs: Sequence[Path]) -> Iterator[float]:
    """Be a driver, whose signals ask the runs to stop; gives how long to wait for machines, in seconds. address: None for a Ray of
    our own. Raises: ValueError where that would need several nodes; ConnectionError, RuntimeError in Ray's words."""
    if address is None and cluster.nodes > 1:
        raise ValueError(
            f"cluster.nodes={cluster.nodes}, but no Ray cluster is named and a Ray started here has one node; "
            "set cluster.address or RAY_ADDRESS, or cluster.nodes=1"
        )
    with connected(address, cluster), _StopOnSignal(run_dirs):
        yield _OWN_WAIT_SECONDS if address is None else cluster.wait_for_nodes_minutes * 60


def own_job_id() -> str:
    """Ray's number of this driver."""
    import ray

    return ray.get_runtime_context().get_job_id()


@final
class Turns:
    """Runs of one driver look for machines one after the other: two that looked at the same time would be given the same ones."""

    def __init__(self) -> None:
        self.looking = threading.Lock()
        self.running: set[Path] = set()
        """Runs that have their machines; those that look meanwhile wait for them without a limit."""


def drive_run(job: Job, cluster: RayCluster, job_id: str, *, wait_seconds: float, turns: Turns) -> int:
    """Attempt after attempt, until one ends for good; returns its exit code."""
    first = True
    while True:
        restarts = Restarts.begin(job.path, limit=cluster.max_restarts, first=first)
        end, placed = _attempt(job, cluster, job_id, wait_seconds=wait_seconds, turns=turns)
        decision, why = restarts.decide(end) if placed else ("stop", end.reason)
        log_end(job.path, end, decision, why, job_id=f"ray {job_id}")
        if decision != "again":
            sys.stderr.write(f"halfstep: {job.path.name}: exit code {end.code}: {why}\n")
            return end.code
        sys.stderr.write(f"starting again: {why}\n")
        first = False


def _attempt(job: Job, cluster: RayCluster, job_id: str, *, wait_seconds: float, turns: Turns) -> tuple[End, bool]:
    """One group of Ray workers from start to end: how it ended, and whether it ever had its machines."""
    from launch.ray_nodes import NoMachines, are_leaving, find_nodes

    previous = take_end(job.path)
    job = replace(job, options={**job.options, "previous_end": str(previous) if previous else None})
    refusal, placed = (job.path / "job" / f"{what}_{uuid.uuid4().hex[:8]}" for what in ("refused", "placed"))
    with ExitStack() as turn:
        turn.enter_context(turns.looking)
        limit_seconds = math.inf if turns.running else wait_seconds
        try:
            nodes = find_nodes(cluster, limit_seconds=limit_seconds, is_stopped=lambda: is_stop_requested(job.path))
        except NoMachines as error:
            return _recorded(job.path, End(PEER_LOST, str(error))), False
        if nodes is None:
            return _recorded(job.path, End(CALL_AGAIN, "asked to stop while it waited for machines")), False
        turns.running.add(job.path)
        try:
            end = _train(job, cluster, nodes, job_id, refusal, placed, when_placed=turn.close)
        finally:
            turns.running.discard(job.path)
            placed.unlink(missing_ok=True)
    if refusal.exists():
        reason = refusal.read_text(encoding="utf-8").strip()
        refusal.unlink()
        return End(PEER_LOST, f"refused: {reason}"), True  # exit.json is the other job's
    end = read_end(job.path) or end
    if end.code == CALL_AGAIN and are_leaving(nodes):
        end = replace(end, reason="a node of the run is being taken away (ray drain-node); its ranks committed a checkpoint")
    return _recorded(job.path, end), True


def _recorded(run_dir: Path, end: End) -> End:
    record_end(run_dir, end)
    return end


def _train(
    job: Job, cluster: RayCluster, nodes: list[str], job_id: str, refusal: Path, placed: Path, *, when_placed: Callable[[], None]
) -> End:
    """Ray Train on these nodes; how it ended, as far as Ray knows. when_placed: called once the machines are this run's alone."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    from launch.ray_ends import end_of_error, end_of_result
    from launch.ray_nodes import rank_resources
    from launch.ray_worker import Attempt, Meeting, run_rank

    places = [{"ray.io/node-id": node} for node in nodes for _ in range(cluster.ranks_per_node)]
    trainer = TorchTrainer(
        run_rank,
        train_loop_config={"attempt": Attempt(job, cluster, job_id, refusal, placed, umask=_umask())},
        # No TorchConfig: that would import torch in every worker, whose rank is a process of its own.
        torch_config=cast("TorchConfig", Meeting(cluster)),
        scaling_config=ScalingConfig(
            num_workers=cluster.ranks,
            use_gpu=cluster.gpus_per_rank > 0,
            resources_per_worker=rank_resources(cluster),
            label_selector=places,
        ),
        run_config=RunConfig(
            # A name that was there before would make Ray go on from what it kept of it.
            name=f"attempt_{uuid.uuid4().hex[:8]}",
            storage_path=str(job.path / "job" / "ray"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )
    # In a thread of its own: in the main one, fit() would take SIGINT for itself and end the ranks at once.
    with ThreadPoolExecutor(1, thread_name_prefix="ray-train") as pool:
        running = pool.submit(trainer.fit)
        while not running.done() and not placed.exists():
            wait([running], timeout=_LOOK_SECONDS)
        when_placed()
        error = running.exception()
    return end_of_error(error) if error else end_of_result(running.result())


def _umask() -> int:
    """Of this process; it can only be read by setting it."""
    before = os.umask(0o077)
    os.umask(before)
    return before


@final
class _StopOnSignal:
    """While runs are driven, a signal asks their ranks to commit and end, on whatever nodes they are."""

    def __init__(self, run_dirs: Sequence[Path]) -> None:
        self.run_dirs = run_dirs
        self.received = False

    def __enter__(self) -> None:
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        self.before = {number: signal.signal(number, self._stop) for number in STOP_SIGNALS if number not in ignored}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _: FrameType | None) -> None:
        if not self.received:
            sys.stderr.write(f"\n{signal.Signals(number).name}: stopping after this step\n")
        self.received = True
        for run_dir in self.run_dirs:
            request_stop(run_dir)


@final
@dataclass
class _CopiedOutput:
    """All that this process writes goes into a file of RUN_DIR too: Ray keeps its own log on one machine, as long as that lives."""

    path: Path

    def __enter__(self) -> None:
        self.path.parent.mkdir(mode=0o700, exist_ok=True)
        self.before, self.file = (os.dup(1), os.dup(2)), open(self.path, "ab", buffering=0)
        reading, writing = os.pipe()
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.close(writing)
        self.thread = threading.Thread(target=self._copy, args=(reading,), name="output")
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(self.before, 1):
            os.dup2(descriptor, number)
        self.thread.join()
        self.file.close()

    def _copy(self, reading: int) -> None:
        while text := os.read(reading, 65536):
            os.write(self.before[0], text)
            self.file.write(text)


if __name__ == "__main__":
    sys.exit(main())
