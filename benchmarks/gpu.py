"""What halfstep does on one GPU, in parts of less than nine minutes each, without a network.

    python benchmarks/gpu.py                      the parts that are not finished, in order, for up to --minutes
    python benchmarks/gpu.py --parts a d          these alone
    python benchmarks/gpu.py --smoke              all of it in small, on the CPU; nothing is written but below runs/gpu_bench_smoke

The same command goes on where the one before ended, whatever ended it. It prints a table after each part and writes
benchmarks/results/<device>.json, .md and PNGs. Exit code: 0 all parts are finished, 75 call again, 1 a step failed (the others went on)."""

import argparse
import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import final

import torch
from faces_runs import check_settings, commit
from gpu_parts.attention import ATTENTION
from gpu_parts.bench import Bench, Part
from gpu_parts.budget import CALL_AGAIN, Budget, Commands, Row, Store, TimeUp
from gpu_parts.faces import HALVING, TRAINING
from gpu_parts.latents import LATENTS
from gpu_parts.memory import PLANS, SETTINGS
from gpu_parts.sampling import SAMPLING
from gpu_parts.sizes import FULL, SMOKE
from measure import machine

from data_shards.files import json_text, replace_file
from data_shards.ranks import device
from trainer.environment import describe_device
from trainer.sample import png

PARTS: Mapping[str, Part] = {"a": TRAINING, "d": HALVING, "b": LATENTS, "c": SAMPLING, "e": ATTENTION, "f": PLANS, "g": SETTINGS}
"""In the order in which they are run: d halves what a has trained."""
GRACE_SECONDS = 40.0


def main() -> int:
    """Run what is missing for as long as there is time; write after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="of this call; what runs then is told to stop, and goes on next time")
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS), help="default: all, a and d first")
    parser.add_argument("--smoke", action="store_true", help="small sizes, for the CPU")
    parser.add_argument("--root", type=Path, help="state between calls; default: runs/gpu_bench or runs/gpu_bench_smoke")
    parser.add_argument("--commit", help="of this tree, where it was copied without its .git; default: git's")
    options = parser.parse_args()
    if not options.smoke and device().type != "cuda":
        parser.error("torch finds no GPU here; --smoke tries everything in small on the CPU")
    root = (options.root or Path("runs/gpu_bench_smoke" if options.smoke else "runs/gpu_bench")).absolute()
    out = root / "results" if options.smoke else Path(__file__).parent / "results"
    size = SMOKE if options.smoke else FULL
    try:
        check_settings(root, {"device": describe_device(device())["name"], **asdict(size)})
        tree = options.commit or commit()
    except ValueError as error:
        parser.error(str(error))
    except (OSError, subprocess.CalledProcessError):
        parser.error("git does not know the commit of this tree; give it, --commit SHA")
    budget = Budget(options.minutes, grace_seconds=min(GRACE_SECONDS, options.minutes * 15))
    budget.end_at_signals()
    # compiled once for all runs, and for those of later calls
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(root / "compiled"), "TRITON_CACHE_DIR": str(root / "compiled" / "triton")}
    os.environ.update(caches)
    store = Store(root / "rows", budget, commit=tree)
    bench = Bench(root, size, budget, store, Commands(root, budget, environment=caches), device())
    result, code = Results(bench, out, commit=tree, smoke=options.smoke), 0
    try:
        for letter in (letter for letter in PARTS if letter in options.parts):
            run_part(letter, bench, result)
            result.write()
            sys.stdout.write("\n".join(result.section(letter)) + "\n")
            sys.stdout.flush()
            free_memory()
    except TimeUp:
        sys.stdout.write("time is up; the same command goes on from here\n")
        code = CALL_AGAIN
    sys.stdout.write(result.write())
    return code or (1 if result.failed else 0)


def run_part(letter: str, bench: Bench, result: "Results") -> None:
    """Measure what the part lacks, then plot; what fails is noted, and ends the part where the next step needs it. Raises: TimeUp."""

    def is_there(name: str, make: Callable[[], Row]) -> bool:
        try:
            bench.store.once(name, make)
        except (RuntimeError, OSError) as failure:  # a command, a kernel that does not run, too little memory
            result.failed[name] = str(failure)
            sys.stdout.write(f"{name} FAILED: {failure}\n")
            return False
        return True

    part, whole = PARTS[letter], True
    for name, make in part.steps(bench):
        whole = is_there(f"{letter}_{name}", make) and whole
        if part.chained and not whole:
            return
    if whole:
        is_there(f"plots_{letter}", lambda: result.plot(letter))


def free_memory() -> None:
    """What a part has held on the GPU is the next one's."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


@final
class Results:
    """All rows so far as JSON, as tables and as plots, in files named for the device."""

    def __init__(self, bench: Bench, out: Path, *, commit: str, smoke: bool) -> None:
        self.failed: dict[str, str] = {}
        self._bench, self._out, self._smoke = bench, out, smoke
        described = describe_device(bench.device)
        self._device = str(described["name"])
        self._stem = ("smoke_" if smoke else "") + re.sub(r"[^a-z0-9]+", "_", self._device.lower()).strip("_")
        self._head = {
            "command": f"python benchmarks/gpu.py{' --smoke' if smoke else ''}",
            "smoke": smoke,
            "commit": commit,
            "torch": torch.__version__,
            "device": described,
            "machine": machine(),
            "size": asdict(bench.size),
        }
        out.mkdir(parents=True, exist_ok=True)

    def plot(self, letter: str) -> Row:
        """The plots of a part; returns their files' names."""
        pictures = PARTS[letter].plots(self._bench, self._bench.store.rows(letter))
        for name, picture in pictures.items():
            replace_file(self._out / f"{self._stem}_{letter}_{name}.png", png(picture))
        return {"plots": list(pictures)}

    def section(self, letter: str) -> list[str]:
        """A part's lines for people; none where nothing was measured."""
        part, rows = PARTS[letter], self._bench.store.rows(letter)
        verdict = {True: "met", False: "NOT met", None: "open"}[self._met(part, rows)]
        return ["", f"({letter}) {part.title}. Aim: {part.aim}: {verdict}", "", *part.table(rows)] if rows else []

    def write(self) -> str:
        """All parts to the files; returns the tables."""
        warning = "SMOKE: sizes for trying, no figures to quote. " if self._smoke else ""
        lines = [f"{warning}{self._device}, {machine()}"]
        parts = {}
        for letter, part in PARTS.items():
            rows = self._bench.store.rows(letter)
            parts[letter] = {"title": part.title, "aim": part.aim, "met": self._met(part, rows), "rows": rows}
            lines += self.section(letter)
        lines += ["", *(f"FAILED: {name}: {text.strip().splitlines()[-1]}" for name, text in self.failed.items())]
        text = "\n".join(lines).strip() + "\n"
        replace_file(self._out / f"{self._stem}.json", json_text({**self._head, "parts": parts, "failed": self.failed}))
        replace_file(self._out / f"{self._stem}.md", text)
        return text

    def _met(self, part: Part, rows: Mapping[str, Row]) -> bool | None:
        """Whether the aim is met; None where that is not known yet, or the sizes say nothing."""
        return None if self._smoke else part.met(rows)


if __name__ == "__main__":
    sys.exit(main())
