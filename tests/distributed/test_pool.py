"""The ranks of a pool work together, say what went wrong, and are replaced after a failure."""

from collections.abc import Callable

import pytest

from tests.distributed.pool import PoolError, RankPool

pytestmark = pytest.mark.distributed

PoolOf = Callable[[int], RankPool]
JOBS = "tests.distributed.jobs"


def test_ranks_answer_in_their_order_and_live_on(pool: PoolOf) -> None:
    first = pool(2).run(f"{JOBS}:sum_over_ranks", {"value": 1.5})
    pids = [process.pid for process in pool(2).processes]
    again = pool(2).run(f"{JOBS}:sum_over_ranks", {"value": 2.0})
    assert (first, again) == ([[0, 3.0], [1, 3.0]], [[0, 4.0], [1, 4.0]])
    assert [process.pid for process in pool(2).processes] == pids


def test_a_rank_that_raises_is_quoted_and_the_next_job_has_new_ranks(pool: PoolOf) -> None:
    with pytest.raises(PoolError, match=r"ValueError: rank 1 does not like 7"):
        pool(2).run(f"{JOBS}:raise_on_rank_1", {"value": 7})
    assert pool(2).processes == []
    assert pool(2).run(f"{JOBS}:sum_over_ranks", {"value": 1.0}) == [[0, 2.0], [1, 2.0]]


def test_a_rank_that_is_late_is_named_and_killed(pool: PoolOf) -> None:
    pool(2).run(f"{JOBS}:sum_over_ranks", {"value": 1.0})
    processes = list(pool(2).processes)
    with pytest.raises(PoolError, match=r"no answer of ranks \[0\] within 1 s"):
        pool(2).run(f"{JOBS}:wait_on_rank_0", {}, limit_seconds=1.0)
    assert [process.poll() for process in processes] == [-9, -9]


def test_only_functions_of_the_tests_are_run(pool: PoolOf) -> None:
    with pytest.raises(AssertionError, match="the tests only"):
        pool(2).run("os:system", {"command": "true"})
