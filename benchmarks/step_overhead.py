"""Images a second of `halfstep train` against a bare loop with the same model, engine, precision, threads and ranks.

The bare loop does forward, backward, reduction (DistributedDataParallel, FSDP2 or DeepSpeed ZeRO-2 as their manuals say), clipping,
AdamW and EMA on batches that are in memory. Both run as processes of their own, turn about; each prints the median seconds a step
after a warm-up."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers.models.unets.unet_2d import UNet2DModel
from measure import print_ratio, run_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from launch.data import pack_faces
from trainer.config import FacesConfig, RunConfig, pixel_model
from trainer.config_io import load_recipe, recipe_path
from trainer.models.tiny_unet import build_tiny_unet, shard_units

WARM_UP_STEPS = 5
ROWS = (("replicated", 1), ("replicated", 2), ("fsdp", 2), ("deepspeed", 2))
Loss = Callable[[nn.Module], Tensor]
Update = Callable[[Sequence[Loss]], None]
AGAINST = {"replicated": "PyTorch DDP", "fsdp": "PyTorch FSDP2", "deepspeed": "DeepSpeed ZeRO-2"}


def main() -> None:
    """Print one JSON line for each engine and number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter repeats, about two minutes in all")
    parser.add_argument("--repeats", type=int, help="repeats to take (1 with --quick, else 5)")
    parser.add_argument("--engines", nargs="*", default=list(AGAINST), choices=list(AGAINST), help="only these engines")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        _bare_rank(options.bare, options.recipe, engine=options.engine, steps=options.steps)
        return
    steps, repeats = (15, 1) if options.quick else (40, 5)
    with tempfile.TemporaryDirectory() as folder:
        shards = pack_faces(FacesConfig(count=512), Path(folder) / "shards")
        for engine, ranks in ROWS:
            if engine not in options.engines:
                continue
            ratios, speeds = [], []
            for repeat in range(options.repeats or repeats):
                run_dir = Path(folder) / f"run_{engine}_{ranks}_{repeat}"
                ours = _ours(run_dir, options.recipe, shards, engine=engine, ranks=ranks, steps=steps)
                bare = _bare(Path(folder), options.recipe, engine=engine, ranks=ranks, steps=steps)
                ratios.append(bare / ours)
                speeds.append(load_recipe(recipe_path(options.recipe)).data.global_batch_size / ours)
            against = f"a bare {AGAINST[engine]} loop on batches in memory"
            print_ratio(f"step_overhead_{engine}_{ranks}_ranks", ratios, against=against, images_per_second=statistics.median(speeds))


def _ours(run_dir: Path, recipe: str, shards: Path, *, engine: str, ranks: int, steps: int) -> float:
    """Seconds a step of `halfstep train`, as its own metrics tell; they leave nothing out but checkpoints and sample grids."""
    command = [sys.executable, "-m", "launch", "train", recipe, "--run-dir", str(run_dir), "--ranks", str(ranks), f"data.shards={shards}"]
    command += [f"train.steps={steps}", "lr_schedule.kind=constant", "logging.sample_every_steps=0", "distill=null"]
    subprocess.run([*command, f"engine.kind={engine}"], check=True, capture_output=True)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["step_seconds"] for line in lines[WARM_UP_STEPS:])


def _bare(folder: Path, recipe: str, *, engine: str, ranks: int, steps: int) -> float:
    """Seconds a step of the bare loop."""
    out = folder / "seconds"
    run_ranks([__file__, "--bare", str(out), "--engine", engine, "--steps", str(steps), "--recipe", recipe], ranks=ranks)
    return float(out.read_text())


def _bare_rank(out: Path, recipe: str, *, engine: str, steps: int) -> None:
    """One rank of the bare loop; rank 0 writes the median seconds a step to `out`."""
    config = load_recipe(recipe_path(recipe))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(0)
    model = build_tiny_unet(pixel_model(config), 32)
    if world_size > 1:
        dist.init_process_group("gloo")
    micro = config.data.micro_batch_size
    accumulation = config.data.global_batch_size // micro // world_size
    update = _BARE[engine](model, config, accumulation)
    count = micro * accumulation
    batches = [(torch.rand(count, 3, 32, 32) * 2 - 1, torch.randn(count, 3, 32, 32), torch.rand(count)) for _ in range(8)]
    bf16 = config.engine.precision == "bf16"

    def loss_of(trained: nn.Module, *, part: tuple[Tensor, ...]) -> Tensor:
        x_0, noise, times = part
        alpha, sigma = (f(times * torch.pi / 2).view(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            prediction = trained(alpha * x_0 + sigma * noise, times * 1000).sample
            return torch.nn.functional.mse_loss(prediction.float(), alpha * noise - sigma * x_0)

    seconds = []
    for step in range(steps):
        started = time.perf_counter()
        parts = list(zip(*(tensor.split(micro) for tensor in batches[step % len(batches)]), strict=True))
        update([partial(loss_of, part=part) for part in parts])
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        out.write_text(repr(statistics.median(seconds[WARM_UP_STEPS:])))
    if world_size > 1:
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort while the interpreter tears down


def _bare_ddp(model: UNet2DModel, config: RunConfig, accumulation: int) -> Update:
    """A step as PyTorch's DDP tutorial writes it."""
    trained = DistributedDataParallel(model, gradient_as_bucket_view=True) if dist.is_initialized() else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.learning_rate, fused=True)
    average = [parameter.detach().clone() for parameter in model.parameters()]

    def update(losses: Sequence[Loss]) -> None:
        loss = torch.zeros(())
        optimizer.zero_grad(set_to_none=True)
        for number, loss_of in enumerate(losses):
            if isinstance(trained, DistributedDataParallel):
                trained.require_backward_grad_sync = number == accumulation - 1
            loss = loss_of(trained) / accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(model.parameters()), 0.005)
        loss.item()

    return update


def _bare_fsdp(model: UNet2DModel, config: RunConfig, accumulation: int) -> Update:
    """A step as PyTorch's FSDP2 tutorial writes it: blocks and root sharded, AdamW on the shards."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    lower = torch.bfloat16 if config.engine.precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in (*shard_units(model), model):
        fully_shard(unit, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.learning_rate, fused=True)
    average = [_local(parameter).clone() for parameter in model.parameters()]

    def update(losses: Sequence[Loss]) -> None:
        loss = torch.zeros(())
        for loss_of in losses:
            loss = loss_of(model) / accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, [_local(parameter) for parameter in model.parameters()], 0.005)
        loss.item()

    return update


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor), "FSDP2 shards every parameter"
    return parameter.to_local().detach()


def _bare_deepspeed(model: UNet2DModel, config: RunConfig, accumulation: int) -> Update:
    """A step as DeepSpeed's manual writes it, with its own clipping; bf16 by its torch_autocast section."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings = {
        "train_micro_batch_size_per_gpu": config.data.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": 2, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
        "steps_per_print": 2**62,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.learning_rate, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    average = [parameter.detach().clone() for parameter in model.parameters()]

    def update(losses: Sequence[Loss]) -> None:
        loss = torch.zeros(())
        for loss_of in losses:
            loss = loss_of(engine)
            engine.backward(loss)
            engine.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(model.parameters()), 0.005)
        loss.item()

    return update


_BARE = {"replicated": _bare_ddp, "fsdp": _bare_fsdp, "deepspeed": _bare_deepspeed}


if __name__ == "__main__":
    main()
