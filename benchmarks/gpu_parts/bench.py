"""What the parts share: the state folder, commands, short runs measured by their own metrics, tables."""

import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from PIL import Image

from gpu_parts.budget import Budget, Commands, OutOfMemory, Row, Store
from gpu_parts.sizes import Size

STYLE = "open-peeps"
PATIENT = "cluster.collective_timeout_seconds=900.0"
"""A first step that compiles a large model is no hang."""
_NEVER = 10**6
_PEAK_PRODUCTS = 20


@final
@dataclass(frozen=True)
class Bench:
    """One call of benchmarks/gpu.py."""

    root: Path
    size: Size
    budget: Budget
    store: Store
    commands: Commands
    device: torch.device

    @property
    def on_gpu(self) -> bool:
        """Whether there is one."""
        return self.device.type == "cuda"

    @property
    def compiled(self) -> str:
        """The recipe's word for whether training compiles the model."""
        return f"train.compile={str(self.size.compile).lower()}"

    def pack(self, name: str, *, count: int, pixels: int, start: int = 0) -> Path:
        """Shards of faces start ... start + count - 1, made once."""
        folder = self.root / name
        if not (folder / "index.json").exists():
            numbers = ("--start", str(start), "--count", str(count), "--size", str(pixels))
            self.commands.run(name, ["shards", "pack", "--source", "faces", "--style", STYLE, *numbers, "--out", str(folder)])
        return folder

    def matmul_teraflops(self) -> float:
        """What the device reaches in bf16 matrix products, measured once: MFU is the share of it."""
        row = self.store.once("machine_matmul", lambda: {"teraflops_per_second": matmul_teraflops(self.device, self.size.matmul)})
        return row["teraflops_per_second"]

    def short_run(self, name: str, words: Sequence[str], *, environment: Mapping[str, str] | None = None) -> Row:
        """Speed and memory of a training run of a few steps, by its own metrics; it is killed then, so that nothing large is written.

        Raises: TimeUp, CommandFailed."""
        run_dir, size = self.root / "short" / name, self.size
        shutil.rmtree(run_dir, ignore_errors=True)
        metrics = run_dir / "metrics.jsonl"
        own = (f"train.steps={_NEVER}", f"checkpoint.every_steps={_NEVER}", "logging.sample_every_steps=0", "logging.every_steps=1")
        own = (*own, PATIENT)

        def enough() -> bool:
            return metrics.exists() and metrics.read_bytes().count(b"\n") > size.run_steps

        command = ["train", *words, "--ranks", "1", "--run-dir", str(run_dir), *own]
        self.commands.cut_short(name, command, enough, environment=environment or {})
        lines = metric_lines(run_dir)[: size.run_steps]
        shutil.rmtree(run_dir)
        return {
            **speed(lines[size.warm_up_steps :], peak=self.matmul_teraflops()),
            "first_step_seconds": round(lines[0]["step_seconds"], 2),
        }

    def largest_run(self, name: str, words: Callable[[int], Sequence[str]], *, batch: int) -> Row:
        """short_run of `words(batch)`, or of half the images, a quarter ... where the GPU has too little memory."""
        while True:
            try:
                return {"batch": batch, **self.short_run(name, words(batch))}
            except OutOfMemory:
                if batch == 1:
                    raise
                batch //= 2


def metric_lines(run_dir: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, but for a last line that is being written."""
    content = (run_dir / "metrics.jsonl").read_bytes()
    return [json.loads(line) for line in content[: content.rfind(b"\n")].splitlines()]


def speed(lines: Sequence[Mapping[str, float]], *, peak: float) -> Row:
    """Medians of a run's metrics. peak: 1e12 operations a second that the device reaches."""
    teraflops = statistics.median(line["teraflops_per_second"] for line in lines)
    return {
        "images_per_second": round(statistics.median(line["images_per_second"] for line in lines), 2),
        "step_milliseconds": round(1e3 * statistics.median(line["step_seconds"] for line in lines), 2),
        "data_wait_percent": round(100 * statistics.median(line["data_wait_seconds"] / line["step_seconds"] for line in lines), 1),
        "teraflops_per_second": float(f"{teraflops:.4g}"),
        "mfu": round(teraflops / peak, 4),
        "peak_memory_gib": round(max(line["peak_memory_gib"] for line in lines), 3),
    }


def matmul_teraflops(device: torch.device, side: int) -> float:
    """1e12 operations a second of square bf16 products of random numbers, the median of a few."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(_PEAK_PRODUCTS):
        wait(device)
        began = time.perf_counter()
        _ = left @ right
        wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / statistics.median(seconds) / 1e12


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


Step = tuple[str, Callable[[], Row]]
"""A name within its part, and what measures its row."""


@final
@dataclass(frozen=True)
class Part:
    """One part. chained: a step needs the one before; aim, met: what is wanted of its rows, by their names; plots: PNGs by name."""

    title: str
    aim: str
    steps: Callable[[Bench], Sequence[Step]]
    table: Callable[[Mapping[str, Row]], list[str]]
    met: Callable[[Mapping[str, Row]], bool | None]
    plots: Callable[[Bench, Mapping[str, Row]], Mapping[str, Image.Image]] = lambda bench, rows: {}
    chained: bool = False


def markdown(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A table's lines; numbers with four digits, None as nothing."""
    return [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|", *(f"| {' | '.join(map(_cell, row))} |" for row in rows)]


def _cell(value: object) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        case int():
            return f"{value:,}"
    return str(value)
