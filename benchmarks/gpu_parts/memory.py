"""Parts f and g: what `halfstep plan` says of memory against what runs hold, and what each setting of a step is worth."""

import json
from collections.abc import Mapping, Sequence
from functools import partial

from gpu_parts.bench import Bench, Part, Step, markdown
from gpu_parts.budget import Row
from gpu_parts.faces import RECIPE as TINY_DIFFUSION
from gpu_parts.latents import training_words, written_base

_PIXELS_RECIPE = "ddpm_celebahq_cartoon"
_ALLOWED = 0.15
_LIKE_A_GPU = "a100-80gb"
"""Its type has no say in how much a step needs, only in whether it fits."""


def _words(bench: Bench) -> Mapping[str, Sequence[str]]:
    """Recipes and changes, by what they are called."""
    size, batch = bench.size, bench.size.planned_batch
    faces = bench.pack("faces", count=size.faces, pixels=size.pixels)
    larger = bench.pack(f"faces_{size.sampling_pixels}", count=max(size.stored, batch), pixels=size.sampling_pixels)
    batches = (f"data.global_batch_size={batch}", f"data.micro_batch_size={batch}")
    base = f"model.base={written_base(bench, size.pixel_base)}"
    ddpm = [_PIXELS_RECIPE, f"data.shards={larger}", f"data.image_size={size.sampling_pixels}", *batches, base]
    pixels, _ = size.micro_batches[0]
    return {
        "tiny_diffusion": [TINY_DIFFUSION, f"data.shards={faces}", *size.settings],
        "ddpm": [*ddpm, "train.activation_checkpointing=false"],
        "ddpm_checkpointed": ddpm,
        "full": training_words(bench, "full", pixels, batch),
        "lora": training_words(bench, "lora", pixels, batch),
    }


_PLANNED = ("tiny_diffusion", "ddpm", "ddpm_checkpointed", "full", "lora")


def _plans(bench: Bench) -> Sequence[Step]:
    return [(name, partial(_compare, bench, name)) for name in _PLANNED]


def _compare(bench: Bench, name: str) -> Row:
    """A run that is not compiled, as the plan's is not, and its plan."""
    words = _words(bench)[name]
    gpu = ("--gpu", _LIKE_A_GPU) if bench.on_gpu else ()
    plan = json.loads(bench.commands.run(f"plan_{name}", ["plan", *words, "--ranks", "1", *gpu, "--json"]))["rank_bytes"]
    planned = plan["peak"] / 2**30
    measured = bench.short_run(f"f_{name}", words)["peak_memory_gib"]
    return {
        "recipe": name,
        "planned_gib": round(planned, 3),
        "fullest": plan["fullest"],
        "measured_gib": measured,
        "planned_over_measured": round(planned / measured, 3),
        "measured": "tensors on the GPU" if bench.on_gpu else "the whole process",
    }


def _plan_table(rows: Mapping[str, Row]) -> list[str]:
    heads = ("recipe", "planned GiB", "measured GiB", "planned / measured", "planned fullest at", "measured is")
    keys = ("recipe", "planned_gib", "measured_gib", "planned_over_measured", "fullest", "measured")
    return markdown(heads, [[row[key] for key in keys] for row in rows.values()])


def _plans_met(rows: Mapping[str, Row]) -> bool | None:
    if rows.keys() != set(_PLANNED):
        return None
    return all(abs(row["planned_over_measured"] - 1) <= _ALLOWED for row in rows.values())


_SETTINGS: Mapping[str, tuple[tuple[str, ...], Mapping[str, str]]] = {
    "contiguous": (("train.memory_format=contiguous",), {}),
    "channels_last": ((), {}),
    "compiled": (("train.compile=true",), {}),
    "compiled_cuda_graphs": (("train.compile=true",), {"TORCHINDUCTOR_CUDAGRAPHS": "1"}),
}
"""Changes to the recipe, and variables, by what they are called."""


def _settings(bench: Bench) -> Sequence[Step]:
    chosen = [name for name in _SETTINGS if bench.size.compile or not name.startswith("compiled")]
    return [(name, partial(_try, bench, name)) for name in chosen]


def _try(bench: Bench, name: str) -> Row:
    changes, environment = _SETTINGS[name]
    words = [*_words(bench)["tiny_diffusion"], *changes]
    return {"setting": name, **bench.short_run(f"g_{name}", words, environment=environment)}


def _settings_table(rows: Mapping[str, Row]) -> list[str]:
    heads = ("step of tiny_diffusion_53m, bf16", "ms a step", "images/s", "MFU", "peak GiB", "first step s")
    keys = ("setting", "step_milliseconds", "images_per_second", "mfu", "peak_memory_gib", "first_step_seconds")
    return markdown(heads, [[row[key] for key in keys] for row in rows.values()])


PLANS = Part(
    title="memory that halfstep plan says and that a run holds, not compiled",
    aim=f"each within {_ALLOWED:.0%}",
    steps=_plans,
    table=_plan_table,
    met=_plans_met,
)
SETTINGS = Part(
    title="what each setting is worth to a step",
    aim="none",
    steps=_settings,
    table=_settings_table,
    met=lambda rows: None,
)
