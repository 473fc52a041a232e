"""What must never be seen: a token in a command line, a job script, a log or a checkpoint; a port that others reach; modules that a step
does not need."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.listening import listening
from tests.cluster.runs import Reference, SlurmRun
from tests.cluster.slurm_cluster import Slurm, rank_pids

pytestmark = pytest.mark.distributed

TOKEN = "hf_" + "x7Kq" * 8
_TORCH_FREE = {"torch", "ray", "submitit", "diffusers", "transformers", "numpy", "tensorboard"}


def test_on_one_host_ranks_listen_on_loopback_alone_and_no_token_is_written_anywhere(
    slurm: Slurm, undisturbed: Reference, tmp_path: Path
) -> None:
    environment = {**slurm.environment, "HF_TOKEN": TOKEN}
    cluster = Slurm(slurm.root, slurm.hosts, environment=environment)
    endless = ("train.steps=100000", "checkpoint.every_steps=5", "logging.sample_every_steps=0")
    run = SlurmRun.submit(
        cluster, tmp_path / "run", f"data.shards={undisturbed.shards}", "cluster.nodes=2", "cluster.exclusive=true", *endless
    )
    run.wait_for_step(8)
    pids = rank_pids(run.run_dir)
    assert len(pids) == 2
    heard = listening(pids)
    assert heard and set().union(*heard.values()) <= {"127.0.0.1"}, heard
    assert len(command_lines := _command_lines()) > 10 and all(TOKEN.encode() not in words for words in command_lines)
    assert any(TOKEN.encode() in Path(f"/proc/{pid}/environ").read_bytes() for pid in pids), "the ranks have it"
    slurm.run("scancel", run.job_id)
    run.wait_for("CANCELLED")
    found = [path for path in run.run_dir.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not found
    assert (run.run_dir / "job" / "train.sbatch").exists() and list(run.run_dir.glob("checkpoints/step_*/*.safetensors"))


@pytest.mark.parametrize(
    "module",
    ["launch.start", "launch.slurm", "launch.slurm_job", "launch.slurm_rank", "launch.queued", "launch.status", "launch.ray_train"],
)
def test_what_runs_beside_the_ranks_imports_nothing_heavy(module: str) -> None:
    """Each of these runs on login nodes, in batch steps, or in every Ray worker."""
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & {_TORCH_FREE!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def _command_lines() -> list[bytes]:
    """Of every process of this machine; one that ends meanwhile is left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes())
    return found
