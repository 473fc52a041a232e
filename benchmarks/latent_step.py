"""Images a second of our LoRA and inpainting steps against diffusers' own example scripts run beside them.

Two CPU ranks of one thread, the same small Stable Diffusion, the same pictures, batch and precision; theirs are
examples/text_to_image/train_text_to_image_lora.py and examples/research_projects/dreambooth_inpaint/train_dreambooth_inpaint.py of a
checkout (--diffusers), untouched, on accelerate. Both sides run turn about. A clock hooked to torch's optimizers notes when each step
of rank 0 ends, in wall seconds and in CPU seconds of its process."""

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import yaml
from measure import print_ratio
from PIL import Image

from data_shards.sources.faces import FacesSource
from launch.cluster import LocalCluster
from launch.data import pack_faces
from launch.place import Place
from launch.rank_env import cluster_variables, interface_variables
from trainer.architectures import Architecture
from trainer.config import FacesConfig
from trainer.tiny_models.pipelines import write_pipeline
from trainer.tiny_models.shapes import tiny_architecture
from trainer.tiny_models.vocabulary import WORDS

HERE = Path(__file__).parent
RANKS, BATCH, SIDE, PICTURES = 2, 4, 128, 256
WARM_UP_STEPS = 3
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


@final
@dataclass(frozen=True)
class Speed:
    """Median seconds of a step, of the wall clock and of rank 0's processor time."""

    wall: float
    cpu: float


@final
@dataclass(frozen=True)
class Files:
    """What both sides read. diffusers: a checkout with examples/."""

    folder: Path
    diffusers: Path

    def base(self, task: str) -> Path:
        """The pipeline that is fine-tuned."""
        return self.folder / task

    @property
    def pictures(self) -> Path:
        """PNG files, and metadata.jsonl with their captions in a folder beside."""
        return self.folder / "pictures"

    @property
    def shards(self) -> Path:
        """The same pictures, packed."""
        return self.folder / "shards"

    @property
    def stored(self) -> Path:
        """The same as latents and text states."""
        return self.folder / "stored"


