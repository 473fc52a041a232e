"""From the command to the first step, on this machine's own ranks, on a real Slurm and on a real Ray; and where a rank's start goes.

    .venv/bin/python -m benchmarks.launch_overhead [--quick]        about 7 minutes on 2 cores

Run as a module from the repository's root: the clusters are those of tests/cluster."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.measure import machine
from launch.data import pack_faces
from tests.cluster.ray_cluster import ray_pool
from tests.cluster.runs import lines, logged_steps
from tests.cluster.slurm_cluster import Host, Slurm, missing_programs
from tests.distributed.runs import RECIPE
from trainer.config import FacesConfig

RANKS = 2
Clusters = dict[str, tuple[tuple[str, ...], dict[str, str]]]
"""By name: words of the command line, and the environment that finds the cluster."""


def main() -> None:
    """Print a JSON line for each launcher and one for each phase of a rank's start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repeat instead of five")
    repeats = 1 if parser.parse_args().quick else 5
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = pack_faces(FacesConfig(count=96, size=16), folder / "faces")
        clusters: Clusters = {"local": (("--ranks", str(RANKS)), dict(os.environ))}
        slurm = Slurm(folder / "slurm", [Host("n1"), Host("n2")])
        if missing_programs():
            sys.stderr.write(f"no Slurm here: {', '.join(missing_programs())}\n")
        else:
            slurm.start()
            clusters["slurm"] = (("--cluster", "slurm", "cluster.nodes=2", "--follow"), slurm.environment)
        with ray_pool(nodes=2) as pool:
            clusters["ray"] = (("--cluster", "ray", "cluster.nodes=2", f"cluster.address={pool.address}"), pool.environment)
            try:
                _measure(folder, shards, clusters, repeats)
            finally:
                if slurm.environment:
                    slurm.stop()


def _measure(folder: Path, shards: Path, clusters: Clusters, repeats: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in clusters}
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in clusters}
    for repeat in range(repeats):
        for name, (words, environment) in clusters.items():  # turn about: a machine's mood hits all
            run_dir = folder / f"{name}_{repeat}"
            seconds[name].append(first_step_seconds(run_dir, shards, words, environment))
            start_up = lines(run_dir / "attempts.jsonl")[0]["start_up_seconds"]
            assert isinstance(start_up, dict)
            phases[name].append(start_up)
    for name, values in seconds.items():
        _print(f"submit_to_first_step_{name}", values, ranks=RANKS)
    for name, starts in phases.items():
        for phase in starts[0]:
            _print(f"start_up_{name}_{phase}", [start[phase] for start in starts], ranks=RANKS)


def first_step_seconds(run_dir: Path, shards: Path, words: tuple[str, ...], environment: Mapping[str, str]) -> float:
    """Seconds from giving the command until the first step is logged."""
    overrides = ("distill=null", f"data.shards={shards}", "train.steps=6", "logging.sample_every_steps=0")
    command = [sys.executable, "-m", "launch", "train", str(RECIPE), "--run-dir", str(run_dir), *words, *overrides]
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while logged_steps(run_dir) == 0:
        if process.poll() is not None and logged_steps(run_dir) == 0:
            assert process.stderr is not None
            raise RuntimeError(f"{' '.join(command)} ended: {process.stderr.read().decode()}")
        time.sleep(0.01)
    seconds = time.monotonic() - started
    process.communicate()
    return seconds


def _print(name: str, seconds: list[float], *, ranks: int) -> None:
    line = {
        "name": name,
        "seconds": round(statistics.median(seconds), 2),
        "low": round(min(seconds), 2),
        "high": round(max(seconds), 2),
        "repeats": len(seconds),
        "ranks": ranks,
        "machine": machine(),
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
