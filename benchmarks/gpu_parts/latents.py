"""Part b: how fast Stable Diffusion 2.1's U-Net trains in its true shape, with random weights, on stored latents."""

import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from gpu_parts.bench import Bench, Part, Step, markdown
from gpu_parts.budget import Row
from trainer.architectures import read_architecture
from trainer.tiny_models.pipelines import write_pipeline
from trainer.tiny_models.shapes import tiny_architecture
from trainer.tiny_models.vocabulary import WORDS

RECIPE = "sd21_lora_cartoon"
ADAPTATIONS: Mapping[str, str] = {"full": "{kind: full}", "lora": "{kind: lora, rank: 4}"}
AIM_IMAGES_PER_SECOND, AIM_PIXELS = 120, 512


def written_base(bench: Bench, name: str) -> Path:
    """The folder of a pipeline of an architecture, or where the sizes are small of a kind of tiny model, with random weights; made once."""
    folder = bench.root / "bases" / name
    if not folder.exists():
        unfinished = folder.with_name(f"{name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shape = tiny_architecture(name) if bench.size.tiny else read_architecture(name)
        write_pipeline(shape, unfinished, seed=0, vocabulary=WORDS)
        os.replace(unfinished, folder)
    return folder


def stored(bench: Bench, pixels: int) -> Path:
    """Shards of latents and text states of faces of so many pixels, made once by the base's own encoders."""
    out, base = bench.root / f"stored_{pixels}", written_base(bench, bench.size.latent_base)
    side = max(pixels for pixels, _ in bench.size.micro_batches)
    faces = bench.pack(f"faces_{side}", count=bench.size.stored, pixels=side)
    if not (out / "index.json").exists():
        models = ("--vae", str(base), "--text-encoder", str(base))
        bench.commands.run(out.name, ["shards", "encode", str(faces), *models, "--size", str(pixels), "--out", str(out)])
    return out


def training_words(bench: Bench, adaptation: str, pixels: int, batch: int) -> list[str]:
    """Recipe and changes of a training on stored latents, one micro-batch a step."""
    base = written_base(bench, bench.size.latent_base)
    return [
        RECIPE,
        f"data.shards={stored(bench, pixels)}",
        "data.image_size=null",
        "data.horizontal_flip=false",
        f"data.global_batch_size={batch}",
        f"data.micro_batch_size={batch}",
        f"model={{kind: stable_diffusion, base: {base}, latents: stored, text: stored}}",
        f"adaptation={ADAPTATIONS[adaptation]}",
        "train.activation_checkpointing=false",
        "train.memory_format=channels_last",
        "engine.attention=sdpa",
    ]


def _steps(bench: Bench) -> Sequence[Step]:
    cases = [(adaptation, pixels, batch) for pixels, batch in bench.size.micro_batches for adaptation in ADAPTATIONS]
    return [(f"{adaptation}_{pixels}", partial(_train, bench, adaptation, pixels, batch)) for adaptation, pixels, batch in cases]


def _train(bench: Bench, adaptation: str, pixels: int, batch: int) -> Row:
    def words(images: int) -> list[str]:
        return [*training_words(bench, adaptation, pixels, images), bench.compiled]

    row = bench.largest_run(f"b_{adaptation}_{pixels}", words, batch=batch)
    return {"adaptation": adaptation, "pixels": pixels, "compiled": bench.size.compile, **row}


def _table(rows: Mapping[str, Row]) -> list[str]:
    heads = ("training", "pixels", "batch", "images/s", "ms a step", "TFLOP/s", "MFU", "peak GiB", "data wait %", "first step s")
    keys = (
        "images_per_second",
        "step_milliseconds",
        "teraflops_per_second",
        "mfu",
        "peak_memory_gib",
        "data_wait_percent",
        "first_step_seconds",
    )
    return markdown(heads, [[row["adaptation"], row["pixels"], row["batch"], *(row[key] for key in keys)] for row in rows.values()])


def _met(rows: Mapping[str, Row]) -> bool | None:
    row = rows.get(f"full_{AIM_PIXELS}")
    return None if row is None else row["images_per_second"] >= AIM_IMAGES_PER_SECOND


LATENTS = Part(
    title="Stable Diffusion 2.1's U-Net on stored latents, bf16, channels_last",
    aim=f"at least {AIM_IMAGES_PER_SECOND} images/s of full training at {AIM_PIXELS} px",
    steps=_steps,
    table=_table,
    met=_met,
)