def main() -> None:
    """Print a JSON line for each task and way of running it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, required=True, help="a checkout of github.com/huggingface/diffusers")
    parser.add_argument("--quick", action="store_true", help="one short repeat, about five minutes")
    parser.add_argument("--repeats", type=int, help="repeats to take (1 with --quick, else 5)")
    parser.add_argument("--tasks", nargs="*", default=list(SCRIPTS), choices=list(SCRIPTS))
    options = parser.parse_args()
    for script in SCRIPTS.values():
        if not (options.diffusers / script).is_file():
            parser.error(f"{options.diffusers / script} is missing; git clone --depth 1 https://github.com/huggingface/diffusers")
    steps, repeats = (8, 1) if options.quick else (24, 5)
    with tempfile.TemporaryDirectory() as name:
        files = Files(Path(name), options.diffusers)
        _write(files, options.tasks)
        for task in options.tasks:
            rounds = [_round(files, task, steps=steps) for _ in range(options.repeats or repeats)]
            for way in ("fp32", "bf16"):
                _report(f"latent_step_{task}_{way}", [(each[f"theirs {way}"], each[f"ours {way}"]) for each in rounds])
            fastest = [(min(each["theirs fp32"], each["theirs bf16"], key=lambda speed: speed.wall), each["ours best"]) for each in rounds]
            _report(f"latent_step_{task}_best", fastest)


def _report(name: str, pairs: Sequence[tuple[Speed, Speed]]) -> None:
    """Wall and CPU time, theirs by ours."""
    images = RANKS * BATCH
    print_ratio(
        name,
        [theirs.wall / ours.wall for theirs, ours in pairs],
        against=f"diffusers' {name.split('_')[2]} script",
        images_per_second=statistics.median(images / ours.wall for _, ours in pairs),
        their_images_per_second=statistics.median(images / theirs.wall for theirs, _ in pairs),
        load=os.getloadavg()[1],
    )
    print_ratio(
        f"{name}_cpu_time",
        [theirs.cpu / ours.cpu for theirs, ours in pairs],
        against="the same, in processor time of rank 0",
        milliseconds_per_step=statistics.median(ours.cpu for _, ours in pairs) * 1e3,
        their_milliseconds_per_step=statistics.median(theirs.cpu for theirs, _ in pairs) * 1e3,
    )


def _round(files: Files, task: str, *, steps: int) -> dict[str, Speed]:
    """Every way once, ours and theirs by turns."""
    ways = {}
    for precision in ("fp32", "bf16"):
        ways[f"ours {precision}"] = _ours(files, task, _equal(files, task, precision), steps=steps)
        ways[f"theirs {precision}"] = _theirs(files, task, precision, steps=steps)
    ways["ours best"] = _ours(files, task, _best(files, task), steps=steps)
    return ways


def _equal(files: Files, task: str, precision: str) -> dict[str, dict[str, object]]:
    """Our recipe with the settings of their script."""
    lora = task == "lora"
    return {
        "data": {"shards": str(files.shards), "global_batch_size": RANKS * BATCH, "micro_batch_size": BATCH},
        "model": {"kind": "stable_diffusion", "base": str(files.base(task)), "frozen_precision": precision},
        "adaptation": {"kind": "lora", "rank": 4} if lora else {"kind": "full"},
        "objective": {"kind": "latent_denoising", **({} if lora else {"inpainting": {}})},
        **({} if lora else {"dreambooth": {"instance_prompt": PROMPT}}),
        "optim": {"learning_rate": 1e-4},
        "lr_schedule": {"kind": "constant"},
        "engine": {"precision": precision},
        "logging": {"sample_every_steps": 0},
    }


def _best(files: Files, task: str) -> dict[str, dict[str, object]]:
    """What docs/ says is fastest on CPU cores: bf16, and for LoRA channels last with latents and text states from the shards."""
    recipe = _equal(files, task, "bf16")
    if task == "lora":
        recipe["train"] = {"memory_format": "channels_last"}
        recipe["data"] = {**recipe["data"], "shards": str(files.stored)}
        recipe["model"] |= {"latents": "stored", "text": "stored"}
    return recipe


def _ours(files: Files, task: str, recipe: Mapping[str, object], *, steps: int) -> Speed:
    run_dir = Path(tempfile.mkdtemp(dir=files.folder))
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(dict(recipe)))
    run_dir.rmdir()
    command = [sys.executable, "-m", "launch", "train", str(path), "--run-dir", str(run_dir), "--ranks", str(RANKS)]
    return _timed(files, f"ours {task}", [([*command, "train.steps=1000000"], {})], steps=steps)


def _theirs(files: Files, task: str, precision: str, *, steps: int) -> Speed:
    common = ["--pretrained_model_name_or_path", str(files.base(task)), "--output_dir", tempfile.mkdtemp(dir=files.folder)]
    common += ["--resolution", str(SIDE), "--center_crop", "--train_batch_size", str(BATCH), "--max_train_steps", "1000000"]
    common += ["--learning_rate", "1e-4", "--lr_warmup_steps", "0", "--checkpointing_steps", "1000000", "--seed", "0"]
    common += ["--mixed_precision", {"fp32": "no"}.get(precision, precision)]
    if task == "lora":
        common += ["--train_data_dir", str(files.pictures), "--cache_dir", str(files.folder / "cache"), "--rank", "4"]
    else:
        common += ["--instance_data_dir", str(files.pictures / "train"), "--instance_prompt", PROMPT]
    command = [sys.executable, str(HERE / "diffusers_script.py"), str(files.diffusers / SCRIPTS[task]), *common]
    # Not by torchrun: it gives each rank a session of its own, and Linux (autogroup) each session a share of a busy machine.
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    places = [Place(rank, rank, RANKS, RANKS, "127.0.0.1", port).variables() for rank in range(RANKS)]
    return _timed(files, f"theirs {task} {precision}", [(command, place) for place in places], steps=steps)


def _timed(files: Files, name: str, commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], *, steps: int) -> Speed:
    """Run commands, with what is theirs of the environment, until the clock has seen its steps; how they end then is their own affair.

    Raises: RuntimeError if they end before."""
    clock, log = files.folder / "clock", files.folder / "log"
    clock.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE / "step_clock"), *sys.path]),
        "HALFSTEP_STEP_CLOCK": str(clock),
        "HALFSTEP_STEP_CLOCK_STEPS": str(steps),
        "ACCELERATE_USE_CPU": "true",
        **cluster_variables(LocalCluster(), launcher="benchmark"),
        **interface_variables("lo"),
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("wb") as output:
        processes = [
            subprocess.Popen(words, env={**environment, **own}, stdout=output, stderr=subprocess.STDOUT, cwd=files.folder)
            for words, own in commands
        ]
        for process in processes:
            process.wait()
    lines = clock.read_text().splitlines() if clock.exists() else []
    if len(lines) < steps:
        raise RuntimeError(f"{' '.join(commands[0][0])} ended after {len(lines)} steps:\n{log.read_text(errors='replace')[-4000:]}")
    wall, cpu, threads = zip(*(map(float, line.split()) for line in lines[WARM_UP_STEPS:]), strict=True)
    assert set(threads) == {1.0}, "both sides compute in one thread"
    speed = Speed(*(statistics.median(end - start for start, end in itertools.pairwise(times)) for times in (wall, cpu)))
    sys.stderr.write(f"{name}: {speed.wall:.3f} s a step, {speed.cpu:.3f} s of CPU, load {os.getloadavg()[0]:.1f}\n")
    return speed


def _write(files: Files, tasks: Sequence[str]) -> None:
    """Bases, pictures as files and as shards, and what our encoders make of these."""
    for task in tasks:
        write_pipeline(_shape(KINDS[task]), files.base(task), seed=0, vocabulary=WORDS)
    (files.pictures / "train").mkdir(parents=True)
    source, lines = FacesSource("open-peeps", PICTURES), []
    for number in range(PICTURES):
        row = source.row(number, SIDE)
        assert isinstance(row.image, Image.Image), "faces are drawn"
        row.image.convert("RGB").save(files.pictures / "train" / f"{number:04d}.png")
        lines.append(json.dumps({"file_name": f"train/{number:04d}.png", "text": row.caption}) + "\n")
    (files.pictures / "metadata.jsonl").write_text("".join(lines))
    pack_faces(FacesConfig(count=PICTURES, size=SIDE), files.shards)
    if "lora" in tasks:
        base = str(files.base("lora"))
        command = [sys.executable, "-m", "launch", "shards", "encode", str(files.shards), "--vae", base, "--text-encoder", base]
        subprocess.run([*command, "--size", str(SIDE), "--out", str(files.stored)], check=True, capture_output=True)


def _shape(kind: str) -> Architecture:
    tiny = tiny_architecture(kind)
    components = {part: entry.with_config(SHAPE.get(part, {})) for part, entry in tiny.components.items()}
    return Architecture(tiny.name, tiny.pipeline, tiny.source, tiny.settings, {}, components, tiny.beside)


if __name__ == "__main__":
    main()
