"""How much is spent on each part: the true sizes, and small ones that try everything on a CPU."""

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Size:
    """Sizes and lengths of all parts."""

    pixels: int = 64
    """A side of the faces of a and d."""
    faces: int = 3000
    held_out: int = 2000
    """Faces that distances are measured to."""
    settings: tuple[str, ...] = ("data.micro_batch_size=16", "data.workers=2", "checkpoint.every_steps=4000", "engine.attention=sdpa")
    """Changes to the recipe tiny_diffusion_53m."""
    compile: bool = True
    every_steps: int = 10
    """Between two lines of a's metrics."""
    images: int = 512
    """Drawn for a distance."""
    teacher_steps: int = 100
    """In which a's model draws them."""
    start_steps: int = 1000
    halving_batch: int = 64
    head_updates: int = 600
    updates: tuple[int, ...] = (4, 4, 4, 8, 20, 100, 300, 300, 400, 600)
    """Of the students of 500, 250, ... 1 steps."""
    rates: tuple[float, ...] = (1e-6, 1e-6, 1e-5, 1e-5, 5e-5, 1e-4, 2e-4, 3e-4, 3e-4, 3e-4)
    measured_steps: tuple[int, ...] = (32, 16, 8, 4, 2, 1)

    tiny: bool = False
    """Whether the bases below are kinds of tiny models, not architectures."""
    latent_base: str = "stable_diffusion_2_1"
    micro_batches: tuple[tuple[int, int], ...] = ((512, 32), (256, 128))
    """Pixels a side, and images of a step of b."""
    stored: int = 256
    """Images whose latents are stored."""
    run_steps: int = 30
    """Of a short run."""
    warm_up_steps: int = 8
    """Of these, the first that do not count."""
    matmul: int = 8192
    """Side of the products that measure the peak."""
    planned_batch: int = 8
    """Images of a step of f, but for tiny_diffusion_53m's own."""

    pixel_base: str = "ddpm_celebahq_256"
    sampling_pixels: int = 256
    sampling_steps: tuple[int, ...] = (1, 4, 8, 500, 1000)
    many_steps: int = 100
    """From so many on a drawing is timed once."""
    batches: tuple[int, ...] = (1, 16)
    """Images at a time of c."""
    backend: str = "inductor"
    """Of torch.compile in c."""

    attention_batch: int = 8
    attention_tokens: int = 10**6
    """Shapes of e in which more of them ask are left out."""
    attention_seconds: float = 0.3
    """Of each timing of e, at least."""


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
    ),
    compile=False,
    every_steps=1,
    images=16,
    teacher_steps=8,
    start_steps=4,
    halving_batch=16,
    head_updates=4,
    updates=(24, 24),
    rates=(1e-4, 1e-4),
    measured_steps=(2, 1),
    tiny=True,
    latent_base="stable_diffusion_v",
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
