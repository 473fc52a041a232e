"""Pixel models as others publish them: pipelines that diffusers itself has written, and runs that start from them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from launch.data import with_data
from launch.run_dir import freeze
from trainer.config import RunConfig
from trainer.stop import StopRequest
from trainer.train import train
from trainer.watch import Watch

SIDE = 16


def write_stock(folder: Path, *, ddim: bool = False, seed: int = 0, unet: Mapping[str, object] | None = None, **scheduler: object) -> Path:
    """A pipeline in google's class structure with random weights; scheduler: settings other than diffusers' defaults."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = UNet2DModel(
            **{  # pyright: ignore[reportArgumentType]
                "sample_size": SIDE,
                "block_out_channels": (8, 16),
                "layers_per_block": 1,
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
                "norm_num_groups": 4,
                "norm_eps": 1e-6,
                "attention_head_dim": None,
                "downsample_padding": 0,
                "flip_sin_to_cos": False,
                "freq_shift": 1,
                **(unet or {}),
            }
        )
        for name, weight in network.named_parameters():
            if name.startswith("conv_out"):
                weight.data.mul_(5)  # else a random network says next to nothing
    pipeline = (
        DDIMPipeline(network, DDIMScheduler(**scheduler))  # pyright: ignore[reportArgumentType]
        if ddim
        else DDPMPipeline(network, DDPMScheduler(**scheduler))  # pyright: ignore[reportArgumentType]
    )
    pipeline.save_pretrained(folder)
    return folder


def recipe(root: Path, base: Path | str, **sections: Mapping[str, object]) -> RunConfig:
    """Two micro-batches of two faces a step, for three steps."""
    shards = root / "shards"
    if not shards.exists():
        pack(FacesSource("open-peeps", 8), shards, size=SIDE, workers=1)
    values: dict[str, Mapping[str, object]] = {
        "data": {"shards": str(shards), "global_batch_size": 4, "micro_batch_size": 2},
        "model": {"kind": "ddpm", "base": str(base)},
        "optim": {"learning_rate": 1e-3},
        "ema": {"decay": 0.5},
        "train": {"steps": 3},
        "checkpoint": {"every_steps": 2},
        "logging": {"sample_every_steps": 0, "sample_steps": 2},
    }
    return RunConfig.model_validate({**values, **{name: {**values.get(name, {}), **section} for name, section in sections.items()}})


def run(config: RunConfig, run_dir: Path) -> int:
    """Freeze and train, or go on, in this process; the exit code."""
    shards = Path(str(config.data.shards))
    freeze(run_dir, with_data(config, [shards], run_dir=run_dir, root=run_dir), shards=shards)
    watch = Watch(run_dir, rank=0, world_size=1, limit_seconds=300)
    try:
        return train(run_dir, StopRequest(), watch)
    finally:
        watch.close()
