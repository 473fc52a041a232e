"""What Ray says of a group that has ended becomes one exit code and one line."""

import pickle

import pytest
from ray.exceptions import ActorUnavailableError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from launch.ray_ends import end_of_error
from launch.ray_worker import RankFailed
from trainer.exit_codes import BAD_INPUT, CRASH, NUMERIC, PEER_LOST

_ALONE = RankFailed(0, "10.0.0.1", PEER_LOST)
_DEAD = "The actor died unexpectedly before finishing.\n\tpid: 7\n\tip: 10.0.0.2\nThe actor died because its node has died. Node Id: 4f"


@pytest.mark.parametrize(
    ("failures", "code", "reason"),
    [
        ({0: _ALONE, 1: RankFailed(1, "10.0.0.2", -9)}, PEER_LOST, "rank 1 on 10.0.0.2 was killed by SIGKILL (by the kernel"),
        ({0: _ALONE, 1: RankFailed(1, "10.0.0.2", NUMERIC)}, NUMERIC, "rank 1 on 10.0.0.2 ended with exit code 66; see logs/"),
        ({0: _ALONE, 1: RankFailed(1, "10.0.0.2", 3)}, CRASH, "rank 1 on 10.0.0.2 ended with exit code 3; see logs/"),
        ({0: _ALONE}, PEER_LOST, "rank 0 on 10.0.0.1 lost the other ranks"),
        (
            {0: _ALONE, 1: WorkerHealthCheckFailedError("A worker health check failed.", Exception(_DEAD))},
            PEER_LOST,
            "rank 1 on 10.0.0.2 was lost: its node is gone",
        ),
        (
            {1: WorkerHealthCheckFailedError("failed", ActorUnavailableError("to connect to ipv4:10.0.0.3:18205", b"\0" * 16))},
            PEER_LOST,
            "rank 1 on 10.0.0.3 was lost: its Ray worker answers no more",
        ),
        ({1: ValueError("node-7 has no interface 'ib9'")}, BAD_INPUT, "rank 1: node-7 has no interface 'ib9'"),
    ],
)
def test_the_first_cause_is_named(failures: dict[int, Exception], code: int, reason: str) -> None:
    end = end_of_error(WorkerGroupError("", failures))
    assert end.code == code and end.reason.startswith(reason), end


def test_a_group_that_could_not_start_is_called_again_unless_the_cluster_file_is_wrong() -> None:
    end = end_of_error(ControllerError(WorkerGroupStartupTimeoutError(4)))
    assert end.code == PEER_LOST and end.reason.startswith("Ray could not start the ranks: "), end
    end = end_of_error(ControllerError(ValueError("ray::execute() (ip=10.0.0.1)\nValueError: node-7 has no interface 'ib9'")))
    assert (end.code, end.reason) == (BAD_INPUT, "node-7 has no interface 'ib9'")


def test_a_failure_travels_between_processes() -> None:
    failure = pickle.loads(pickle.dumps(RankFailed(3, "10.0.0.1", -11)))  # noqa: S301 - our own bytes
    assert (failure.rank, failure.node, failure.code) == (3, "10.0.0.1", -11)
