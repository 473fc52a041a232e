"""Images a second of `halfstep train` against diffusers' train_unconditional.py on the same U-Net, run beside it.

Two CPU ranks of one thread, the same pictures, batch, precision and settings: a step draws noise and times, predicts the noise, clips,
updates by AdamW and averages the weights. Theirs is examples/unconditional_image_generation/train_unconditional.py of a checkout
(--diffusers), untouched, on accelerate. Both sides run turn about; a clock hooked to torch's optimizers notes when each step of rank 0
ends, in wall seconds and in CPU seconds of its process.

`fp32`, `bf16`: equal precision and settings. `best`: the fastest of each side's documented settings: ours in bf16, as images lie or
channels last, compiled (train.compile) or not; theirs in either precision, compiled (accelerate's ACCELERATE_DYNAMO_BACKEND=inductor)
or not. Compiling takes minutes, so the first round measures every way and the others the equal ones and each side's fastest. --quick
compiles neither.

`limit`: the ratio of a side of which nothing but the network's convolutions, products and attention took time, at the rate of one core's
square bf16 products, against theirs at its best."""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import yaml
from diffusers_steps import RANKS, Bench, Recipe, Speed, best_pairs, best_ways, check_scripts, report
from gpu_parts.bench import matmul_teraflops
from measure import print_ratio

from trainer.config import TinyUNetConfig
from trainer.models.flops import forward_flops
from trainer.models.tiny_unet import build_tiny_unet

SCRIPT = "examples/unconditional_image_generation/train_unconditional.py"
BATCH, SIDE = 8, 64
# Their script draws pictures at the end of its first epoch, which a run must not come to.
PICTURES = 1024
PROFILED_STEPS = 14
"""So many hold those that --profile watches."""
EQUAL = ("ours fp32", "theirs fp32", "ours bf16", "theirs bf16")
MODEL = TinyUNetConfig(
    channels=(64, 128, 192, 192), attention=(False, False, True, True), layers_per_block=2, attention_heads=4, norm_groups=32
)


def main() -> None:
    """Print a JSON line for each way of running it, of wall time and of processor time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, required=True, help="a checkout of github.com/huggingface/diffusers")
    parser.add_argument("--quick", action="store_true", help="one short repeat")
    parser.add_argument("--repeats", type=int, help="repeats to take (1 with --quick, else 5)")
    parser.add_argument("--profile", action="store_true", help="only show where a bf16 step of ours goes, a minute")
    options = parser.parse_args()
    check_scripts(parser, options.diffusers, [SCRIPT])
    steps, repeats = (8, 1) if options.quick else (24, 5)
    assert steps * RANKS * BATCH < PICTURES, "no epoch ends"
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), options.diffusers.resolve())
        bench.write_pictures(PICTURES, SIDE)
        build_tiny_unet(MODEL, SIDE).save_config(_shape(bench))
        if options.profile:
            _profile(bench)
            return
        ways = _ways(bench, steps=steps, compiled=not options.quick)
        rounds = [{name: measure() for name, measure in ways.items()}]
        again = {*EQUAL, *best_ways(rounds)}
        for _ in range((options.repeats or repeats) - 1):
            rounds.append({name: measure() for name, measure in ways.items() if name in again})
        for way in ("fp32", "bf16"):
            _report(way, [(each[f"theirs {way}"], each[f"ours {way}"]) for each in rounds])
        best = best_pairs([{name: each[name] for name in again} for each in rounds])
        _report("best", best)
        _report_limit([theirs for theirs, _ in best])


def _report(way: str, pairs: list[tuple[Speed, Speed]]) -> None:
    report(f"unconditional_step_{way}", pairs, against="diffusers' train_unconditional.py", images=RANKS * BATCH)


def _profile(bench: Bench) -> None:
    recipe, run_dir = bench.folder / "profile.yaml", bench.folder / "profiled"
    recipe.write_text(yaml.safe_dump(_recipe(bench, "bf16", {"steps": PROFILED_STEPS})))
    command = [sys.executable, "-m", "launch", "train", str(recipe), "--run-dir", str(run_dir), "--ranks", str(RANKS), "--profile"]
    subprocess.run(command, check=True)
    for table in (run_dir / "profile").glob("*.txt"):
        sys.stdout.write(table.read_text())


def _report_limit(theirs: Sequence[Speed]) -> None:
    torch.set_num_threads(1)
    rate = matmul_teraflops(torch.device("cpu"), side=2048) * 1e12
    forward = forward_flops(lambda: build_tiny_unet(MODEL, SIDE), image_shape=(3, SIDE, SIDE))
    seconds = 3 * forward * BATCH / rate  # a forward pass, and twice as much for the gradients of inputs and weights
    print_ratio(
        "unconditional_step_limit",
        [each.cpu / seconds for each in theirs],
        against="the network's arithmetic alone, in processor time of rank 0",
        milliseconds_per_step=seconds * 1e3,
        gigaflops_per_second=rate / 1e9,
    )


def _shape(bench: Bench) -> Path:
    """The U-Net's config.json."""
    return bench.folder / "unet"


