"""How every benchmark states a result: a ratio against a baseline taken in the same run, and the machine. Free of torch."""

import json
import os
import platform
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from launch.cluster import LocalCluster
from launch.place import Place
from launch.rank_env import rank_environment


def print_ratio(name: str, ratios: Sequence[float], *, against: str, **figures: float) -> None:
    """Print one JSON line; a ratio above 1 says that ours is faster. low, high: the repeats' 10th and 90th percentile."""
    tenths = statistics.quantiles(ratios, n=10, method="inclusive") if len(ratios) > 1 else ratios
    line = {
        "name": name,
        "ratio": round(statistics.median(ratios), 3),
        "low": round(tenths[0], 3),
        "high": round(tenths[-1], 3),
        "repeats": len(ratios),
        "against": against,
        "machine": machine(),
        **{key: round(value, 1) for key, value in figures.items()},
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def machine() -> str:
    """Processor, cores, Python and torch."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.machine()
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {version('torch')}"


def put_table(docs: Path, name: str, lines: Iterable[str]) -> None:
    """Write Markdown between the marks `name: begin` and `name: end` of a document, in the place of what stands there.

    Raises: ValueError if the document lacks the marks."""
    begin, end = (f"<!-- {name}: {mark} -->" for mark in ("begin", "end"))
    before, found, rest = docs.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"{docs}: wanted the marks {begin} and {end}, between which the table stands")
    docs.write_text("\n".join([f"{before}{begin}", *lines, f"{end}{after}"]), encoding="utf-8")


def run_ranks(words: Sequence[str], *, ranks: int) -> None:
    """Run a Python script, with its arguments, on so many ranks of one thread each, and wait for them.

    Raises: RuntimeError if one fails."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    inherited = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = []
    for rank in range(ranks):
        environment = rank_environment(
            inherited, Place(rank, rank, ranks, ranks, "127.0.0.1", port), LocalCluster(), launcher="benchmark", interface="lo"
        )
        processes.append(subprocess.Popen([sys.executable, *words], env=environment))
    if sum(process.wait() != 0 for process in processes):  # all are waited for
        raise RuntimeError(f"a rank of {words[0]} failed")
