"""Images a second of `halfstep train` against a bare PyTorch loop with the same model, precision, threads and ranks.

The bare loop does forward, backward, all-reduce (DistributedDataParallel), clipping, AdamW and EMA on batches that are in memory.
Both run as processes of their own, turn about; each prints the median seconds a step after a warm-up."""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import print_ratio

from launch.rank_env import rank_environment
from launch.start import pack_faces
from trainer.config import FacesConfig
from trainer.config_io import load_recipe, recipe_path

WARM_UP_STEPS = 5


def main() -> None:
    """Print one JSON line for each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter repeats, under a minute in all")
    parser.add_argument("--repeats", type=int, help="repeats to take (1 with --quick, else 5)")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        _bare_rank(options.bare, steps=options.steps)
        return
    steps, repeats = (15, 1) if options.quick else (40, 5)
    with tempfile.TemporaryDirectory() as folder:
        shards = pack_faces(FacesConfig(count=512), Path(folder) / "shards")
        repeats = options.repeats or repeats
        for ranks in (1, 2):
            ratios, speeds = [], []
            for repeat in range(repeats):
                ours = _ours(Path(folder) / f"run_{ranks}_{repeat}", options.recipe, shards, ranks=ranks, steps=steps)
                bare = _bare(Path(folder), options.recipe, ranks=ranks, steps=steps)
                ratios.append(bare / ours)
                speeds.append(load_recipe(recipe_path(options.recipe)).data.global_batch_size / ours)
            against = "a bare PyTorch loop on batches in memory"
            print_ratio(f"step_overhead_{ranks}_ranks", ratios, against=against, images_per_second=statistics.median(speeds))


def _ours(run_dir: Path, recipe: str, shards: Path, *, ranks: int, steps: int) -> float:
    """Seconds a step of `halfstep train`, as its own metrics tell; they leave nothing out but checkpoints and sample grids."""
    command = [sys.executable, "-m", "launch", "train", recipe, "--run-dir", str(run_dir), "--ranks", str(ranks), f"data.shards={shards}"]
    command += [f"train.steps={steps}", "lr_schedule.kind=constant", "logging.sample_every_steps=0", "distill=null"]
    subprocess.run(command, check=True, capture_output=True)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["step_seconds"] for line in lines[WARM_UP_STEPS:])


def _bare(folder: Path, recipe: str, *, ranks: int, steps: int) -> float:
    """Seconds a step of the bare loop."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--bare", str(folder / "seconds"), "--steps", str(steps), "--recipe", recipe]
    inherited = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks_running = []
    for rank in range(ranks):
        environment = rank_environment(
            inherited,
            rank=rank,
            local_rank=rank,
            local_world_size=ranks,
            world_size=ranks,
            master_address="127.0.0.1",
            master_port=port,
            threads=1,
        )
        ranks_running.append(subprocess.Popen(command, env=environment))
    if any(process.wait() for process in ranks_running):
        raise RuntimeError("a rank of the bare loop failed")
    return float((folder / "seconds").read_text())


def _bare_rank(out: Path, *, steps: int) -> None:
    """One rank of the bare loop; rank 0 writes the median seconds a step to `out`."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from trainer.models.tiny_unet import build_tiny_unet

    config = load_recipe(recipe_path(sys.argv[sys.argv.index("--recipe") + 1]))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(0)
    model = build_tiny_unet(config.model, 32)
    average = [parameter.detach().clone() for parameter in model.parameters()]
    trained: torch.nn.Module = model
    if world_size > 1:
        dist.init_process_group("gloo")
        trained = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.learning_rate, fused=True)
    count, micro = config.data.global_batch_size // world_size, config.data.micro_batch_size
    batches = [(torch.rand(count, 3, 32, 32) * 2 - 1, torch.randn(count, 3, 32, 32), torch.rand(count)) for _ in range(8)]
    bf16 = config.engine.precision == "bf16"
    seconds = []
    for step in range(steps):
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss, parts = torch.tensor(0.0), list(zip(*(tensor.split(micro) for tensor in batches[step % len(batches)]), strict=True))
        for number, (x_0, noise, times) in enumerate(parts):
            if isinstance(trained, DistributedDataParallel):
                trained.require_backward_grad_sync = number == len(parts) - 1
            alpha, sigma = (f(times * torch.pi / 2).view(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                prediction = trained(alpha * x_0 + sigma * noise, times * 1000).sample
                loss = torch.nn.functional.mse_loss(prediction.float(), alpha * noise - sigma * x_0)
            (loss / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(model.parameters()), 0.005)
        loss.item()
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        out.write_text(repr(statistics.median(seconds[WARM_UP_STEPS:])))
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
