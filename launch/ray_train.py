"""Ray: a rank in each worker of a Ray Train group, started again by this driver as often as the cluster file allows."""

import json
import os
import re
import signal
import sys
import threading
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, cast, final

from launch.cluster import RayCluster, load_cluster
from launch.ends import End, Restarts, log_end, read_end, record_end, take_end
from launch.job import Job
from launch.ray_connect import check_installed, connected
from launch.run_lock import locked
from trainer.exit_codes import BAD_INPUT, CALL_AGAIN, CRASH, DATA_BUDGET, DONE, IO_ERROR, NUMERIC, PEER_LOST
from trainer.stop import STOP_SIGNALS, is_stop_requested, request_stop

if TYPE_CHECKING:
    from ray.train import Result
    from ray.train.torch import TorchConfig

_KNOWN = frozenset({BAD_INPUT, DATA_BUDGET, NUMERIC, PEER_LOST, IO_ERROR})
_OWN_WAIT_SECONDS = 30.0
"""For room on a Ray of our own, which does not grow."""


def run_on_ray(job: Job, cluster: RayCluster, *, follow: bool) -> int:
    """Run a job on Ray and return its exit code; one that is submitted over http is queued (0), or followed.

    Raises: ValueError for an address that cannot be used; RuntimeError, ConnectionError in Ray's words."""
    check_installed()
    job = replace(job, path=Path(os.path.abspath(job.path)))
    address = cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    if not address.startswith(("http://", "https://")):
        return _drive(job, cluster, None if address == "local" else address, name=None)
    from launch.ray_jobs import submit

    submit(job, cluster, address)
    if not follow:
        return DONE
    from launch.queued import follow as follow_queued

    return follow_queued(job.path)


def main() -> int:
    """`python -m launch.ray_train KIND RUN_DIR OPTIONS NAME`, the driver of a submitted job, on the cluster."""
    kind, folder, options, name = sys.argv[1:]
    job = Job(kind, Path(folder), json.loads(options))
    cluster = load_cluster(str(job.path / "cluster.yaml"), [])
    assert isinstance(cluster, RayCluster), "a job is submitted for a Ray cluster"
    with _CopiedOutput(job.path / "job" / f"{name}.out"), locked(job.path):
        return _drive(job, cluster, "auto", name=name)


def _drive(job: Job, cluster: RayCluster, address: str | None, *, name: str | None) -> int:
    """Attempt after attempt, until one ends for good. address: None for a Ray of our own. name: of the job that this driver is."""
    if address is None and cluster.nodes > 1:
        raise ValueError(
            f"cluster.nodes={cluster.nodes}, but no Ray cluster is named and a Ray started here has one node; "
            "set cluster.address or RAY_ADDRESS, or cluster.nodes=1"
        )
    wait_seconds = _OWN_WAIT_SECONDS if address is None else cluster.wait_for_nodes_minutes * 60
    with connected(address, cluster), _StopOnSignal(job.path):
        import ray

        job_id = f"ray {name or ray.get_runtime_context().get_job_id()}"
        first = True
        while True:
            restarts = Restarts.begin(job.path, limit=cluster.max_restarts, first=first)
            end, placed = _attempt(job, cluster, wait_seconds=wait_seconds)
            decision, why = restarts.decide(end) if placed else ("stop", end.reason)
            log_end(job.path, end, decision, why, job_id=job_id)
            if decision != "again":
                sys.stderr.write(f"halfstep: exit code {end.code}: {why}\n")
                return end.code
            sys.stderr.write(f"starting again: {why}\n")
            first = False


