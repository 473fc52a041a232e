"""Every benchmark in a process of its own, one after the other, and one table of what they found: what `make bench` runs.

    .venv/bin/python benchmarks/bench.py                                      all of them, in a few hours
    .venv/bin/python benchmarks/bench.py step_overhead reader --quick         two of them, as a smoke test
    .venv/bin/python benchmarks/bench.py --diffusers ../diffusers             with those whose peer is a checkout of diffusers

What has ended is kept in benchmarks/results/bench.json (of --quick: in runs/bench_quick/), so that the same command goes on where it was
interrupted; --again runs it anew. A benchmark whose peer is not given is named as not run."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from measure import machine

HERE = Path(__file__).parent
ROOT = HERE.parent
PEERS = {
    "diffusers": "git clone --depth 1 https://github.com/huggingface/diffusers",
    "hramchenko": "git clone https://github.com/Hramchenko/diffusion_distiller",
}
"""Checkouts that are pointed to, and where to have them from."""


@final
@dataclass(frozen=True)
class Benchmark:
    """A file of this folder."""

    name: str
    peer: str | None = None
    """The checkout that it is compared with, as its option of that name."""
    others: bool = False
    """It has baselines besides, and runs without the checkout, too."""

    def command(self, peers: Mapping[str, Path], *, quick: bool) -> list[str]:
        """Of its process, from the repository's root."""
        words = [str(Path("benchmarks") / f"{self.name}.py"), *(["--quick"] if quick else [])]
        return words + ([f"--{self.peer}", str(peers[self.peer])] if self.peer is not None and self.peer in peers else [])

    def missing(self, peers: Collection[str]) -> str | None:
        """What it lacks to be compared with its peer. peers: those that are given."""
        if self.peer is None or self.peer in peers:
            return None
        return f"it wants --{self.peer} DIR: {PEERS[self.peer]} DIR"


BENCHMARKS = (
    Benchmark("step_overhead"),
    Benchmark("reader"),
    Benchmark("pack"),
    Benchmark("checkpoint"),
    Benchmark("resume"),
    Benchmark("sampling"),
    Benchmark("halving", peer="hramchenko", others=True),
    Benchmark("latent_step", peer="diffusers"),
    Benchmark("unconditional_step", peer="diffusers"),
    Benchmark("launch_overhead"),
    Benchmark("traffic"),
)


def main() -> None:
    """Run what is asked for and has not ended yet, then print the table; the exit code is 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these of {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="short repeats, to see that all of it runs; the figures mean nothing")
    parser.add_argument("--again", action="store_true", help="also those whose figures are kept")
    for peer, clone in PEERS.items():
        parser.add_argument(f"--{peer}", type=Path, metavar="DIR", help=clone)
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(names)):
        parser.error(f"{', '.join(unknown)}: not among {', '.join(names)}")
    peers = {name: given.resolve() for name in PEERS if (given := getattr(options, name)) is not None}
    for name, path in peers.items():
        if not path.is_dir():
            parser.error(f"--{name} {path}: no such folder; {PEERS[name]}")
    results = Results(ROOT / "runs" / "bench_quick" / "bench.json" if options.quick else HERE / "results" / "bench.json")
    asked = [benchmark for benchmark in BENCHMARKS if not options.names or benchmark.name in options.names]
    failed = []
    for benchmark in asked:
        if benchmark.missing(peers) and not benchmark.others:
            continue
        if not options.again and results.has(benchmark, peers):
            sys.stderr.write(f"{benchmark.name}: kept from {results.path}; --again runs it anew\n")
            continue
        if not run(benchmark, benchmark.command(peers, quick=options.quick), results):
            failed.append(benchmark.name)
    sys.stdout.write("\n".join(table(results, asked, peers, failed)) + "\n")
    sys.exit(1 if failed else 0)


@final
class Results:
    """What benchmarks have found on this machine, in a file that is written anew whenever one has ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        # Ratios of two machines do not belong in one table.
        self.found: dict[str, dict] = kept.get("benchmarks", {}) if kept.get("machine") == machine() else {}

    def has(self, benchmark: Benchmark, peers: Collection[str]) -> bool:
        """Whether this one has ended, with its peer if that is given now."""
        kept = self.found.get(benchmark.name)
        return kept is not None and (benchmark.peer not in peers or f"--{benchmark.peer} " in kept["command"])

    def keep(self, name: str, entry: dict[str, object]) -> None:
        """Take it into the file."""
        self.found[name] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps({"machine": machine(), "benchmarks": self.found}, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path)


def run(benchmark: Benchmark, words: Sequence[str], results: Results) -> bool:
    """Run one and keep its lines; False if it failed. What it says of its progress goes to stderr as it comes."""
    sys.stderr.write(f"{benchmark.name}: {' '.join(words)}\n")
    sys.stderr.flush()
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        sys.stderr.write(line)
        lines.append(line)
    if process.wait() != 0:
        sys.stderr.write(f"{benchmark.name}: exit code {process.returncode}\n")
        return False
    found = [json.loads(line) for line in lines if line.startswith("{")]
    for each in found:
        each.pop("machine", None)
    results.keep(
        benchmark.name,
        {"command": f"python {' '.join(words)}", "commit": _commit(), "seconds": round(time.monotonic() - started), "lines": found},
    )
    return True


def table(results: Results, asked: Sequence[Benchmark], peers: Collection[str], failed: Sequence[str]) -> Iterator[str]:
    """Rows of Markdown under the machine's name: what was asked for, and what was not run, with the reason.

    peers: those that are given. failed: names of benchmarks."""
    yield f"{machine()}\n"
    yield "| name | result | low | high | repeats | against |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for benchmark in asked:
        for line in results.found.get(benchmark.name, {"lines": []})["lines"]:
            yield _row(line)
    yield ""
    for benchmark in asked:
        if benchmark.name in failed:
            yield f"{benchmark.name}: failed, see above"
        elif benchmark.name not in results.found:
            yield f"{benchmark.name}: not run; {benchmark.missing(peers)}"
        elif benchmark.peer and f"--{benchmark.peer} " not in results.found[benchmark.name]["command"]:
            yield f"{benchmark.name}: run without its peer; {benchmark.missing(peers)}"


def _row(line: Mapping[str, object]) -> str:
    """Of one line of a benchmark: a ratio, or seconds where there is nothing to compare with."""
    value, unit = (line["ratio"], "") if "ratio" in line else (line.get("seconds"), " s")
    low, high = (f"{line[key]}{unit}" if key in line else "" for key in ("low", "high"))
    return f"| {line['name']} | {value}{unit} | {low} | {high} | {line.get('repeats', '')} | {line.get('against', '')} |"


def _environment() -> dict[str, str]:
    """This tree's packages, also where another one is installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def _commit() -> str:
    """Of this tree; with `-dirty` where it differs, but for the results, which a benchmark before may have written."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
