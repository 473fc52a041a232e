"""What the benchmarks against diffusers' example scripts share: pictures for both sides, ranks that are clocked, lines of the result.

Both sides run on two CPU ranks of one thread, turn about. A clock hooked to torch's optimizers notes when each step of rank 0 ends, in
wall seconds and in CPU seconds of its process."""

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import yaml
from measure import print_ratio
from PIL import Image

from data_shards.sources.faces import FacesSource
from launch.cluster import LocalCluster
from launch.data import pack_faces
from launch.place import Place
from launch.rank_env import cluster_variables, interface_variables
from trainer.config import FacesConfig

HERE = Path(__file__).parent
RANKS = 2
WARM_UP_STEPS = 3
Recipe = dict[str, dict[str, object]]


@final
@dataclass(frozen=True)
class Speed:
    """Median seconds of a step, of the wall clock and of rank 0's processor time."""

    wall: float
    cpu: float


@final
@dataclass(frozen=True)
class Bench:
    """A folder for all that is made, and a checkout of diffusers with examples/."""

    folder: Path
    diffusers: Path

    @property
    def pictures(self) -> Path:
        """Its train/ holds PNG files, metadata.jsonl beside it their captions."""
        return self.folder / "pictures"

    @property
    def shards(self) -> Path:
        """The same pictures, packed."""
        return self.folder / "shards"

    def write_pictures(self, count: int, side: int) -> None:
        """Faces, as files and as shards."""
        (self.pictures / "train").mkdir(parents=True)
        source, lines = FacesSource("open-peeps", count), []
        for number in range(count):
            row = source.row(number, side)
            assert isinstance(row.image, Image.Image), "faces are drawn"
            row.image.convert("RGB").save(self.pictures / "train" / f"{number:04d}.png")
            lines.append(json.dumps({"file_name": f"train/{number:04d}.png", "text": row.caption}) + "\n")
        (self.pictures / "metadata.jsonl").write_text("".join(lines))
        pack_faces(FacesConfig(count=count, size=side), self.shards)

    def ours(self, name: str, recipe: Mapping[str, object], *, steps: int) -> Speed:
        """`halfstep train` of a recipe."""
        run_dir = Path(tempfile.mkdtemp(dir=self.folder))
        path = run_dir.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(dict(recipe)))
        run_dir.rmdir()
        command = [sys.executable, "-m", "launch", "train", str(path), "--run-dir", str(run_dir), "--ranks", str(RANKS)]
        return self._timed(f"ours {name}", [([*command, "train.steps=1000000"], {})], steps=steps)

    def theirs(self, name: str, script: str, words: Sequence[str], *, steps: int, variables: Mapping[str, str] | None = None) -> Speed:
        """A script of examples/, as it is, under accelerate. variables: of accelerate, besides."""
        command = [sys.executable, str(HERE / "diffusers_script.py"), str(self.diffusers / script), *words]
        command += ["--output_dir", tempfile.mkdtemp(dir=self.folder)]
        # Not by torchrun: it gives each rank a session of its own, and Linux (autogroup) each session a share of a busy machine.
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        places = [{**Place(rank, rank, RANKS, RANKS, "127.0.0.1", port).variables(), **(variables or {})} for rank in range(RANKS)]
        return self._timed(f"theirs {name}", [(command, place) for place in places], steps=steps)

    def _timed(self, name: str, commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], *, steps: int) -> Speed:
        """Run commands, with what is theirs of the environment, until the clock has seen its steps; how they end then is their own affair.

        Raises: RuntimeError if they end before."""
        clock, log = self.folder / "clock", self.folder / "log"
        clock.unlink(missing_ok=True)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE / "step_clock"), *sys.path]),
            "HALFSTEP_STEP_CLOCK": str(clock),
            "HALFSTEP_STEP_CLOCK_STEPS": str(steps),
            "ACCELERATE_USE_CPU": "true",
            **cluster_variables(LocalCluster(), launcher="benchmark"),
            **interface_variables("lo"),
            "HF_HUB_OFFLINE": "1",
        }
        with log.open("wb") as output:
            processes = [
                subprocess.Popen(words, env={**environment, **own}, stdout=output, stderr=subprocess.STDOUT, cwd=self.folder)
                for words, own in commands
            ]
            for process in processes:
                process.wait()
        lines = clock.read_text().splitlines() if clock.exists() else []
        if len(lines) < steps:
            raise RuntimeError(f"{' '.join(commands[0][0])} ended after {len(lines)} steps:\n{log.read_text(errors='replace')[-4000:]}")
        wall, cpu, threads = zip(*(map(float, line.split()) for line in lines[WARM_UP_STEPS:]), strict=True)
        assert set(threads) == {1.0}, "both sides compute in one thread"
        speed = Speed(*(statistics.median(end - start for start, end in itertools.pairwise(times)) for times in (wall, cpu)))
        sys.stderr.write(f"{name}: {speed.wall:.3f} s a step, {speed.cpu:.3f} s of CPU, load {os.getloadavg()[0]:.1f}\n")
        return speed


def check_scripts(parser: argparse.ArgumentParser, diffusers: Path, scripts: Sequence[str]) -> None:
    """End with exit code 2 where a script is missing in the checkout."""
    for script in scripts:
        if not (diffusers / script).is_file():
            parser.error(f"{diffusers / script} is missing; git clone --depth 1 https://github.com/huggingface/diffusers")


def report(name: str, pairs: Sequence[tuple[Speed, Speed]], *, against: str, images: int) -> None:
    """Print wall and CPU time, theirs by ours. pairs: (theirs, ours) of each repeat. images: of a step."""
    print_ratio(
        name,
        [theirs.wall / ours.wall for theirs, ours in pairs],
        against=against,
        images_per_second=statistics.median(images / ours.wall for _, ours in pairs),
        their_images_per_second=statistics.median(images / theirs.wall for theirs, _ in pairs),
        load=os.getloadavg()[1],
    )
    print_ratio(
        f"{name}_cpu_time",
        [theirs.cpu / ours.cpu for theirs, ours in pairs],
        against="the same, in processor time of rank 0",
        milliseconds_per_step=statistics.median(ours.cpu for _, ours in pairs) * 1e3,
        their_milliseconds_per_step=statistics.median(theirs.cpu for theirs, _ in pairs) * 1e3,
    )


def best_pairs(rounds: Sequence[Mapping[str, Speed]]) -> list[tuple[Speed, Speed]]:
    """(theirs, ours) of each repeat, in the fastest way of each side. rounds: as of best_ways."""
    theirs, ours = best_ways(rounds)
    sys.stderr.write(f"best: {theirs}, {ours}\n")
    return [(each[theirs], each[ours]) for each in rounds]


def best_ways(rounds: Sequence[Mapping[str, Speed]]) -> tuple[str, str]:
    """Theirs and ours whose median by the wall clock is the lowest.

    rounds: speeds by way, whose names begin with the side, `ours` or `theirs`; all hold the same ways."""

    def way(side: str) -> str:
        ways = [name for name in rounds[0] if name.startswith(side)]
        return min(ways, key=lambda name: statistics.median(each[name].wall for each in rounds))

    return way("theirs"), way("ours")
