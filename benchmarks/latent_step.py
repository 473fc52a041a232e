"""Images a second of our LoRA and inpainting steps against diffusers' own example scripts run beside them.

Two CPU ranks of one thread, the same small Stable Diffusion, the same pictures, batch and precision; theirs are
examples/text_to_image/train_text_to_image_lora.py and examples/research_projects/dreambooth_inpaint/train_dreambooth_inpaint.py of a
checkout (--diffusers), untouched, on accelerate. Both sides run turn about. A clock hooked to torch's optimizers notes when each step
of rank 0 ends, in wall seconds and in CPU seconds of its process."""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusers_steps import RANKS, Bench, Recipe, Speed, best_pairs, check_scripts, report

from trainer.architectures import Architecture
from trainer.tiny_models.pipelines import write_pipeline
from trainer.tiny_models.shapes import tiny_architecture
from trainer.tiny_models.vocabulary import WORDS

BATCH, SIDE, PICTURES = 4, 128, 256
PROMPT = "a sks face"
# Large enough for arithmetic to outweigh bookkeeping, in Stable Diffusion's proportions: a U-Net of 14.8 million weights (0.97 GFLOP an
# image forwards at 128 pixels) beside an encoder of 1.9 GFLOP; with 512 pixels the true ones have 0.8 and 1.1 TFLOP.
SHAPE: Mapping[str, Mapping[str, object]] = {
    "unet": {"block_out_channels": [64, 128, 192, 192], "norm_num_groups": 32, "cross_attention_dim": 128, "attention_head_dim": 4},
    "vae": {"block_out_channels": [32, 64, 96, 96], "norm_num_groups": 16},
    "text_encoder": {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "projection_dim": 128},
}
SCRIPTS = {
    "lora": "examples/text_to_image/train_text_to_image_lora.py",
    "inpainting": "examples/research_projects/dreambooth_inpaint/train_dreambooth_inpaint.py",
}
KINDS = {"lora": "stable_diffusion", "inpainting": "stable_diffusion_inpainting"}


def main() -> None:
    """Print a JSON line for each task and way of running it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, required=True, help="a checkout of github.com/huggingface/diffusers")
    parser.add_argument("--quick", action="store_true", help="one short repeat")
    parser.add_argument("--repeats", type=int, help="repeats to take (1 with --quick, else 5)")
    parser.add_argument("--tasks", nargs="*", default=list(SCRIPTS), choices=list(SCRIPTS))
    options = parser.parse_args()
    check_scripts(parser, options.diffusers, [SCRIPTS[task] for task in options.tasks])
    steps, repeats = (8, 1) if options.quick else (24, 5)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), options.diffusers.resolve())
        _write(bench, options.tasks)
        for task in options.tasks:
            rounds = [_round(bench, task, steps=steps) for _ in range(options.repeats or repeats)]
            against = f"diffusers' {task} script"
            for way in ("fp32", "bf16"):
                pairs = [(each[f"theirs {way}"], each[f"ours {way}"]) for each in rounds]
                report(f"latent_step_{task}_{way}", pairs, against=against, images=RANKS * BATCH)
            report(f"latent_step_{task}_best", best_pairs(rounds), against=against, images=RANKS * BATCH)


def _round(bench: Bench, task: str, *, steps: int) -> dict[str, Speed]:
    """Every way once, ours and theirs by turns."""
    ways = {}
    for precision in ("fp32", "bf16"):
        ways[f"ours {precision}"] = bench.ours(f"{task} {precision}", _equal(bench, task, precision), steps=steps)
        ways[f"theirs {precision}"] = _theirs(bench, task, precision, steps=steps)
    ways["ours best"] = bench.ours(f"{task} best", _best(bench, task), steps=steps)
    return ways


def _base(bench: Bench, task: str) -> Path:
    """The pipeline that is fine-tuned."""
    return bench.folder / task


def _stored(bench: Bench) -> Path:
    """The pictures as latents and text states."""
    return bench.folder / "stored"


def _equal(bench: Bench, task: str, precision: str) -> Recipe:
    """Our recipe with the settings of their script."""
    lora = task == "lora"
    return {
        "data": {"shards": str(bench.shards), "global_batch_size": RANKS * BATCH, "micro_batch_size": BATCH},
        "model": {"kind": "stable_diffusion", "base": str(_base(bench, task)), "frozen_precision": precision},
        "adaptation": {"kind": "lora", "rank": 4} if lora else {"kind": "full"},
        "objective": {"kind": "latent_denoising", **({} if lora else {"inpainting": {}})},
        **({} if lora else {"dreambooth": {"instance_prompt": PROMPT}}),
        "optim": {"learning_rate": 1e-4},
        "lr_schedule": {"kind": "constant"},
        "engine": {"precision": precision},
        "logging": {"sample_every_steps": 0},
    }


def _best(bench: Bench, task: str) -> Recipe:
    """What docs/ says is fastest on CPU cores: bf16, and for LoRA channels last with latents and text states from the shards."""
    recipe = _equal(bench, task, "bf16")
    if task == "lora":
        recipe["train"] = {"memory_format": "channels_last"}
        recipe["data"] = {**recipe["data"], "shards": str(_stored(bench))}
        recipe["model"] |= {"latents": "stored", "text": "stored"}
    return recipe


def _theirs(bench: Bench, task: str, precision: str, *, steps: int) -> Speed:
    words = ["--pretrained_model_name_or_path", str(_base(bench, task)), "--resolution", str(SIDE), "--center_crop"]
    words += ["--train_batch_size", str(BATCH), "--max_train_steps", "1000000", "--seed", "0"]
    words += ["--learning_rate", "1e-4", "--lr_warmup_steps", "0", "--checkpointing_steps", "1000000"]
    words += ["--mixed_precision", {"fp32": "no"}.get(precision, precision)]
    if task == "lora":
        words += ["--train_data_dir", str(bench.pictures), "--cache_dir", str(bench.folder / "cache"), "--rank", "4"]
    else:
        words += ["--instance_data_dir", str(bench.pictures / "train"), "--instance_prompt", PROMPT]
    return bench.theirs(f"{task} {precision}", SCRIPTS[task], words, steps=steps)


def _write(bench: Bench, tasks: Sequence[str]) -> None:
    """Bases, pictures as files and as shards, and what our encoders make of these."""
    for task in tasks:
        write_pipeline(_shape(KINDS[task]), _base(bench, task), seed=0, vocabulary=WORDS)
    bench.write_pictures(PICTURES, SIDE)
    if "lora" in tasks:
        base = str(_base(bench, "lora"))
        command = [sys.executable, "-m", "launch", "shards", "encode", str(bench.shards), "--vae", base, "--text-encoder", base]
        subprocess.run([*command, "--size", str(SIDE), "--out", str(_stored(bench))], check=True, capture_output=True)


def _shape(kind: str) -> Architecture:
    tiny = tiny_architecture(kind)
    components = {part: entry.with_config(SHAPE.get(part, {})) for part, entry in tiny.components.items()}
    return Architecture(tiny.name, tiny.pipeline, tiny.source, tiny.settings, {}, components, tiny.beside)


if __name__ == "__main__":
    main()
