"""Part c: seconds an image of the 256-pixel DDPM by step count, ours against diffusers' own pipeline on the same weights."""

import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from PIL import Image
from plot import Line, line_plot
from random_teacher import write_teacher
from torch import nn

from gpu_parts.bench import Bench, Part, Step, markdown
from gpu_parts.budget import Row
from gpu_parts.latents import written_base
from trainer.config_io import load_recipe, recipe_path
from trainer.export import export_pipeline
from trainer.sample import draw_share
from trainer.source import Source, denoiser_on, load_source

RECIPE = "ddpm_celebahq_cartoon"
AIMS: Mapping[int, float] = {1000: 5.0, 4: 0.03}
"""Seconds an image, by step count."""
PAPER_SECONDS: Mapping[int, float] = {1000: 45.0, 500: 25.0}
"""An image on an A100, the middles of the paper's 44 to 46 and 24 to 26."""
_REPEATS, _WARM_UP_STEPS = 5, 4
_MODES: Mapping[str, str | None] = {"eager": None, "compiled": "reduce-overhead"}
"""torch.compile's mode: with CUDA graphs, which a single image wants."""
Draw = Callable[[int], float]
"""Draws a batch in so many steps; returns the seconds."""


def _steps(bench: Bench) -> Sequence[Step]:
    size = bench.size
    # one image at a time is what is compared with the paper; more are drawn by what is fastest
    ways = [("eager", size.batches[0]), *(("compiled", batch) for batch in size.batches)]
    drawn = cache(partial(_both, bench))
    return [
        (f"{mode}_{batch}_{steps:04d}", partial(_compare, bench, drawn, mode, batch, steps))
        for mode, batch in ways
        for steps in size.sampling_steps
    ]


