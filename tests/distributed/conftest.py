"""Reference runs and ranks, made once a session."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.grid import Grid
from tests.distributed.pool import Pools, RankPool
from tests.distributed.runs import run


def _reference(factory: pytest.TempPathFactory, ranks: int) -> Path:
    run_dir = factory.mktemp(f"reference_{ranks}_ranks") / "run"
    finished = run("distill", run_dir, ranks=ranks)
    assert finished.returncode == 0, finished.stderr
    return run_dir


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test's chain, undisturbed, on 1 rank."""
    return _reference(tmp_path_factory, 1)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test's chain, undisturbed, on 2 ranks."""
    return _reference(tmp_path_factory, 2)


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test's chain, undisturbed, on 4 ranks."""
    return _reference(tmp_path_factory, 4)


@pytest.fixture(scope="session")
def _pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    pools = Pools(logs=tmp_path_factory.mktemp("pools"))
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def pool(_pools: Pools) -> Callable[[int], RankPool]:
    """A function: the session's pool of so many ranks; its ranks start with its first job."""
    return _pools.of


@pytest.fixture(scope="session")
def grid(_pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """The runs of objectives, engines and ranks, each made when it is first asked for."""
    return Grid(tmp_path_factory.mktemp("grid"), _pools)
