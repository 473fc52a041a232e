"""What a run reports: metrics.jsonl, TensorBoard and a line or bar for people. The ledger of what was delivered."""

import hashlib
import json
import logging
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import final

import numpy as np
import torch
from PIL import Image

from data_shards.files import cut_lines, replace_file
from trainer.sample import png

logger = logging.getLogger(__name__)

_PLAIN_LINE_SECONDS = 10.0


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl."""

    step: int
    loss: float
    loss_hex: str
    """The loss's exact value: float.hex()."""
    gradient_norm: float
    learning_rate: float
    images_per_second: float
    step_seconds: float
    data_wait_seconds: float
    peak_memory_gib: float | None = None
    """Most memory that rank 0 has held so far: tensors on its GPU, else the whole process."""
    teraflops_per_second: float | None = None
    """The model's operations, of all ranks together."""
    mfu: float | None = None
    """Share of what all ranks' devices could do, in [0, 1]; None where that is not known."""


@dataclass(frozen=True)
class Workload:
    """What all ranks do in one optimizer step, and the most that they could do."""

    images: int
    """Of one step."""
    flops_per_image: int
    """Operations of the model and its teacher, forward and backward; activations computed again do not count."""
    peak_flops: float | None
    """Operations a second that the devices of all ranks together could do; None where that is not known."""
    device: torch.device
    """Of this rank."""


def measure_step(
    step: int, work: Workload, *, loss: float, gradient_norm: float, learning_rate: float, step_seconds: float, data_wait_seconds: float
) -> StepMetrics:
    """The metrics of a step that took so long."""
    flops = work.images * work.flops_per_image / step_seconds
    return StepMetrics(
        step=step,
        loss=loss,
        loss_hex=loss.hex(),
        gradient_norm=gradient_norm,
        learning_rate=learning_rate,
        images_per_second=work.images / step_seconds,
        step_seconds=step_seconds,
        data_wait_seconds=data_wait_seconds,
        peak_memory_gib=peak_memory_gib(work.device),
        teraflops_per_second=flops / 1e12,
        mfu=None if work.peak_flops is None else flops / work.peak_flops,
    )


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has held so far: tensors on a GPU, on a CPU all its resident pages."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


@final
@dataclass(frozen=True, eq=False)
class Drawn:
    """What a model draws while it trains, and numbers that say how good it is, by name."""

    picture: Image.Image
    scores: Mapping[str, float] = field(default_factory=dict)


_TAGS = {
    "loss": "train/loss",
    "gradient_norm": "train/gradient_norm",
    "learning_rate": "train/learning_rate",
    "images_per_second": "speed/images_per_second",
    "data_wait_seconds": "speed/data_wait_seconds",
    "teraflops_per_second": "speed/teraflops_per_second",
    "mfu": "speed/mfu",
    "peak_memory_gib": "memory/peak_gib",
}


@final
class Reporter:
    """Rank 0's view of a run. A resume at step s drops what earlier attempts reported of step s and later."""

    def __init__(
        self, run_dir: Path, *, start_step: int, total_steps: int, recipe_text: str, hyperparameters: Mapping[str, object], title: str
    ) -> None:
        """hyperparameters: the recipe's values, for TensorBoard's table of runs, which shows train/loss beside them."""
        from torch.utils.tensorboard.summary import hparams
        from torch.utils.tensorboard.writer import SummaryWriter  # 1 s: rank 0 alone needs it

        cut_lines(run_dir / "metrics.jsonl", before_step=start_step)
        self.run_dir = run_dir
        self.file = open(run_dir / "metrics.jsonl", "a", encoding="ascii")
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step, flush_secs=20)
        self.board.add_text("recipe", f"```yaml\n{recipe_text}\n```", start_step)
        values = {
            key: value if isinstance(value, bool | int | float | str) else json.dumps(value) for key, value in hyperparameters.items()
        }
        writer = self.board.file_writer
        assert writer is not None, "the writer has just been opened"
        for summary in hparams(values, {"train/loss": 0.0}):
            writer.add_summary(summary)
        self.progress = _Bar(title, start_step, total_steps) if sys.stderr.isatty() else _PlainLines(title, total_steps)
        (run_dir / "samples").mkdir(exist_ok=True)

    def write_step(self, metrics: StepMetrics) -> None:
        """Report one optimizer step."""
        self.file.write(json.dumps(asdict(metrics)) + "\n")
        self.file.flush()
        for name, tag in _TAGS.items():
            value = getattr(metrics, name)
            if value is not None:
                self.board.add_scalar(tag, value, metrics.step)
        self.progress.show(metrics)

    def write_samples(self, step: int, drawn: Mapping[str, Drawn]) -> None:
        """Report what models draw by name (ema, raw), as PNG files and in TensorBoard, with its scores."""
        for name, one in drawn.items():
            suffix = "" if name == "ema" else f"_{name}"
            replace_file(self.run_dir / "samples" / f"step_{step:06d}{suffix}.png", png(one.picture))
            self.board.add_image(f"samples/{name}", np.asarray(one.picture), step, dataformats="HWC")
            for score, value in one.scores.items():
                self.board.add_scalar(f"samples/{score}_{name}", value, step)

    def sync(self) -> None:
        """Make what was reported so far durable, before a checkpoint commits the steps it belongs to; for any thread."""
        os.fsync(self.file.fileno())
        self.board.flush()

    def close(self) -> None:
        """Close files and leave the terminal tidy."""
        self.progress.close()
        self.file.close()
        self.board.close()


