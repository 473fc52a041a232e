"""Faces with captions in shards, and tiny bases."""

from pathlib import Path

import pytest

from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from tests.trainer.latents.finished_runs import Bases
from tests.trainer.tasks.latent_steps import SIDE


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """A function (kind): the folder of a tiny base."""
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 16 captioned faces."""
    folder = tmp_path_factory.mktemp("faces") / "shards"
    pack(FacesSource("open-peeps", 16), folder, size=SIDE, workers=1)
    return folder