def _attempt(job: Job, cluster: RayCluster, *, wait_seconds: float) -> tuple[End, bool]:
    """One group of Ray workers from start to end: how it ended, and whether it ever had its machines."""
    from launch.ray_nodes import NoMachines, find_nodes

    previous = take_end(job.path)
    job = replace(job, options={**job.options, "previous_end": str(previous) if previous else None})
    refusal = job.path / "job" / f"refused_{uuid.uuid4().hex[:8]}"
    try:
        nodes = find_nodes(cluster, limit_seconds=wait_seconds, is_stopped=lambda: is_stop_requested(job.path))
    except NoMachines as error:
        end, placed = End(PEER_LOST, str(error)), False
    else:
        placed = nodes is not None
        end = _train(job, cluster, nodes, refusal) if nodes else End(CALL_AGAIN, "asked to stop while it waited for machines")
    if refusal.exists():
        reason = refusal.read_text(encoding="utf-8").strip()
        refusal.unlink()
        return End(PEER_LOST, f"refused: {reason}"), placed
    end = read_end(job.path) or end
    record_end(job.path, end)
    return end, placed


def _train(job: Job, cluster: RayCluster, nodes: list[str], refusal: Path) -> End:
    """Ray Train on these nodes; how it ended, as far as Ray knows."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    from launch.ray_nodes import rank_resources
    from launch.ray_worker import Attempt, Meeting, run_rank

    places = [{"ray.io/node-id": node} for node in nodes for _ in range(cluster.ranks_per_node)]
    trainer = TorchTrainer(
        run_rank,
        train_loop_config={"attempt": Attempt(job, cluster, refusal, umask=_umask())},
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
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    # In a thread of its own: in the main one, fit() would take SIGINT for itself and end the ranks at once.
    with ThreadPoolExecutor(1, thread_name_prefix="ray-train") as pool:
        running = pool.submit(trainer.fit)
        error = running.exception()
    return _end_of_error(error) if error else _end_of_result(running.result())


def _umask() -> int:
    """Of this process; it can only be read by setting it."""
    before = os.umask(0o077)
    os.umask(before)
    return before


def _end_of_result(result: "Result") -> End:
    if result.return_value == DONE:
        return End(DONE, "done")
    return End(CALL_AGAIN, "asked to stop; the same command goes on from the checkpoint")


def _end_of_error(error: BaseException) -> End:
    from ray.train import TrainingFailedError
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    match error:
        case WorkerGroupError():
            return _end_of_workers(error.worker_failures)
        case ControllerError():
            return End(PEER_LOST, f"Ray could not start the ranks: {error.controller_failure}")
        case TrainingFailedError():
            return End(PEER_LOST, f"Ray ended the ranks: {error}")
        case _:
            return End(PEER_LOST, f"Ray ended the ranks: {_last_line(str(error))}")


def _end_of_workers(failures: Mapping[int, Exception]) -> End:
    """The first cause: a rank that ended by itself, else one whose worker or node is gone, else one that lost its peers."""
    from launch.ray_worker import RankFailed

    ended = {rank: failure for rank, failure in failures.items() if isinstance(failure, RankFailed)}
    lost = {rank: failure for rank, failure in failures.items() if rank not in ended}
    for rank, failure in ended.items():
        if failure.code != PEER_LOST:
            return _end_of_rank(rank, failure.node, failure.code)
    for rank, failure in lost.items():
        return End(PEER_LOST, _lost(rank, str(failure)), rank)
    rank, failure = next(iter(ended.items()))
    return End(PEER_LOST, f"rank {rank} on {failure.node} lost the other ranks", rank)


def _end_of_rank(rank: int, node: str, code: int) -> End:
    if code >= 0:
        return End(code if code in _KNOWN else CRASH, f"rank {rank} on {node} ended with exit code {code}; see logs/", rank)
    text = f"rank {rank} on {node} was killed by {signal.Signals(-code).name}"
    if -code == signal.SIGKILL:
        text += " (by the kernel, if memory ran out: cluster.memory_gib_per_rank, or a smaller data.micro_batch_size)"
    return End(PEER_LOST, text, rank)


def _lost(rank: int, text: str) -> str:
    """What Ray says of a worker that is gone, in a line."""
    node = re.search(r"^\s*ip: (\S+)", text, re.MULTILINE)
    return f"rank {rank}{f' on {node[1]}' if node else ''} was lost: {_last_line(text)}"


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")


@final
class _StopOnSignal:
    """While a run is driven, a signal asks its ranks to commit and end, on whatever nodes they are."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
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
        request_stop(self.run_dir)


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
    try:
        sys.exit(main())
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(BAD_INPUT)
