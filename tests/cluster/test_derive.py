"""Captions made on a real Slurm and a real Ray are those of this machine, byte for byte, also when the nodes are taken away."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from tests.cluster.ray_cluster import RayPool, ray_pool
from tests.cluster.runs import SlurmRun, halfstep, preempt
from tests.cluster.slurm_cluster import Slurm
from tests.derive_runs import files, ledger
from tests.tiny_models import tiny_blip

pytestmark = [pytest.mark.distributed, pytest.mark.cluster]

_BATCH = 2


@pytest.fixture(scope="module")
def pool() -> Iterator[RayPool]:
    with ray_pool(nodes=2) as found:
        yield found


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The command without --out: 600 faces in 12 shards and a captioner."""
    root = tmp_path_factory.mktemp("captions")
    pack(FacesSource("open-peeps", 600), root / "faces", size=32, samples_per_shard=50)
    tiny_blip(root / "blip")
    options = ("--batch-size", str(_BATCH), "--max-new-tokens", "24", "--precision", "fp32")
    return ("shards", "caption", str(root / "faces"), "--model", str(root / "blip"), *options)


@pytest.fixture(scope="module")
def here(words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on one rank of this machine."""
    out = tmp_path_factory.mktemp("here") / "out"
    done = halfstep(*words, "--out", out, "--ranks", "1")
    assert done.returncode == 0, done.stderr
    return out


def test_a_captioner_on_slurm_comes_back_after_a_preemption(slurm: Slurm, words: tuple[str, ...], here: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = (*words, "--out", str(out), "--cluster", "slurm", "cluster.nodes=2", "cluster.exclusive=true")
    run = SlurmRun(slurm, out / "run", command)
    queued = run.again()
    assert queued.returncode == 0 and "queued as job" in queued.stderr, queued.stderr
    slurm.wait_until(run.job_id, lambda: len(ledger(out / "run")) >= 20, "20 batches")
    status = halfstep("status", out / "run", "--json", environment=slurm.environment)
    assert json.loads(status.stdout)["state"] == "running", status.stdout
    preempt(slurm, run)
    run.finish()
    assert [end["decision"] for end in run.ends()] == ["again", "done"]
    assert files(out) == files(here)
    assert 300 - 2 <= len(ledger(out / "run")) <= 300
    again = run.again("--sheet", str(tmp_path / "sheet.png"))
    assert again.returncode == 0 and "600 samples in 12 shards" in again.stdout and (tmp_path / "sheet.png").exists()


def test_a_captioner_on_ray_does_what_local_ranks_do(pool: RayPool, words: tuple[str, ...], here: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cluster = ("--cluster", "ray", f"cluster.address={pool.address}", "cluster.nodes=2")
    done = halfstep(*words, "--out", out, *cluster, environment=pool.environment)
    assert done.returncode == 0, done.stderr + done.stdout
    assert files(out) == files(here) and len(ledger(out / "run")) == 300
    assert len(list((out / "run" / "ledger").glob("rank_*.jsonl"))) == 2
