"""How a group of Ray workers ended, in halfstep's words and exit codes."""

import re
import signal
from collections.abc import Mapping

from ray.train import Result
from ray.train.v2._internal.exceptions import RayTrainError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from launch.ends import End
from launch.ray_worker import RankFailed
from trainer.exit_codes import BAD_INPUT, CALL_AGAIN, CRASH, DATA_BUDGET, DONE, IO_ERROR, NUMERIC, PEER_LOST

_KNOWN = frozenset({BAD_INPUT, DATA_BUDGET, NUMERIC, PEER_LOST, IO_ERROR})
_ALONE = "lost the other ranks"
_LOST = {
    "NODE_OUT_OF_MEMORY": "Ray ended it because its node ran out of memory; set cluster.memory_gib_per_rank, or a smaller micro-batch",
    "node has died": "its node is gone",
    "node was terminated": "its node is gone",
    "worker process has died": "its Ray worker was killed or crashed",
    "is unavailable": "its Ray worker answers no more",
}
"""What Ray's paragraphs about a dead worker come down to."""


def end_of_result(result: Result) -> End:
    """Of a group of which no worker failed."""
    if result.return_value == DONE:
        return End(DONE, "done")
    return End(CALL_AGAIN, "asked to stop; the same command goes on from the checkpoint")


def end_of_error(error: BaseException) -> End:
    """Of a group that Ray has ended; the first cause, where Ray saw several."""
    match error:
        case WorkerGroupError():
            return _end_of_workers(error.worker_failures)
        case ControllerError(controller_failure=ValueError() as failure):
            return End(BAD_INPUT, _last_line(str(failure)).removeprefix("ValueError: "))
        case ControllerError():
            return End(PEER_LOST, f"Ray could not start the ranks: {_last_line(str(error.controller_failure))}")
        case _:
            return End(PEER_LOST, f"Ray ended the ranks: {_last_line(str(error))}")


def _end_of_workers(failures: Mapping[int, Exception]) -> End:
    """A rank that ended by itself, else one whose worker or node is gone, else one that lost its peers."""
    ends = [_end_of_worker(rank, failure) for rank, failure in failures.items()]
    return min(ends, key=lambda end: (end.code == PEER_LOST, end.reason.endswith(_ALONE)))


def _end_of_worker(rank: int, failure: Exception) -> End:
    match failure:
        case RankFailed() if failure.code == PEER_LOST:
            return End(PEER_LOST, f"rank {rank} on {failure.node} {_ALONE}", rank)
        case RankFailed():
            return _end_of_rank(rank, failure.node, failure.code)
        case RayTrainError():
            return End(PEER_LOST, _lost(rank, str(failure)), rank)
        case ValueError():
            return End(BAD_INPUT, f"rank {rank}: {failure}", rank)
        case _:
            return End(CRASH, f"rank {rank}: {type(failure).__name__}: {failure}", rank)


def _end_of_rank(rank: int, node: str, code: int) -> End:
    if code >= 0:
        return End(code if code in _KNOWN else CRASH, f"rank {rank} on {node} ended with exit code {code}; see logs/", rank)
    text = f"rank {rank} on {node} was killed by {signal.Signals(-code).name}"
    if -code == signal.SIGKILL:
        text += " (by the kernel, if memory ran out: see dmesg)"
    return End(PEER_LOST, text, rank)


def _lost(rank: int, text: str) -> str:
    """What Ray says of a worker that is gone, in a line."""
    node = re.search(r"^\s*ip: (\S+)|ipv4:([\d.]+)", text, re.MULTILINE)
    what = next((ours for words, ours in _LOST.items() if words in text), _last_line(text))
    return f"rank {rank}{f' on {node[1] or node[2]}' if node else ''} was lost: {what}"


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")
