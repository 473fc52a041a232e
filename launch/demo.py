"""The whole way on embedded data: faces, shards, teacher, halvings, samples, report."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from data_shards.files import json_text, replace_file
from launch.cluster import LocalCluster
from launch.data import pack_faces
from launch.job import Job
from launch.local import run_job
from launch.start import How, check_ranks, start_distill
from trainer.config import stage_updates, student_counts
from trainer.config_io import load_recipe, recipe_path
from trainer.exit_codes import DONE

_INTRODUCTION = """halfstep demo, in {out} on {ranks} local ranks:
  1. shards    draw and pack {faces} cartoon faces                        half a minute
  2. teacher   learn to draw faces in {levels} steps: {teacher} updates           4 to 8 minutes
  3. students  halve that {halvings} times, down to {last} step{plural}: {students} updates      3 to 8 minutes
  4. evaluate  measure all against {held_out} held-out faces, write the report   3 to 6 minutes
All in all 10 to 20 minutes on 2 cores. Stop it whenever you like: the same command goes on where it stopped.
"""

_CLOSING = """
Done in {total}{parts}.
  the picture   {out}/grid.png
  the report    {out}/report.html   (open it in a browser)
  the numbers   {out}/evaluation.json
Try next:
  halfstep sample {out} --steps 1 --images 64 --seed 7 --out faces.png    # 64 new faces, one network call each
  halfstep export {out} --steps 4 --out faces-4-steps                     # a folder that stock diffusers loads
  tensorboard --logdir {out}                                              # the curves, one run a stage
"""


@dataclass
class Clock:
    """Wall seconds of each part of the demo."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time one part."""
        started = time.monotonic()
        sys.stderr.write(f"\n== {name}\n")
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)
        sys.stderr.write(f"== {name}: {self.seconds[name]} s\n")


def run_demo(out: Path, *, ranks: int, recipe: str = "demo", held_out: int = 2000, images: int = 512) -> int:
    """Run the demo, or what is left of it, in `out`; returns the exit code of the part that failed, 0 if none did.

    held_out: faces that were not trained on, which the samples are measured against. images: samples a step count."""
    config = load_recipe(recipe_path(recipe), [])
    assert config.distill is not None and config.data.faces is not None, "the demo's recipe packs faces and halves"
    check_ranks(config.data, ranks)
    check_ranks(config.stage_data, ranks, section="distill")
    faces, students = config.data.faces, student_counts(config.distill)
    sys.stderr.write(
        _INTRODUCTION.format(
            out=out,
            ranks=ranks,
            faces=faces.count + held_out,
            levels=config.noise_schedule.steps,
            teacher=config.train.steps,
            halvings=len(students),
            last=students[-1],
            plural="" if students[-1] == 1 else "s",
            students=sum(stage_updates(config.distill)),
            held_out=held_out,
        )
    )
    clock, machines = Clock(), LocalCluster()
    with clock.part("shards"):
        pack_faces(faces, out / "shards")
        reference = pack_faces(faces.model_copy(update={"count": held_out}), out / "reference", start=faces.count)
    with clock.part("teacher and halvings"):
        code = start_distill(recipe, [], How(run_dir=out, ranks=ranks))
    if code != DONE:
        return code
    with clock.part("evaluation"):
        options: dict[str, object] = {
            "reference": str(reference),
            "images": images,
            "seed": 0,
            "out": str(out / "evaluation.json"),
        }
        code = run_job(Job("evaluate", out, options), machines, ranks=ranks)
    if code != DONE:
        return code
    with clock.part("report"):
        code = run_job(Job("report", out, {"out": str(out / "report.html")}), machines, ranks=ranks)
    if code != DONE:
        return code
    if not (out / "timings.json").exists():  # a demo given again has little left to do
        replace_file(out / "timings.json", json_text(clock.seconds))
    total = sum(clock.seconds.values())
    parts = "; ".join(f"{name} {seconds:.0f} s" for name, seconds in clock.seconds.items())
    sys.stderr.write(_CLOSING.format(total=f"{total / 60:.1f} minutes", parts=f" ({parts})", out=out))
    return DONE
