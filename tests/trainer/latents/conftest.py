"""Tiny bases that the tests of latent models share."""

import pytest

from tests.trainer.latents.finished_runs import Bases


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """A function (kind): the folder of a tiny base."""
    return Bases(tmp_path_factory.mktemp("bases"))
