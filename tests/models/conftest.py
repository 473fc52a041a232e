"""Ranks that have imported everything, and the runs of the twins, made once a session."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.forked_ranks import ForkedRanks
from tests.models.twins import MODULES, Twins


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRanks]:
    """Starts ranks in no time."""
    ranks = ForkedRanks(MODULES, tmp_path_factory.mktemp("forked") / "said.log")
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def twins(forked: ForkedRanks, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """The twins' runs."""
    return Twins(tmp_path_factory.mktemp("twins"), forked)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For what tests write beside the runs."""
    return tmp_path_factory.mktemp("beside")
