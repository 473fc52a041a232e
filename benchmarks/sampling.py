"""Images a second of halfstep's sampler against diffusers' DDIMPipeline and DDPMPipeline on the same U-Net, on the CPU.

Ours is what `halfstep sample` and `evaluate` run, noise, steps and rounding to bytes; theirs a stock pipeline of the same weights with
as many images a batch, from their generators to a tensor (numpy has no bf16), progress bar off. The U-Net is that of a recipe with
random weights, sampled in a few of its levels. Both draw turn about in one process.

`equal`: fp32, contiguous memory, both. `best`: the fastest of each side's documented settings: fp32 or bf16 weights (torch_dtype of
diffusers), contiguous or channels_last memory."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from measure import print_ratio
from random_teacher import write_teacher

from trainer.config import Sampler
from trainer.config_io import load_recipe, recipe_path
from trainer.export import export_pipeline
from trainer.sample import draw_share
from trainer.source import Source, denoiser_on, load_source

Draw = Callable[[], float]
"""Draws all images once; returns the seconds."""
SETTINGS = {
    "fp32": (torch.float32, torch.contiguous_format),
    "fp32_channels_last": (torch.float32, torch.channels_last),
    "bf16": (torch.bfloat16, torch.contiguous_format),
    "bf16_channels_last": (torch.bfloat16, torch.channels_last),
}
SAMPLERS: tuple[Sampler, ...] = ("ddim", "ancestral")


def main() -> None:
    """Print one JSON line for each sampler, batch and setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, about a minute in all")
    parser.add_argument("--repeats", type=int, help="turns that each side gets (3 with --quick, else 15)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = load_recipe(recipe_path(options.recipe), ["distill=null"])
    size = config.data.image_size or (config.data.faces.size if config.data.faces else 32)
    with tempfile.TemporaryDirectory() as folder:
        teacher = write_teacher(Path(folder) / "teacher", config, image_size=size)
        for sampler in SAMPLERS:
            for batch in options.batches:
                draws: dict[str, Draw] = {}
                for name in SETTINGS:
                    draws[f"ours_{name}"] = _ours(load_source(teacher), name, sampler, steps=options.steps, batch=batch)
                    draws[f"theirs_{name}"] = _theirs(load_source(teacher), name, sampler, steps=options.steps, batch=batch)
                seconds = _take_turns(draws, options.repeats or (3 if options.quick else 15))
                _report(seconds, sampler, steps=options.steps, batch=batch)


def _take_turns(draws: dict[str, Draw], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side's turns; the order is reversed every other time."""
    for draw in draws.values():
        draw()
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    for repeat in range(repeats):
        for name in list(draws) if repeat % 2 == 0 else list(draws)[::-1]:
            seconds[name].append(draws[name]())
    return seconds


def _report(seconds: dict[str, list[float]], sampler: Sampler, *, steps: int, batch: int) -> None:
    pipeline = "DDIMPipeline" if sampler == "ddim" else "DDPMPipeline"

    def line(kind: str, ours: str, theirs: str) -> None:
        ratios = [other / own for own, other in zip(seconds[ours], seconds[theirs], strict=True)]
        print_ratio(
            f"sampling_{sampler}_{steps}_steps_batch_{batch}_{kind}",
            ratios,
            against=f"diffusers' {pipeline}, {theirs}, {ours}",
            images_per_second=batch / statistics.median(seconds[ours]),
            theirs=batch / statistics.median(seconds[theirs]),
        )

    def best(side: str) -> str:
        return min((f"{side}_{name}" for name in SETTINGS), key=lambda name: statistics.median(seconds[name]))

    line("equal", "ours_fp32", "theirs_fp32")
    line("best", best("ours"), best("theirs"))


def _ours(source: Source, setting: str, sampler: Sampler, *, steps: int, batch: int) -> Draw:
    dtype, layout = SETTINGS[setting]
    source.model.to(memory_format=layout)  # pyright: ignore[reportCallIssue] (a keyword-only overload)
    predict = denoiser_on(source.model, torch.device("cpu"), precision="bf16" if dtype == torch.bfloat16 else "fp32")

    def draw() -> float:
        started = time.perf_counter()
        draw_share(
            predict, source, steps=steps, seed=0, indices=range(batch), sampler=sampler, batch_size=batch, device=torch.device("cpu")
        )
        return time.perf_counter() - started

    return draw


def _theirs(source: Source, setting: str, sampler: Sampler, *, steps: int, batch: int) -> Draw:
    dtype, layout = SETTINGS[setting]
    pipeline = export_pipeline(replace(source, descriptor=replace(source.descriptor, sampler=sampler)))
    assert isinstance(pipeline, DDIMPipeline | DDPMPipeline) and isinstance(pipeline.unet, UNet2DModel), "stock ones"
    pipeline.unet.to(dtype=dtype, memory_format=layout)  # pyright: ignore[reportCallIssue]
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> float:
        started = time.perf_counter()
        generators = [torch.Generator("cpu").manual_seed(image) for image in range(batch)]
        pipeline(batch_size=batch, generator=generators, num_inference_steps=steps, output_type="pt")
        return time.perf_counter() - started

    return draw


if __name__ == "__main__":
    main()