@final
class Ledger:
    """What this rank really delivered to the model, a line a micro-batch; in it, the bad samples that others stood in for."""

    def __init__(self, run_dir: Path, rank: int, *, max_bad_samples: int) -> None:
        """max_bad_samples: how many a run may skip; those of earlier attempts, on any rank, count."""
        self.max_bad_samples = max_bad_samples
        self.bad_samples = sum(len(line.get("replaced", [])) for path in _ledgers(run_dir) for line in _lines(path))
        self.file = open(run_dir / "ledger" / f"rank_{rank}.jsonl", "a", encoding="utf-8")

    def write(self, step: int, index: int, *, keys: Sequence[str], draws_sha256: str, replaced: Sequence[str]) -> None:
        """Record micro-batch (step, index).

        Raises: DataBudgetSpent if more samples were bad than the run may skip."""
        keys_sha256 = hashlib.sha256("\n".join(keys).encode()).hexdigest()
        line: dict[str, object] = {"step": step, "index": index, "keys_sha256": keys_sha256, "noise_sha256": draws_sha256}
        if replaced:
            line["replaced"] = list(replaced)
            self.bad_samples += len(replaced)
            for name in replaced:
                logger.warning("step %d, micro-batch %d: skipped %s", step, index, name)
        self.file.write(json.dumps(line) + "\n")
        if replaced and self.bad_samples > self.max_bad_samples:
            raise DataBudgetSpent(
                f"{self.bad_samples} samples were bad, data.max_bad_samples allows {self.max_bad_samples}; the last: {replaced[-1]}; "
                "`halfstep shards verify` lists them all; raise data.max_bad_samples to go on, or pack them again and start a new --run-dir"
            )

    def flush(self) -> None:
        """Hand the lines to the system, so that they outlive this process; called once a step."""
        self.file.flush()

    def sync(self) -> None:
        """Make the lines that were handed over durable; for any thread, so that it does not touch the buffer of new ones."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class DataBudgetSpent(RuntimeError):
    """More samples were bad than the recipe lets a run skip."""


def _ledgers(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "ledger").glob("rank_*.jsonl"))


def _lines(path: Path) -> Iterator[dict[str, list[str]]]:
    """The lines that name bad samples: parsing the others would take long in a long run."""
    with open(path, "rb") as file:
        yield from (json.loads(line) for line in file if b'"replaced"' in line)


def cut_ledgers(run_dir: Path, *, before_step: int) -> None:
    """Drop the ledger lines of steps that will be run again, whatever ranks wrote them."""
    (run_dir / "ledger").mkdir(exist_ok=True)
    for path in _ledgers(run_dir):
        cut_lines(path, before_step=before_step)


@final
class _PlainLines:
    """A line every few seconds, for logs."""

    def __init__(self, title: str, total_steps: int) -> None:
        self.title, self.total_steps = title, total_steps
        self.first: tuple[int, float] | None = None  # the first step is no measure of the others
        self.last_shown = 0.0

    def show(self, metrics: StepMetrics) -> None:
        now = time.monotonic()
        done = metrics.step + 1
        if now - self.last_shown < _PLAIN_LINE_SECONDS and done != self.total_steps:
            return
        self.last_shown = now
        self.first = self.first or (done, now)
        taken = done - self.first[0]
        left = f"  ETA {_clock((self.total_steps - done) * (now - self.first[1]) / taken)}" if taken else ""
        sys.stderr.write(
            f"{self.title}: step {done}/{self.total_steps}  loss {metrics.loss:.4f}  {metrics.images_per_second:.0f} images/s  "
            f"data wait {100 * metrics.data_wait_seconds / metrics.step_seconds:.0f}%{_mfu_text(metrics)}{left}\n"
        )
        sys.stderr.flush()

    def close(self) -> None:
        pass


@final
class _Bar:
    """A bar on a terminal."""

    def __init__(self, title: str, start_step: int, total_steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(
                "loss {task.fields[loss]:.4f}  {task.fields[speed]:.0f} images/s  data wait {task.fields[wait]:.0f}%{task.fields[mfu]}  ETA"
            ),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.task = self.bar.add_task(title, total=total_steps, completed=start_step, loss=float("nan"), speed=0.0, wait=0.0, mfu="")
        self.bar.start()

    def show(self, metrics: StepMetrics) -> None:
        wait = 100 * metrics.data_wait_seconds / metrics.step_seconds
        shown = {"loss": metrics.loss, "speed": metrics.images_per_second, "wait": wait, "mfu": _mfu_text(metrics)}
        self.bar.update(self.task, completed=metrics.step + 1, **shown)

    def close(self) -> None:
        self.bar.stop()


def _mfu_text(metrics: StepMetrics) -> str:
    """`  MFU 41%` for the progress line; nothing where it is not known."""
    return "" if metrics.mfu is None else f"  MFU {100 * metrics.mfu:.0f}%"


def _clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
