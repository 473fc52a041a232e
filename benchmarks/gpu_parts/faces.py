"""Parts a and d: the paper's tiny diffusion trained to its end on embedded faces, then halved to one step."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from plot import Line, beside, line_plot

from gpu_parts.bench import PATIENT, Bench, Part, Step, markdown, metric_lines, speed
from gpu_parts.budget import Row
from trainer.chain import read_chain
from trainer.evaluation import EvaluationRow, read_rows
from trainer.prompting.sheet import SheetGroup, draw_sheet
from trainer.sample import draw_images, grid_image
from trainer.source import load_source

RECIPE = "tiny_diffusion_53m"
PAPER_MINUTES, AIM_MINUTES, HALVING_AIM_MINUTES = 112, 2, 4
_TICKS, _SHOWN, _GRID = 12, 6, 36


def _words(bench: Bench) -> tuple[str, ...]:
    return ("--ranks", "1", f"data.shards={bench.root / 'faces'}", *bench.size.settings, "logging.sample_every_steps=0", PATIENT)


def _training(bench: Bench) -> Sequence[Step]:
    return [("training", lambda: _train(bench)), ("quality", lambda: _distance(bench))]


def _train(bench: Bench) -> Row:
    """The run of the recipe, from the command to the export."""
    size = bench.size
    bench.pack("faces", count=size.faces, pixels=size.pixels)
    run_dir = bench.root / "teacher"
    own = (bench.compiled, f"logging.every_steps={size.every_steps}")
    taken = bench.commands.timed("teacher", ["train", RECIPE, *_words(bench), "--run-dir", str(run_dir), *own])
    lines = metric_lines(run_dir)
    return {
        **taken,
        "times_faster_than_paper": round(PAPER_MINUTES * 60 / taken["seconds"], 1),
        "steps": lines[-1]["step"] + 1,
        "compiled": size.compile,
        **speed(lines, peak=bench.matmul_teraflops()),
        "last_losses": round(sum(line["loss"] for line in lines[-10:]) / len(lines[-10:]), 5),
    }


def _distance(bench: Bench) -> Row:
    """Frechet distance to faces that were not trained on."""
    size = bench.size
    [row] = _evaluated(bench, "teacher", [size.teacher_steps])
    return {"sampling_steps": row.steps, "frechet_distance": row.frechet_distance, "kid": row.kid, "images": row.images}


def _evaluated(bench: Bench, name: str, steps: Sequence[int]) -> tuple[EvaluationRow, ...]:
    size, out = bench.size, bench.root / f"evaluation_{name}.json"
    held_out = bench.pack("held_out", count=size.held_out, pixels=size.pixels, start=size.faces)
    words = ("--steps", ",".join(map(str, steps)), "--measure-up-to", str(max(steps)), "--images", str(size.images), "--batch", "256")
    bench.commands.run(f"evaluate_{name}", ["evaluate", str(bench.root / name), "--reference", str(held_out), *words, "--out", str(out)])
    return read_rows(out)


def _halving(bench: Bench) -> Sequence[Step]:
    return [("halving", lambda: _halve(bench)), ("quality", lambda: _student_distances(bench))]


def _halve(bench: Bench) -> Row:
    """The chain from the trained teacher to one step, from the command to the last export. Stages are too short to be compiled."""
    size, chain = bench.size, bench.root / "chain"
    settings = (
        f"teacher: {bench.root / 'teacher'}, start_steps: {size.start_steps}, end_steps: 1",
        f"head_change: {{prediction: v, updates: {size.head_updates}}}",
        f"updates: {list(size.updates)}, learning_rate: {list(size.rates)}",
        "lr_schedule: {kind: linear, warmup_steps: 10}, ema_decay: 0.97",
        f"global_batch_size: {size.halving_batch}, micro_batch_size: {size.halving_batch}, checkpoint_every_steps: 100000",
    )
    distill = f"distill={{{', '.join(settings)}}}"
    taken = bench.commands.timed("chain", ["distill", RECIPE, *_words(bench), "--run-dir", str(chain), distill])
    lines = [line for run_dir in _trained(chain) for line in metric_lines(run_dir)]
    in_steps = sum(line["step_seconds"] for line in lines)
    return {
        **taken,
        "seconds_in_steps": round(in_steps, 1),
        "students": len(size.updates),
        "updates": len(lines),
        "batch": size.halving_batch,
        "peak_memory_gib": round(max(line["peak_memory_gib"] for line in lines), 2),
    }


def _trained(chain: Path) -> Iterator[Path]:
    return (stage.run_dir for stage in read_chain(chain) if stage.trained_here)


def _student_distances(bench: Bench) -> Row:
    rows = _evaluated(bench, "chain", bench.size.measured_steps)
    figures = [
        {"model": row.model, "steps": row.steps, "frechet_distance": row.frechet_distance, "seconds_per_image": row.seconds_per_image}
        for row in rows
    ]
    return {"figures": figures, "images": rows[0].images}


def _training_table(rows: Mapping[str, Row]) -> list[str]:
    heads = (
        "training",
        "seconds",
        "x paper's 112 min",
        "ms a step",
        "images/s",
        "MFU",
        "peak GiB",
        "calls",
        "Frechet distance",
        "in steps",
    )
    row, quality = rows.get("training"), rows.get("quality", {})
    if row is None:
        return []
    keys = ("seconds", "times_faster_than_paper", "step_milliseconds", "images_per_second", "mfu", "peak_memory_gib", "calls")
    cells = [f"{row['steps']:,} steps", *(row[key] for key in keys), quality.get("frechet_distance"), quality.get("sampling_steps")]
    return markdown(heads, [cells])


def _halving_table(rows: Mapping[str, Row]) -> list[str]:
    row, quality = rows.get("halving"), rows.get("quality")
    lines = []
    if row is not None:
        heads = ("halving", "seconds", "of which in steps", "updates", "batch", "peak GiB", "calls")
        keys = ("seconds", "seconds_in_steps", "updates", "batch", "peak_memory_gib", "calls")
        lines += markdown(heads, [[f"{row['students']} students", *(row[key] for key in keys)]])
    if quality is not None:
        by_model = _by_model(quality)
        cells = [[steps, student, by_model["teacher"].get(steps)] for steps, student in by_model["student"].items()]
        lines += ["", *markdown(("sampling steps", "student's Frechet distance", "teacher's in as many"), cells)]
    return lines


def _by_model(quality: Row) -> Mapping[str, Mapping[int, float]]:
    found: dict[str, dict[int, float]] = {"student": {}, "teacher": {}}
    for figure in quality["figures"]:
        found[figure["model"]][figure["steps"]] = figure["frechet_distance"]
    return found


def _training_plots(bench: Bench, rows: Mapping[str, Row]) -> Mapping[str, Image.Image]:
    """The loss by step, and faces that the finished model draws."""
    run_dir = bench.root / "teacher"
    if "training" not in rows:
        return {}
    lines = metric_lines(run_dir)
    parts = _parts([line["loss"] for line in lines])
    ticks = [f"{round((number + 1) / len(parts) * (lines[-1]['step'] + 1)):,}" for number in range(len(parts))]
    loss = line_plot(
        f"Loss of {RECIPE}",
        ticks,
        [Line("mean, lowest, highest", parts)],
        x_label="to optimizer step",
        y_label="squared error of the noise",
    )
    plots = {"loss": loss}
    if "quality" in rows:
        images = _drawn(bench, run_dir, bench.size.teacher_steps, count=_GRID)
        plots["faces"] = grid_image(images, columns=9)
    return plots


def _halving_plots(bench: Bench, rows: Mapping[str, Row]) -> Mapping[str, Image.Image]:
    """Losses of the stages and distances of their students; faces in few steps, from the same noise."""
    if "quality" not in rows:
        return {}
    chain = bench.root / "chain"
    losses = {run_dir.name: [line["loss"] for line in metric_lines(run_dir)] for run_dir in _trained(chain)}
    longest = [(name, values) for name, values in losses.items() if len(values) >= 2 * _TICKS][-_SHOWN:]
    ticks = [f"{number + 1}/{_TICKS}" for number in range(_TICKS)]
    stages = [Line(name, _parts(values), colour=number) for number, (name, values) in enumerate(longest)]
    curves = line_plot("Loss of the stages", ticks, stages, x_label="share of a stage's updates", y_label="weighted squared error")
    by_model, steps = _by_model(rows["quality"]), bench.size.measured_steps
    models = [Line(name, [[found[count]] for count in steps], colour=number) for number, (name, found) in enumerate(by_model.items())]
    distances = line_plot(
        "Frechet distance to held-out faces", list(map(str, steps)), models, x_label="sampling steps", y_label="squared feature units"
    )
    few = [count for count in steps if count <= 8]
    pictures = torch.stack([_drawn(bench, chain, count, count=_SHOWN) for count in few])
    sheet = draw_sheet([f"{count} steps" for count in few], [SheetGroup("students", pictures)])
    return {"loss": beside([curves, distances]), "faces": sheet}


def _drawn(bench: Bench, path: Path, steps: int, *, count: int) -> torch.Tensor:
    source = load_source(path, steps if (path / "chain.json").exists() else None)
    return draw_images(source, steps=steps, seed=0, count=count, precision=source.recipe.engine.precision, device=bench.device)


def _parts(values: Sequence[float]) -> list[Sequence[float]]:
    """The values in twelve neighbouring parts, or fewer where there are fewer values."""
    count = min(_TICKS, len(values))
    bounds = [len(values) * number // count for number in range(count + 1)]
    return [values[first:last] for first, last in pairwise(bounds)]


TRAINING = Part(
    title=f"{RECIPE}, 60 epochs of 3,000 faces of 64 px, batch 16",
    aim=f"at most {AIM_MINUTES} minutes (the paper: {PAPER_MINUTES} on an A100)",
    steps=_training,
    table=_training_table,
    met=lambda rows: rows["training"]["seconds"] <= AIM_MINUTES * 60 if "training" in rows else None,
    plots=_training_plots,
    chained=True,
)
HALVING = Part(
    title="that model halved to one sampling step",
    aim=f"at most {HALVING_AIM_MINUTES} minutes",
    steps=_halving,
    table=_halving_table,
    met=lambda rows: rows["halving"]["seconds"] <= HALVING_AIM_MINUTES * 60 if "halving" in rows else None,
    plots=_halving_plots,
    chained=True,
)