def _compare(bench: Bench, drawn: Callable[[str, int], tuple[Draw, Draw]], mode: str, batch: int, steps: int) -> Row:
    """Both sides turn about, each in its own memory."""
    ours, theirs = drawn(mode, batch)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for repeat in range(1 if steps >= bench.size.many_steps else _REPEATS):
        for name, draw in [("ours", ours), ("theirs", theirs)][:: 1 if repeat % 2 == 0 else -1]:
            bench.budget.check()
            seconds[name].append(draw(steps))
    each = {name: statistics.median(values) / batch for name, values in seconds.items()}
    ratios = [other / own for own, other in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return {
        "mode": mode,
        "batch": batch,
        "steps": steps,
        "seconds_per_image": round(each["ours"], 5),
        "diffusers_seconds_per_image": round(each["theirs"], 5),
        "ratio": round(statistics.median(ratios), 3),
        "repeats": len(ratios),
        "times_faster_than_paper": round(PAPER_SECONDS[steps] / each["ours"], 1) if steps in PAPER_SECONDS else None,
    }


def _both(bench: Bench, mode: str, batch: int) -> tuple[Draw, Draw]:
    """Our sampler and diffusers' pipeline in bf16 and channels_last, warm."""
    teacher = _teacher(bench)
    ours, theirs = _ours(bench, load_source(teacher), mode, batch), _theirs(bench, load_source(teacher), mode, batch)
    for draw in (ours, theirs):
        draw(_WARM_UP_STEPS)
    return ours, theirs


def _teacher(bench: Bench) -> Path:
    """A RUN_DIR of the true shape with random weights, made once."""
    run_dir, base = bench.root / "random_teacher", written_base(bench, bench.size.pixel_base)
    if not (run_dir / "whole").exists():
        shutil.rmtree(run_dir, ignore_errors=True)
        config = load_recipe(recipe_path(RECIPE), [f"model.base={base}", "data.image_size=null", "train.activation_checkpointing=false"])
        write_teacher(run_dir, config, image_size=bench.size.sampling_pixels)
        (run_dir / "whole").touch()
    return run_dir


def _ours(bench: Bench, source: Source, mode: str, batch: int) -> Draw:
    source.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (a keyword-only overload)
    predict = denoiser_on(source.model, bench.device, precision="bf16")
    _compile(bench, source.model, mode)

    def draw(steps: int) -> float:
        began = time.perf_counter()  # the images come back to the host, so all has been done
        draw_share(predict, source, steps=steps, seed=0, indices=range(batch), sampler="ddim", batch_size=batch, device=bench.device)
        return time.perf_counter() - began

    return draw


def _theirs(bench: Bench, source: Source, mode: str, batch: int) -> Draw:
    pipeline = export_pipeline(source)
    assert isinstance(pipeline.unet, UNet2DModel), "a stock one"
    pipeline = DDIMPipeline(pipeline.unet, pipeline.scheduler)  # pyright: ignore[reportArgumentType] (it takes over another's config)
    pipeline.to(device=bench.device, dtype=torch.bfloat16)
    pipeline.unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    pipeline.set_progress_bar_config(disable=True)
    _compile(bench, pipeline.unet, mode)

    def draw(steps: int) -> float:
        generators = [torch.Generator("cpu").manual_seed(image) for image in range(batch)]
        began = time.perf_counter()
        pipeline(batch_size=batch, generator=generators, num_inference_steps=steps, output_type="pt").images.cpu()  # pyright: ignore[reportAttributeAccessIssue]
        return time.perf_counter() - began

    return draw


def _compile(bench: Bench, model: nn.Module, mode: str) -> None:
    if _MODES[mode] is not None:
        # not dynamic: a second batch size would else be compiled for any
        model.compile(backend=bench.size.backend, dynamic=False, **({"mode": _MODES[mode]} if bench.on_gpu else {}))


def _table(rows: Mapping[str, Row]) -> list[str]:
    heads = ("network", "images at once", "steps", "s an image", "diffusers' pipeline", "ratio", "x paper's")
    keys = ("mode", "batch", "steps", "seconds_per_image", "diffusers_seconds_per_image", "ratio", "times_faster_than_paper")
    return markdown(heads, [[row[key] for key in keys] for row in rows.values()])


def _fastest(rows: Mapping[str, Row], steps: int) -> float | None:
    return min((row["seconds_per_image"] for row in rows.values() if row["steps"] == steps and row["batch"] == 1), default=None)


def _met(rows: Mapping[str, Row]) -> bool | None:
    found = [(_fastest(rows, steps), aim) for steps, aim in AIMS.items()]
    if any(seconds is None for seconds, _ in found):
        return None
    return all(seconds <= aim for seconds, aim in found if seconds is not None)


def _plots(bench: Bench, rows: Mapping[str, Row]) -> Mapping[str, Image.Image]:
    if not rows:
        return {}
    steps = bench.size.sampling_steps
    ways = {(row["mode"], row["batch"]): None for row in rows.values()}
    lines = []
    for number, (mode, batch) in enumerate(ways):
        for who, key, dashed in (("ours", "seconds_per_image", False), ("diffusers", "diffusers_seconds_per_image", True)):
            found = {row["steps"]: row[key] for row in rows.values() if (row["mode"], row["batch"]) == (mode, batch)}
            values = [[found[count]] if count in found else [] for count in steps]
            lines.append(Line(f"{who}, {mode}, {batch} at once", values, colour=number, dashed=dashed))
    title = f"Seconds an image of {bench.size.sampling_pixels} pixels"
    return {"seconds": line_plot(title, list(map(str, steps)), lines, x_label="sampling steps", y_label="seconds")}


SAMPLING = Part(
    title="DDPM of 113.67M weights, 256 px, DDIM steps in bf16 and channels_last, against diffusers' DDIMPipeline",
    aim=" and ".join(f"{steps} steps within {seconds:g} s an image" for steps, seconds in AIMS.items()) + ", one image at a time",
    steps=_steps,
    table=_table,
    met=_met,
    plots=_plots,
)
