"""Reference runs, made once a session."""

from pathlib import Path

import pytest

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
