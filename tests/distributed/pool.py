"""Ranks that stay alive between test cases: to import torch and DeepSpeed takes each about 8 seconds of a core."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import final

from launch.cluster import LocalCluster
from launch.place import Place
from launch.rank_env import rank_environment

ROOT = Path(__file__).parents[2]
_START_SECONDS = 180.0
_OTHERS_SECONDS = 5.0
"""How long the other ranks may still answer when one has failed: the cause is often another rank's."""
_CLOSE_SECONDS = 20.0
_LOG_TAIL_BYTES = 4000


class PoolError(RuntimeError):
    """A job failed or took too long; the message holds what the ranks said."""


@final
class RankPool:
    """Ranks on this machine, on gloo and the CPU, that run jobs together, one after the other.

    They start with the first job, and anew with the first one after a failure: their collectives are out of step then."""

    def __init__(self, ranks: int, *, logs: Path) -> None:
        """logs: folder for what the ranks write to stdout and stderr."""
        self.ranks, self.logs = ranks, logs
        self.processes: list[subprocess.Popen[bytes]] = []
        self.answers: list[int] = []

    def run(self, job: str, arguments: Mapping[str, object], *, limit_seconds: float = 120.0) -> list[object]:
        """Call `job`, a "module:function" of the tests, on all ranks; returns their answers in rank order.

        arguments: the function's, by name; they and the answers are JSON values.
        Raises: PoolError if a rank raises, dies or does not answer within `limit_seconds`."""
        assert job.startswith("tests."), f"a pool runs functions of the tests only, not {job}"
        if not self.processes:
            self._start()
        line = json.dumps({"job": job, "arguments": dict(arguments)}).encode() + b"\n"
        for process in self.processes:
            assert process.stdin is not None
            # A dead rank's pipe is broken; that it is dead shows when it is asked for its answer.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(line)
                process.stdin.flush()
        return self._collect(job, limit_seconds)

    def close(self) -> None:
        """End the ranks: they leave when their stdin ends, or are killed."""
        for process in self.processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self._kill()

    def _start(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        with socket.create_server(("127.0.0.1", 0), backlog=max(16, self.ranks)) as listening:
            for rank in range(self.ranks):
                self._start_rank(rank, listening)
        self._collect("the start", _START_SECONDS)

    def _start_rank(self, rank: int, listening: socket.socket) -> None:
        reading, writing = os.pipe()
        environment = rank_environment(
            {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
                "CUDA_VISIBLE_DEVICES": "",  # the pool is about engines on the CPU, also where there is a GPU
                "DS_ACCELERATOR": "cpu",
                "HALFSTEP_ANSWERS_FD": str(writing),
            },
            Place(rank, rank, self.ranks, self.ranks, "127.0.0.1", listening.getsockname()[1]),
            LocalCluster(),
            launcher="pool",
            interface="lo",
        )
        passed = [writing]
        if rank == 0 and self.ranks > 1:
            passed.append(listening.fileno())
            environment["HALFSTEP_STORE_FD"] = str(listening.fileno())
        command = [sys.executable, "-m", "tests.distributed.rank_server"]
        with open(self._log(rank), "ab") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=passed, stdin=subprocess.PIPE, stdout=log, stderr=log)
        os.close(writing)
        self.processes.append(process)
        self.answers.append(reading)

    def _collect(self, job: str, limit_seconds: float) -> list[object]:
        """One answer of each rank, a JSON line; all ranks are killed if one has none to give."""
        deadline = time.monotonic() + limit_seconds
        received = dict.fromkeys(self.answers, b"")
        waiting, troubles = set(self.answers), []
        while waiting:
            poller = select.poll()
            for descriptor in waiting:
                poller.register(descriptor, select.POLLIN)
            ready = poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not ready:
                late = sorted(self.answers.index(descriptor) for descriptor in waiting)
                troubles.append(f"no answer of ranks {late} within {limit_seconds:.0f} s")
                break
            for descriptor, _ in ready:
                content = os.read(descriptor, 65536)
                received[descriptor] += content
                if content and not content.endswith(b"\n"):
                    continue
                waiting.discard(descriptor)
                trouble = f"rank {self.answers.index(descriptor)} died" if not content else _error(received[descriptor])
                if trouble:
                    troubles.append(trouble)
                    deadline = min(deadline, time.monotonic() + _OTHERS_SECONDS)
        if troubles:
            self._kill()
            raise PoolError("\n".join([f"{job} failed on {self.ranks} ranks:", *troubles, *map(self._tail, range(self.ranks))]))
        return [json.loads(received[descriptor])["value"] for descriptor in self.answers]

    def _kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for descriptor in self.answers:
            os.close(descriptor)
        self.processes, self.answers = [], []

    def _log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}_of_{self.ranks}.log"

    def _tail(self, rank: int) -> str:
        path = self._log(rank)
        return f"the end of {path}:\n{path.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors='replace')}"


@final
class Pools:
    """A pool for each number of ranks, all of them ended together."""

    def __init__(self, *, logs: Path) -> None:
        self.logs = logs
        self.pools: dict[int, RankPool] = {}

    def of(self, ranks: int) -> RankPool:
        """The pool of so many ranks."""
        return self.pools.setdefault(ranks, RankPool(ranks, logs=self.logs))

    def close(self) -> None:
        """End every rank."""
        for pool in self.pools.values():
            pool.close()


def _error(line: bytes) -> str | None:
    """The traceback in a rank's answer; None if it has a value."""
    return json.loads(line).get("error")
