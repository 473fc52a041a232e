"""Ranks for runs that are killed again and again: forked from a process that has imported everything, which takes 10 seconds, once."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import final

from launch.cluster import LocalCluster
from launch.place import Place
from launch.rank_env import rank_environment

_START_SECONDS = 240.0


@final
class ForkedRanks:
    """Starts `launch.worker` with a run of some kind on ranks of this machine, as often as asked to."""

    def __init__(self, modules: list[str], log: Path) -> None:
        """modules: imported once, before any rank is; log: for what ranks say."""
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.forked_ranks", *modules],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        assert self._answer() == "ready", log.read_text()

    def start(self, kind: str, run_dir: Path, *, ranks: int, options: Mapping[str, object] | None = None) -> list[int]:
        """Process ids of an attempt's ranks, by rank; they are running now. options: of the job, JSON values."""
        (run_dir / "exit.json").unlink(missing_ok=True)
        self._ask({"kind": kind, "run_dir": str(run_dir), "ranks": ranks, "options": dict(options or {})})
        pids = self._answer()
        assert isinstance(pids, list)
        return pids

    def wait(self) -> list[int]:
        """Exit codes of the attempt's ranks by rank, negative for a signal."""
        codes = self._answer()
        assert isinstance(codes, list)
        return codes

    def close(self) -> None:
        """End the process that forks."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(_START_SECONDS)

    def _ask(self, question: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        self._process.stdin.flush()

    def _answer(self) -> object:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks ranks has ended"
        return json.loads(line)


def main() -> None:
    """Import, then fork the ranks of each attempt that a line of stdin asks for."""
    for module in sys.argv[1:]:
        __import__(module)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        with socket.create_server(("127.0.0.1", 0), backlog=16) as listening:
            pids = [_fork(asked, rank, listening) for rank in range(asked["ranks"])]
        print(json.dumps(pids), file=answers, flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), file=answers, flush=True)


def _fork(asked: dict[str, object], rank: int, listening: socket.socket) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the questions are the parent's
    ranks = asked["ranks"]
    assert isinstance(ranks, int)
    place = Place(rank, rank, ranks, ranks, "127.0.0.1", listening.getsockname()[1])
    os.environ.update(rank_environment(dict(os.environ), place, LocalCluster(kind="local"), launcher="local", interface="lo"))
    if rank == 0 and ranks > 1:
        os.environ["HALFSTEP_STORE_FD"] = str(os.dup(listening.fileno()))
    listening.close()
    import torch

    from launch import worker

    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, ())
    sys.argv = ["worker", str(asked["kind"]), str(asked["run_dir"]), json.dumps(asked["options"])]
    worker.main()
    raise AssertionError("the worker ends its process itself")


if __name__ == "__main__":
    main()
