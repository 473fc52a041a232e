"""What tests of launchers share."""

from pathlib import Path

import pytest

from tests.launch.slurm_on_path import SlurmOnPath


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmOnPath:
    """Slurm's commands as scripts that say what the test tells them to."""
    return SlurmOnPath.install(tmp_path / "slurm on path", monkeypatch)
