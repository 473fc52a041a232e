"""`halfstep shards bench`: measures in a process that may import torch, and says in plain words what to set."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from data_shards.index import ShardIndex
from launch.progress import pack_progress

DEFAULT_BATCH_IMAGES = 16
MAX_WORKERS = 64


def worker_counts(text: str) -> list[int]:
    """The numbers of `0,1,2,4`, each once. Raises: ValueError for another text."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) <= MAX_WORKERS for part in parts):
        raise ValueError(f"--workers {text}: wanted numbers from 0 to {MAX_WORKERS} with commas between them, such as --workers 0,1,2,4")
    return sorted({int(part) for part in parts})


def bench_shards(
    directory: Path, *, image_size: int | None, batch_size: int | None, workers: list[int], as_json: bool, scale: float = 1.0
) -> None:
    """Measure shards and write what bounds them. scale: of the seconds that each part is given.

    Raises: ValueError if there is no valid index, or a sample is damaged; RuntimeError if remote shards don't come."""
    index = ShardIndex.load(directory)
    options = {
        "image_size": image_size,
        "batch_size": min(DEFAULT_BATCH_IMAGES, index.samples) if batch_size is None else batch_size,
        "workers": workers,
    }
    found = _measured(directory, {**options, "scale": scale})
    if as_json:
        sys.stdout.write(json.dumps({"shards": str(directory), **options, **found, "advice": advice(found)}, indent=2) + "\n")
        return
    size = index.image_size if image_size is None else image_size
    sys.stdout.write(f"{directory}: {index.samples} images, read at {size} pixels in batches of {options['batch_size']}\n")
    for line in table(found):
        sys.stdout.write(f"  {line}\n")
    sys.stdout.write(f"{advice(found)}\n")


def _measured(directory: Path, options: Mapping[str, object]) -> Mapping[str, object]:
    """What the other process finds, its progress shown meanwhile."""
    command = [sys.executable, "-m", "data_shards.reading.bench", str(directory), json.dumps(options)]
    last: dict[str, object] = {}
    with pack_progress("measuring") as progress, subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None, "a pipe was asked for"
        try:
            for line in process.stdout:
                last = json.loads(line)
                if "done" in last:
                    progress(_whole(last["done"]), _whole(last["total"]))
        finally:
            process.terminate()  # it has ended, or we were interrupted
    match last:
        case {"found": dict(found)}:
            return found
        case {"error": str(text), "is_input": True}:
            raise ValueError(text)
        case {"error": str(text)}:
            raise RuntimeError(text)
        case _:
            raise RuntimeError(f"measuring {directory} ended with exit code {process.returncode} and no result; its messages stand above")


def table(found: Mapping[str, object]) -> list[str]:
    """A line for each part that was measured."""
    sample_bytes = _speed(found["sample_bytes"])
    names = {
        "disk": "disk, one process",
        "network": "network, one connection",
        "decode": "decoding, one core",
        "resize": "scaling, one core",
        "device_pinned": "to the device, pinned",
        "device_unpinned": "to the device, unpinned",
    }
    lines = [f"{title:26}{shown(_speed(found[key])):>10} images/s" for key, title in names.items() if found[key] is not None]
    source = found["disk"] if found["disk"] is not None else found["network"]
    if source is not None:
        lines[0] += f"  ({_speed(source) * sample_bytes / 1e6:.0f} MB/s)"
    readers = found["readers"]
    assert isinstance(readers, dict), "as it was written"
    for workers, speed in readers.items():
        title = "reader in the process" if workers == "0" else f"reader, {workers} worker{'s' if workers != '1' else ''}"
        lines.append(f"{title:26}{shown(_speed(speed)):>10} images/s")
    return lines


def advice(found: Mapping[str, object]) -> str:
    """What is the bottleneck and what to set, in a sentence or two."""
    verdict = found["verdict"]
    assert isinstance(verdict, dict), "as it was written"
    workers, speed = _whole(verdict["workers"]), shown(_speed(verdict["images_per_second"]))
    cores = _whole(found["cores"])
    setting = f"set data.workers={workers}: about {speed} images/s"
    match verdict["bottleneck"]:
        case "disk":
            return f"The disk is the bottleneck; {setting}. Copy the shards to a faster disk, or pack smaller images."
        case "network":
            return (
                f"The network is the bottleneck until the shards are in the cache; {setting}. "
                "A cache that holds all of them (data.cache) makes the second epoch as fast as the reader."
            )
        case "transfer":
            return f"The way to the device is the bottleneck; {setting}."
        case _:
            of_cores = f"{cores} core{'s' if cores > 1 else ''}"
            return (
                f"Decoding is the bottleneck: {shown(_speed(found['decode']))} images/s a core, {of_cores} here; {setting}. "
                "Only more cores, smaller images or JPEG make it faster; if a step takes longer than its images, nothing needs to be."
            )


def shown(speed: float) -> str:
    """A speed for people."""
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"


def _speed(value: object) -> float:
    assert isinstance(value, int | float), f"{value!r} is no number"
    return float(value)


def _whole(value: object) -> int:
    assert isinstance(value, int), f"{value!r} is no whole number"
    return value
