"""The command line. Each command imports what it needs when it runs, so that `halfstep --help` is instant."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from launch.arguments import (
    BAD_INPUT,
    AllowFresh,
    Cluster,
    Deterministic,
    DryRun,
    Follow,
    Here,
    Overrides,
    Prompts,
    Ranks,
    Recipe,
    RunDir,
    RunDirOption,
    SamplerOption,
    Source,
    Sweep,
    end,
    evaluation_file,
    existing,
    existing_file,
    existing_source,
    step_counts,
)
from launch.shards.commands import shards
from trainer.exit_codes import IO_ERROR

app = typer.Typer(
    name="halfstep",
    help="Train image diffusion models, then halve their sampling steps: 1000, 500, 250, ... 1.\n\n"
    "Start with:  halfstep demo\n\nEvery command that was stopped goes on where it was when you give it again.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(shards)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where everything goes.")] = Path("runs/demo"),
    ranks: Annotated[int, typer.Option(min=1, metavar="N", help="Local ranks.")] = 2,
) -> None:
    """The whole way on embedded data: faces, shards, teacher, halvings, samples, report.

    Example:  halfstep demo --ranks 2"""
    from launch.demo import run_demo

    end(run_demo(out, ranks=ranks))


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    cluster: Cluster = "local",
    run_dir: RunDirOption = None,
    ranks: Ranks = None,
    deterministic: Deterministic = False,
    allow_fresh: AllowFresh = False,
    dry_run: DryRun = False,
    follow: Follow = False,
    here: Here = False,
    sweep: Sweep = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Watch five steps: a table of where they go and a trace, in RUN_DIR/profile.")
    ] = False,
) -> None:
    """Train a recipe. The same command again resumes the run exactly.

    Example:  halfstep train smoke --ranks 2 train.steps=100 optim.learning_rate=3e-4

    Example:  halfstep train smoke --cluster slurm cluster.nodes=2 --sweep optim.learning_rate=1e-4,3e-4"""
    from launch.start import How, start_train
    from launch.start_sweep import start_sweep

    if profile and sweep:
        raise ValueError("--profile watches one run; leave --sweep out")
    changes = _changes(overrides, deterministic=deterministic)
    how = How(run_dir, cluster, ranks, dry_run, allow_fresh, follow, here, tuple(sweep or ()), profile)
    end((start_sweep if how.sweep else start_train)(recipe, changes, how))


@app.command()
def distill(
    recipe: Recipe,
    overrides: Overrides = None,
    cluster: Cluster = "local",
    run_dir: RunDirOption = None,
    ranks: Ranks = None,
    deterministic: Deterministic = False,
    allow_fresh: AllowFresh = False,
    dry_run: DryRun = False,
    follow: Follow = False,
    here: Here = False,
) -> None:
    """Halve a teacher's steps again and again: a chain of runs. The same command again continues it.

    Example:  halfstep distill smoke --ranks 2 distill.end_steps=1"""
    from launch.start import How, start_distill

    changes = _changes(overrides, deterministic=deterministic)
    how = How(run_dir, cluster, ranks, dry_run, allow_fresh, follow, here)
    end(start_distill(recipe, changes, how))


@app.command("sweep")
def sweep_(
    recipe: Recipe,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=V1,V2 ... [KEY=VALUE ...]", help="Values to try, each combination of them a run; and changes to all runs."
        ),
    ] = None,
    cluster: Cluster = "local",
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", metavar="DIR", help="Where the runs live. Default: runs/<recipe name>_sweep.")
    ] = None,
    ranks: Ranks = None,
    reference: Annotated[
        Path | None, typer.Option(metavar="SHARDS", help="Measure every run's quality against these images, which none was trained on.")
    ] = None,
    steps: Annotated[str | None, typer.Option(metavar="N,N,...", help="Of --reference: the step counts. Default: the models' own.")] = None,
    images: Annotated[int | None, typer.Option(min=2, metavar="K", help="Of --reference: images per step count.")] = None,
    deterministic: Deterministic = False,
    allow_fresh: AllowFresh = False,
    dry_run: DryRun = False,
    follow: Follow = False,
    here: Here = False,
) -> None:
    """Try values of a recipe: a run (with a distill section a chain) for each combination, then one report that compares them.

    On Slurm the runs are a job array, on Ray they run side by side, here one after the other. The same command goes on.

    Example:  halfstep sweep smoke optim.learning_rate=1e-4,3e-4 model.attention_heads=2,4 train.steps=200

    Example:  halfstep sweep demo distill=null noise_schedule.steps=250,500,1000 --reference runs/demo/reference --steps 32"""
    from launch.start import How
    from launch.start_sweep import Quality, start_sweep
    from launch.sweep import split_words

    if reference is None and (steps is not None or images is not None):
        raise ValueError("--steps and --images say how quality is measured; give --reference SHARDS too, or leave them out")
    overrides, values = split_words(words or [])
    changes = _changes(overrides, deterministic=deterministic)
    how = How(run_dir, cluster, ranks, dry_run, allow_fresh, follow, here, values)
    quality = Quality(existing(reference), step_counts(steps), images) if reference is not None else None
    end(start_sweep(recipe, changes, how, chains=True, quality=quality))


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    cluster: Cluster = "local",
    ranks: Ranks = None,
    gpu: Annotated[str | None, typer.Option(metavar="TYPE", help="A type of GPU, such as a100-80gb; a wrong one lists all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a page.")] = False,
) -> None:
    """What a run needs before it is submitted: memory, traffic, time, cost; and the cheapest ways out where it does not fit.

    Needs neither a GPU nor the weights.

    Example:  halfstep plan sd21_lora_cartoon --cluster slurm cluster.nodes=8 --gpu a100-80gb"""
    from launch.plan import print_plan

    end(print_plan(recipe, list(overrides or []), cluster=cluster, ranks=ranks, gpu=gpu, as_json=as_json))


@app.command()
def sample(
    source: Source,
    prompt: Prompts = None,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Sampling steps. Default: the model's own; of a chain, its last student's.")
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, metavar="K", help="Number of images: 16, or of each prompt 4.")] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="S", help="Image i starts from noise of seed S + i.")] = 0,
    out: Annotated[Path, typer.Option(metavar="FILE.png|DIR", help="A grid as .png, or a directory for single images too.")] = Path(
        "samples.png"
    ),
    sampler: SamplerOption = None,
    precision: Annotated[
        str,
        typer.Option(
            metavar="fp32|bf16", help="bf16 is faster and needs half the memory for weights; the same pictures but for its rounding."
        ),
    ] = "fp32",
    negative_prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What not to draw.")] = None,
    guidance: Annotated[float | None, typer.Option(metavar="G", help="Pull towards the prompt; 1 is none.")] = None,
    guidance_rescale: Annotated[
        float | None, typer.Option(min=0, max=1, metavar="R", help="Against too strong contrast of high guidance (arXiv:2305.08891).")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="N|WxH", help="Pixels, such as 512 or 768x512. Default: as in training, or the pipeline's.")
    ] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="Of inpainting: the image to be filled.")] = None,
    mask: Annotated[Path | None, typer.Option(metavar="FILE", help="Of inpainting: its mask, white where it is painted.")] = None,
    lora: Annotated[Path | None, typer.Option(metavar="FILE|DIR", help="A LoRA to put on, in diffusers' or kohya's form.")] = None,
    lora_scale: Annotated[float | None, typer.Option(metavar="S", help="How much a LoRA counts. Default: 1.")] = None,
    base: Annotated[str | None, typer.Option(metavar="DIR|ID", help="Of a LoRA's export: its base, where it is not found.")] = None,
    decoder: Annotated[
        str | None, typer.Option(metavar="DIR|ID", help="Of Wuerstchen's and Kandinsky's priors: the decoder. Default: the recipe's.")
    ] = None,
    prior: Annotated[str | None, typer.Option(metavar="DIR|ID", help="Of Kandinsky's decoder: the prior. Default: the recipe's.")] = None,
    decoder_steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Sampling steps of the decoder beside a prior.")] = None,
    decoder_guidance: Annotated[float | None, typer.Option(metavar="G", help="Guidance of that decoder.")] = None,
    ranks: Ranks = None,
) -> None:
    """Draw images from a run, a chain, an export or a stock pipeline's folder; models that read text want --prompt.

    Example:  halfstep sample runs/demo --steps 4 --images 16 --seed 7 --out grid.png

    Example:  halfstep sample runs/cartoons --prompt "a woman" --negative-prompt blurry --guidance 6

    Example:  halfstep sample runs/fill/export --prompt "a <cmg>cartoon car" --image car.png --mask mask.png"""
    options = {
        "prompts": prompt or None,
        "steps": steps,
        "images": images,
        "seed": seed,
        "out": str(out),
        "sampler": sampler,
        "precision": precision,
        "negative_prompt": negative_prompt,
        "guidance": guidance,
        "guidance_rescale": guidance_rescale,
        "size": size,
        "image": None if image is None else str(image),
        "mask": None if mask is None else str(mask),
        "lora": None if lora is None else str(lora),
        "lora_scale": lora_scale,
        "base": base,
        "decoder": decoder,
        "prior": prior,
        "decoder_steps": decoder_steps,
        "decoder_guidance": decoder_guidance,
    }
    end(_run("sample", existing_source(source), options, ranks=ranks))


@app.command()
def evaluate(
    source: Source,
    reference: Annotated[Path, typer.Option(metavar="SHARDS", help="Shards of images that the model was not trained on.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json", help="Where the table goes: a list of objects. Default: SOURCE/evaluation.json of runs and chains."
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Step counts, such as 32,16,8. Default: the model's own; of a chain, its teacher's to its last student's.",
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=2, metavar="K", help="Images per step count.")] = 512,
    seed: Annotated[
        int, typer.Option(min=0, metavar="S", help="Image i is drawn from seed S + i: seeds at least K apart share no image.")
    ] = 0,
    batch: Annotated[int, typer.Option(min=1, metavar="B", help="Images that a rank draws at once.")] = 64,
    feature_net: Annotated[
        str,
        typer.Option(
            metavar="KIND[=WHERE]",
            help="faces (our own), faces=SHARDS (trained on those), inception=FILE, clip=DIR|ID or dinov2=DIR|ID.",
        ),
    ] = "faces",
    resize: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help="To the net's size: bilinear-tf1 (default of inception), bilinear or bicubic-antialias."),
    ] = None,
    clip: Annotated[str | None, typer.Option(metavar="DIR|ID", help="CLIP, for CMMD beside another feature net.")] = None,
    teacher: Annotated[
        Path | None, typer.Option(metavar="SOURCE", help="Compare with this teacher's images of the same noise. Default: the chain's.")
    ] = None,
    previous: Annotated[
        bool, typer.Option("--previous", help="Of a chain: each student's own teacher, run in the student's steps, too.")
    ] = False,
    measure_up_to: Annotated[
        int, typer.Option(min=1, metavar="N", help="Of more steps only seconds are measured, of students and the whole teacher.")
    ] = 32,
    time_batches: Annotated[str | None, typer.Option(metavar="B,B,...", help="Time drawing by batches of these sizes, too.")] = None,
    training: Annotated[
        Path | None, typer.Option(metavar="SHARDS", help="Show the nearest of these training images: against memorisation.")
    ] = None,
    ranks: Ranks = None,
) -> None:
    """Quality and seconds an image per step count, against held-out images.

    Frechet distance, KID, precision and recall, CMMD with CLIP, distance to the teacher on the same noise. Features of the
    reference are kept in evaluation_cache/ beside FILE.json.

    Example:  halfstep evaluate runs/demo --reference runs/demo/reference --steps 8,4,2,1

    Example:  halfstep evaluate runs/cifar --reference cifar --feature-net inception=pt_inception-2015-12-05-6726825d.pth --out fid.json"""
    options = {
        "reference": str(existing(reference)),
        "steps": step_counts(steps),
        "images": images,
        "seed": seed,
        "out": str(out or evaluation_file(source)),
        "batch_size": batch,
        "feature_net": feature_net,
        "resize": resize,
        "clip": clip,
        "teacher": None if teacher is None else str(existing(teacher)),
        "previous": previous,
        "measure_up_to": measure_up_to,
        "time_batches": step_counts(time_batches, "--time-batches"),
        "training": None if training is None else str(existing(training)),
    }
    end(_run("evaluate", existing_source(source), options, ranks=ranks))


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Directories of runs, chains, exports or sweeps.")],
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="Where the page goes.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="Over the page. Default: the directories' names.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Of several directories: the most steps that pictures are drawn in. Default: 50."),
    ] = None,
    draw: Annotated[bool, typer.Option(help="Draw pictures that are not there yet; without it only those that are.")] = True,
) -> None:
    """One self-contained page: curves, grids of the same seeds, quality and seconds by step count, what differs between runs.

    Example:  halfstep report runs/demo --out report.html

    Example:  halfstep report runs/base runs/fine_tuned runs/source runs/mixture --no-draw"""
    from launch.sweep import is_sweep, sweep_runs

    found = [existing(directory) for directory in directories]
    runs = [run for directory in found for run in (sweep_runs(directory) if is_sweep(directory) else [directory])]
    if title is None and len(found) == 1 and is_sweep(found[0]):
        title = found[0].resolve().name
    options = {"dirs": [str(run) for run in runs], "out": str(out), "title": title, "steps": steps, "draw": draw}
    end(_run("report", found[0], options, ranks=1))


@app.command()
def export(
    run_dir: RunDir,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The new folder. Default: RUN_DIR/export.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Of a chain: the stage whose model samples in N steps.")] = None,
    ema: Annotated[
        float | None,
        typer.Option(min=0, max=1, metavar="DECAY", help="The average of this decay, one of ema.more_decays. Default: that of ema.decay."),
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Of a LoRA: folded into its base, a whole pipeline, instead of the LoRA alone.")
    ] = False,
    push: Annotated[str | None, typer.Option(metavar="REPO", help="Upload to this Hugging Face repository, owner/name, too.")] = None,
) -> None:
    """Write a folder that stock diffusers loads, with EMA weights and a model card: a pipeline, or a LoRA (in kohya's form, too).

    Example:  halfstep export runs/demo --steps 4 --out faces-4-steps

    Example:  halfstep export runs/mine --ema 0.999 --out faces-smoother

    Example:  halfstep export runs/cartoons --merged --out cartoons"""
    options = {"out": None if out is None else str(out), "steps": steps, "ema": ema, "merged": merged, "push": push}
    end(_run("export", existing_source(run_dir), options, ranks=1))


@app.command()
def status(
    run_dir: RunDir,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Where a run or a chain stands, and why it last ended.

    Example:  halfstep status runs/demo"""
    from launch.status import print_status

    end(print_status(existing(run_dir), as_json=as_json))


@app.command()
def logs(
    run_dir: RunDir,
    rank: Annotated[int | None, typer.Option(min=0, metavar="N", help="This rank's log. Default: the job's output, or rank 0's.")] = None,
    lines: Annotated[int, typer.Option(min=1, metavar="K", help="How many of the last lines.")] = 200,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
) -> None:
    """Show what a run's job or one of its ranks has written.

    Example:  halfstep logs runs/smoke --rank 1 --follow"""
    folder = existing(run_dir)
    from launch.logs import show_log

    end(show_log(folder, rank=rank, lines=lines, follow=follow))


@app.command()
def stop(
    run_dir: RunDir,
    wait: Annotated[bool, typer.Option(help="Return when the run has ended.")] = True,
) -> None:
    """End a run, a chain or a sweep wherever it runs: with a checkpoint, from which the same command goes on.

    Example:  halfstep stop runs/smoke"""
    folder = existing(run_dir)
    from launch.queued import stop as stop_jobs

    end(stop_jobs(folder, wait=wait))


@app.command()
def checkpoints(
    run_dir: RunDir,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte and compare it with the manifest; exit code 2 if any differ.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of lines.")] = False,
) -> None:
    """List a run's checkpoints: step, size, age, loss, what wrote them, whether they are whole.

    Example:  halfstep checkpoints runs/smoke --verify"""
    folder = existing(run_dir)
    from launch.checkpoints import print_checkpoints

    end(print_checkpoints(folder, verify=verify, as_json=as_json))


@app.command()
def doctor(
    cluster: Annotated[
        str | None, typer.Option(metavar="C", help="A cluster file, or a shipped one's name, to compare with what is there.")
    ] = None,
    online: Annotated[bool, typer.Option("--online", help="Try the Hugging Face Hub too; without it nothing leaves this site.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """What this machine, its Slurm and its Ray have and lack, and how to mend it. Exit code 1 if there is a problem.

    Example:  halfstep doctor --cluster my-cluster.yaml"""
    from launch.doctor import run_doctor

    end(run_doctor(as_json=as_json, cluster=cluster, online=online))


@app.command("import-checkpoint")
def import_checkpoint(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint that another program wrote, such as model.pt.")],
    out: Annotated[Path, typer.Option(metavar="FILE.safetensors|DIR", help="The new file; with --as the new folder.")],
    family: Annotated[
        str | None,
        typer.Option(
            "--as", metavar="FAMILY", help="A known U-Net, as a pipeline's folder: pesser, guided-diffusion or improved-diffusion."
        ),
    ] = None,
    image_size: Annotated[int | None, typer.Option(metavar="N", help="Pixels a side. Default: by the U-Net's levels.")] = None,
    noise_schedule: Annotated[str | None, typer.Option(metavar="NAME", help="linear or cosine.")] = None,
    diffusion_steps: Annotated[int | None, typer.Option(metavar="N", help="Noise levels in training.")] = None,
    heads: Annotated[int | None, typer.Option(metavar="N", help="Of attention, on every level.")] = None,
    head_channels: Annotated[int | None, typer.Option(metavar="N", help="Instead of --heads: channels a head.")] = None,
    attention_order: Annotated[str | None, typer.Option(metavar="NAME", help="legacy or new.")] = None,
    rescale_timesteps: Annotated[
        Literal["yes", "no"] | None, typer.Option(metavar="yes|no", help="Whether times were scaled to 0 ... 1000.")
    ] = None,
    prediction: Annotated[str | None, typer.Option(metavar="NAME", help="eps, or x_0 (predict_xstart). Default: eps.")] = None,
    variance: Annotated[str | None, typer.Option(metavar="NAME", help="fixed_small or fixed_large.")] = None,
    eps_only: Annotated[bool, typer.Option("--eps-only", help="Leave a learned variance out, to train and halve the model.")] = False,
) -> None:
    """Turn another program's checkpoint into safetensors, or a known U-Net into a diffusers pipeline; nothing in it is run.

    With --as, what is not said of the model is taken as the published one of that size has it.

    Example:  halfstep import-checkpoint model.pt --out model.safetensors

    Example:  halfstep import-checkpoint model-790000.ckpt --as pesser --out cifar10

    Example:  halfstep import-checkpoint lsun_bedroom.pt --as guided-diffusion --eps-only --out bedroom"""
    options = {
        "out": str(out),
        "family": family,
        "image_size": image_size,
        "noise_schedule": noise_schedule,
        "diffusion_steps": diffusion_steps,
        "heads": heads,
        "head_channels": head_channels,
        "attention_order": attention_order,
        "rescale_timesteps": None if rescale_timesteps is None else rescale_timesteps == "yes",
        "prediction": prediction,
        "variance": variance,
        "eps_only": eps_only or None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    end(_run("import", existing_file(file), given, ranks=1))


@app.command("make-tiny")
def make_tiny(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="Which model, see above.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    seed: Annotated[int, typer.Option(min=0, metavar="S", help="The same kind and seed give the same bytes.")] = 0,
    vocabulary: Annotated[
        str | None,
        typer.Option(metavar="words|clip|FILE", help="Of its tokenizer. Default: clip where open-clip-torch is installed, else words."),
    ] = None,
) -> None:
    """Write a small random model with the structure of a well-known one, to try a recipe without a download.

    Kinds: stable_diffusion, stable_diffusion_v, stable_diffusion_inpainting, stable_diffusion_xl, wuerstchen_prior,
    kandinsky22_prior, kandinsky22_decoder, ddpm, autoencoder, clip, blip.

    Example:  halfstep make-tiny stable_diffusion_v tiny-sd"""
    from trainer.tiny_models.kinds import check_kind

    end(_run("make-tiny", folder, {"kind": check_kind(kind), "seed": seed, "vocabulary": vocabulary}, ranks=1))


@app.command("hash")
def hash_(run_dir: RunDir) -> None:
    """Three hashes that two equal runs share: weights, EMA weights, samples delivered.

    Example:  halfstep hash runs/smoke"""
    end(_run("hash", existing(run_dir), {}, ranks=1))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this recipe.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors.")] = False,
) -> None:
    """List the shipped recipes, print one, or print their schema.

    Example:  halfstep recipes demo > my-recipe.yaml"""
    import json

    from trainer.config_io import json_schema, recipe_path, shipped

    if schema:
        sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
    elif name:
        sys.stdout.write(recipe_path(name).read_text(encoding="utf-8"))
    else:
        files = shipped("recipes")
        width = max(len(file.stem) for file in files)
        for file in files:
            comments = [line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
            about = next(line for line in comments if not line.startswith("yaml-language-server"))
            sys.stdout.write(f"{file.stem:{width}} {about}\n")


def main() -> NoReturn:
    """The console script: input that cannot be used ends in one message and exit code 2."""
    try:
        app()
    except ValueError as error:
        from trainer.config_io import RecipeErrors

        # a recipe's mistakes start with file:line, so that editors and terminals can jump there
        sys.stderr.write(f"{error}\n" if isinstance(error, RecipeErrors) else f"error: {error}\n")
        sys.exit(BAD_INPUT)
    except OSError as error:
        import errno

        sys.stderr.write(f"error: {error}\n")
        # a failing disk or network file system, and a full one, are worth another try without a change of input
        sys.exit(IO_ERROR if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS) else BAD_INPUT)
    except RuntimeError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    sys.exit(0)


def _changes(overrides: list[str] | None, *, deterministic: bool) -> list[str]:
    """The command line's KEY=VALUE words, and those that options stand for behind them, so that messages count right."""
    return [*(overrides or []), *(["engine.deterministic=true"] if deterministic else [])]


def _run(kind: str, path: Path, options: dict[str, object], *, ranks: int | None) -> int:
    """Runs a job that owns no folder on local ranks."""
    from launch.cluster import load_cluster
    from launch.job import Job
    from launch.local import run_job

    cluster = load_cluster("local", [])
    count = ranks or cluster.ranks_per_node
    # Unlike a run's, these ranks own the whole machine for a short time.
    cluster = cluster.model_copy(update={"threads_per_rank": max(1, (os.cpu_count() or 1) // count)})
    return run_job(Job(kind, path, options), cluster, ranks=count)


if __name__ == "__main__":
    main()
