"""A real Slurm and the undisturbed runs that every other run is compared with, made once a session."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.runs import Reference, local_run
from tests.cluster.slurm_cluster import PACKAGES, Host, Slurm, missing_programs


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes on this host, partitions low and high; preemption sends TERM, and the job's own signal where a test asks for it."""
    if missing := missing_programs():
        pytest.skip(f"NO SLURM HERE: {', '.join(missing)} not found; apt-get install {' '.join(PACKAGES)}")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"), [Host("n1"), Host("n2")])
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The faces that all runs learn."""
    from launch.data import pack_faces
    from tests.distributed.runs import RECIPE
    from trainer.config_io import load_recipe

    faces = load_recipe(RECIPE, []).data.faces
    assert faces is not None
    return pack_faces(faces, tmp_path_factory.mktemp("faces"))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Reference:
    """A function of ranks and overrides: the run that nothing happens to, on this machine, without any cluster."""
    return Reference(tmp_path_factory.mktemp("undisturbed"), shards, local_run)
