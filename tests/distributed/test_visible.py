"""Ranks whose hosts do not share RUN_DIR find out together, before the first step, and say which host it is."""

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.cluster import LocalCluster
from launch.job import Job
from launch.network import LOOPBACK, reserve_port
from launch.place import Place
from launch.rank_env import rank_environment

pytestmark = pytest.mark.distributed

_PORTS = (23100, 23999)
_TIMEOUT_SECONDS = 8.0
"""Of a collective: a token may take half of it to appear."""
_LIMIT_SECONDS = 120.0


@pytest.fixture(scope="module", autouse=True)
def _may_unshare() -> None:
    """A rank sees another folder where the others have theirs: in a mount namespace of its own, as on another host."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare --mount is not permitted here")


@contextmanager
def _two_ranks(run_dir: Path, *, on_the_second_host: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks of a run as on two hosts, which differ by what a shell did before the second one's rank."""
    with reserve_port(LOOPBACK, _PORTS, start=os.getpid()) as reserved:
        ranks = []
        for rank in range(2):
            place = Place(rank, 0, 1, 2, LOOPBACK, reserved.getsockname()[1])
            cluster = LocalCluster(collective_timeout_seconds=_TIMEOUT_SECONDS)
            words = Job("train", run_dir, {}).command(sys.executable)
            if rank == 1:
                words = ["unshare", "--mount", "sh", "-ec", f"{on_the_second_host}\nexec {shlex.join(words)}"]
            environment = rank_environment(os.environ, place, cluster, launcher="test", interface="lo")
            ranks.append(subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        try:
            yield ranks
        finally:
            for process in ranks:
                process.kill()
                process.communicate()


@pytest.mark.parametrize(
    ("on_the_second_host", "what"),
    [
        ("mount -t tmpfs none {run_dir}", "rank 1 on {host} sees no run there"),
        (
            "mount -t tmpfs none {run_dir}; touch {run_dir}/recipe.yaml",
            "rank 1 on {host} sees another folder: the file that rank 0 on {host} wrote is not there",
        ),
        ("mount -t tmpfs none {parent}", "rank 1 on {host} sees no such folder"),
    ],
    ids=["empty", "another_run", "no_folder"],
)
def test_all_ranks_end_with_64_and_name_the_host_that_sees_another_folder(tmp_path: Path, on_the_second_host: str, what: str) -> None:
    run_dir = tmp_path / "shared" / "run"
    (run_dir / "heartbeats").mkdir(parents=True)
    (run_dir / "recipe.yaml").touch()
    mount = on_the_second_host.format(run_dir=run_dir, parent=run_dir.parent)
    with _two_ranks(run_dir, on_the_second_host=mount) as ranks:
        said = [process.communicate(timeout=_LIMIT_SECONDS)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [64, 64], said
    wanted = f"{run_dir}: {what.format(host=socket.gethostname())}; the run's folder must lie on a file system that every node mounts"
    assert all(wanted in text for text in said), said
    record = json.loads((run_dir / "exit.json").read_text())
    assert record["code"] == 64 and wanted in record["reason"]
    assert [path.name for path in (run_dir / "heartbeats").glob("token_*")] == []
    assert not (run_dir / "lease.json").exists()