def _ways(bench: Bench, *, steps: int, compiled: bool) -> dict[str, Callable[[], Speed]]:
    """What measures each way, ours and theirs by turns."""
    last = {"memory_format": "channels_last"}
    settings = {"ours fp32": {}, "theirs fp32": {}, "ours bf16": {}, "theirs bf16": {}, "ours bf16 channels_last": last}
    if compiled:
        settings |= {f"{way} compiled": {**settings[way], "compile": True} for way in settings if way != "ours fp32"}

    def measure(way: str, train: Mapping[str, object]) -> Speed:
        side, precision, *_ = way.split()
        if side == "ours":
            return bench.ours(way.removeprefix("ours "), _recipe(bench, precision, train), steps=steps)
        return _theirs(bench, precision, steps=steps, compiled="compile" in train)

    return {way: partial(measure, way, train) for way, train in settings.items()}


def _recipe(bench: Bench, precision: str, train: Mapping[str, object]) -> Recipe:
    """The settings of their script. train: of the section of that name."""
    return {
        "data": {"shards": str(bench.shards), "global_batch_size": RANKS * BATCH, "micro_batch_size": BATCH},
        "model": MODEL.model_dump(mode="json"),
        "objective": {"kind": "denoising", "prediction": "eps", "loss": "mse"},
        "noise_schedule": {"kind": "linear", "steps": 1000},
        "optim": {"learning_rate": 1e-4, "betas": [0.95, 0.999], "weight_decay": 1e-6},
        "lr_schedule": {"kind": "constant"},
        "ema": {"decay": 0.9999},
        "train": dict(train),
        "engine": {"precision": precision},
        "logging": {"sample_every_steps": 0},
    }


def _theirs(bench: Bench, precision: str, *, steps: int, compiled: bool = False) -> Speed:
    words = ["--train_data_dir", str(bench.pictures), "--cache_dir", str(bench.folder / "cache")]
    words += ["--model_config_name_or_path", str(_shape(bench)), "--resolution", str(SIDE), "--center_crop"]
    words += ["--train_batch_size", str(BATCH), "--num_epochs", "1000", "--use_ema"]
    words += ["--learning_rate", "1e-4", "--lr_scheduler", "constant", "--lr_warmup_steps", "0", "--checkpointing_steps", "1000000"]
    words += ["--mixed_precision", {"fp32": "no"}.get(precision, precision)]
    variables = {"ACCELERATE_DYNAMO_BACKEND": "inductor"} if compiled else {}
    return bench.theirs(f"{precision}{' compiled' if compiled else ''}", SCRIPT, words, steps=steps, variables=variables)


if __name__ == "__main__":
    main()
