"""How much is spent on each part: the true sizes, and small ones that try everything on a CPU."""

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Size:
    """Sizes and lengths of all parts.

    settings: changes to the recipe tiny_diffusion_53m; images: drawn for a distance, in `teacher_steps` of the teacher; updates, rates: of
    the halvings; latent_base: an architecture, or a kind of tiny model; micro_batches: images a step by pixels; run_steps: of a short
    run, of which the first `warm_up_steps` do not count; pixel_base: as latent_base; sampling_steps: of part c; many_steps: from so many
    on a drawing is timed once; batches: images at a time; backend, modes: of torch.compile in part c; matmul: side of the products that
    measure the peak; attention_batch: images of part e; attention_tokens: that ask, at most;
    attention_seconds: of each of its timings."""

    # a and d
    pixels: int = 64
    faces: int = 3000
    held_out: int = 2000
    settings: tuple[str, ...] = ("data.micro_batch_size=16", "data.workers=2", "checkpoint.every_steps=4000", "engine.attention=sdpa")
    compile: bool = True
    sample_every_steps: int = 5610
    every_steps: int = 10
    images: int = 512
    teacher_steps: int = 100
    start_steps: int = 1000
    halving_batch: int = 64
    head_updates: int = 600
    updates: tuple[int, ...] = (4, 4, 4, 8, 20, 100, 300, 300, 400, 600)
    rates: tuple[float, ...] = (1e-6, 1e-6, 1e-5, 1e-5, 5e-5, 1e-4, 2e-4, 3e-4, 3e-4, 3e-4)
    measured_steps: tuple[int, ...] = (32, 16, 8, 4, 2, 1)
    # b and f
    latent_base: str = "stable_diffusion_2_1"
    tiny: bool = False
    micro_batches: tuple[tuple[int, int], ...] = ((512, 32), (256, 128))
    stored: int = 256
    run_steps: int = 30
    warm_up_steps: int = 8
    matmul: int = 8192
    planned_batch: int = 8
    # c
    pixel_base: str = "ddpm_celebahq_256"
    sampling_pixels: int = 256
    sampling_steps: tuple[int, ...] = (1, 4, 8, 500, 1000)
    many_steps: int = 100
    batches: tuple[int, ...] = (1, 16)
    backend: str = "inductor"
    # e
    attention_batch: int = 8
    attention_tokens: int = 10**6
    attention_seconds: float = 0.3


FULL = Size()
SMOKE = Size(
    pixels=16,
    faces=64,
    held_out=64,
    settings=(
        "data.micro_batch_size=16",
        "checkpoint.every_steps=10",
        "model.channels=[16,32]",
        "model.attention=[false,true]",
        "model.layers_per_block=1",
        "model.attention_heads=2",
        "model.norm_groups=8",
        "train.steps=24",
        "logging.sample_steps=4",
    ),
    compile=False,
    sample_every_steps=24,
    every_steps=1,
    images=16,
    teacher_steps=8,
    start_steps=4,
    halving_batch=16,
    head_updates=4,
    updates=(24, 24),
    rates=(1e-4, 1e-4),
    measured_steps=(2, 1),
    latent_base="stable_diffusion_v",
    tiny=True,
    micro_batches=((64, 2), (128, 1)),
    stored=8,
    run_steps=4,
    warm_up_steps=1,
    matmul=256,
    planned_batch=2,
    pixel_base="ddpm",
    sampling_pixels=32,
    sampling_steps=(1, 4, 8),
    many_steps=8,
    batches=(1, 2),
    backend="aot_eager",
    attention_batch=1,
    attention_tokens=256,
    attention_seconds=0.01,
)
