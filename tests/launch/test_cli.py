"""The command line from outside: speed, exit codes, and one line a mistake."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.arguments import evaluation_file
from trainer.config_io import shipped

LEAST = "data: {shards: shards}\ntrain: {steps: 100}\n"


@dataclass(frozen=True)
class Ran:
    """A finished command: exit code, output, CPU seconds, and the modules that it imported."""

    code: int
    out: str
    err: str
    cpu_seconds: float
    imported: frozenset[str]


@pytest.fixture
def halfstep(tmp_path: Path) -> Callable[..., Ran]:
    """Runs `halfstep` in an empty directory, as a process of its own."""

    def run(*words: str) -> Ran:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "launch", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "COLUMNS": "200", "TERM": "dumb"},
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        lines = done.stderr.splitlines()
        imported = frozenset(line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:"))
        err = "\n".join(line for line in lines if not line.startswith("import time:"))
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Ran(done.returncode, done.stdout, err, seconds, imported)

    return run


def test_help_is_instant_and_lists_every_verb(halfstep: Callable[..., Ran]) -> None:
    ran = halfstep("--help")
    assert ran.code == 0
    # seconds of CPU, which other work on the machine does not stretch; 0.15 on an idle core, importtime included
    assert ran.cpu_seconds < 0.4
    assert not ran.imported & {"torch", "pydantic", "numpy", "yaml", "PIL"}
    verbs = ("demo", "train", "distill", "sample", "evaluate", "report", "export", "status", "checkpoints", "import-checkpoint")
    for verb in (*verbs, "doctor", "hash", "recipes", "shards"):
        assert f" {verb} " in ran.out


# the words after `halfstep train`, and the one line that must come back
MISTAKES = [
    (["smok"], "error: smok: no such recipe file, nor a shipped recipe of that name - did you mean 'smoke'?"),
    (["recipe.yaml", "optim.lr=3e-4"], "command line:1: optim.lr: unknown key - did you mean 'optim.learning_rate'?"),
    (["recipe.yaml", "seed=1", "ema.decoy=0.9"], "command line:2: ema.decoy: unknown key - did you mean 'ema.decay'?"),
    (["recipe.yaml", "batch_size=8"], "command line:1: batch_size: unknown key - did you mean 'data.global_batch_size'?"),
    (["recipe.yaml", "train.steps=1k"], "command line:1: train.steps: got '1k', wanted a whole number - did you mean 1000?"),
    (["recipe.yaml", "train.steps=0"], "command line:1: train.steps: got 0, wanted at least 1: optimizer steps of the whole run"),
    (["recipe.yaml", "train.compile=yes"], "command line:1: train.compile: got 'yes', wanted true or false or auto - did you mean true?"),
    (["recipe.yaml", "engine.precision=fp8"], "command line:1: engine.precision: got 'fp8', wanted one of fp32, bf16, fp16 - did you mean"),
    (
        ["recipe.yaml", "engine.kind=ddp"],
        "command line:1: engine.kind: got 'ddp', wanted one of replicated, fsdp, deepspeed - did you mean 'replicated'?",
    ),
    (["recipe.yaml", "engine.kind=fsdp", "engine.replicas=2"], "error: 1 ranks cannot hold engine.replicas=2 copies of the model"),
    (
        ["recipe.yaml", "objective.prediction=x0"],
        "command line:1: objective.prediction: got 'x0', wanted one of v, eps, x_0, base - did you mean",
    ),
    (["recipe.yaml", "cluster.ranks=2"], "command line:1: cluster.ranks: unknown key - did you mean 'cluster.ranks_per_node'?"),
    (["recipe.yaml", "faster"], "command line:1: faster: not KEY=VALUE; write a dotted key and a value, such as"),
    (["recipe.yaml", "model.channels=64"], "command line:1: model.channels: got 64, wanted a list - did you mean [64]?"),
    (["nowhere/recipe.yaml"], "error: nowhere/recipe.yaml: no such recipe file, nor a shipped recipe of that name"),
    (["twice.yaml"], "twice.yaml:4: seed: stands twice, first in line 3; remove one"),
    (["misspelt.yaml"], "misspelt.yaml:3: modle: unknown key - did you mean 'model'?"),
    (["tab.yaml"], "tab.yaml:4: not YAML: found character '\\t' that cannot start any token; indent with spaces"),
    (["tag.yaml"], "tag.yaml:3: the tag tag:yaml.org,2002:python/name:os.system is not read; remove it, or quote the text"),
    (["batch.yaml"], "batch.yaml:1: data.global_batch_size: 250 is not a multiple of micro_batch_size=16; set data.global_batch_size=256"),
    (["heads.yaml"], "heads.yaml:3: model.attention_heads: 3 heads at the width 128 do not fit the attended widths 128; set"),
    (["chain.yaml"], "chain.yaml:5: distill.updates: 2 values for 3 stages (students of 4, 2, 1 steps); give 3 values, or one number"),
    (["recipe.yaml", "--ranks", "3"], "error: 3 ranks cannot divide 2 micro-batches"),
]


def write_recipes(folder: Path) -> None:
    files = {
        "recipe": LEAST,
        "twice": LEAST + "seed: 1\nseed: 2\n",
        "misspelt": LEAST + "modle: {}\n",
        "tab": LEAST + "ema:\n\tdecay: 0.9\n",
        "tag": LEAST + "seed: !!python/name:os.system\n",
        "batch": LEAST.replace("shards}", "shards, global_batch_size: 250}"),
        "heads": LEAST + "model: {attention_heads: 3}\n",
        "chain": LEAST + "distill:\n  start_steps: 8\n  updates: [10, 20]\n",
    }
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


@pytest.mark.parametrize(("words", "line"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_ends_with_one_line_before_torch_is_imported(
    words: list[str], line: str, halfstep: Callable[..., Ran], tmp_path: Path
) -> None:
    write_recipes(tmp_path)
    ran = halfstep("train", *words)
    assert ran.code == 2
    assert ran.err.startswith(line) and len(ran.err.splitlines()) == 1, ran.err
    assert ran.cpu_seconds < 1
    assert "torch" not in ran.imported
    assert not (tmp_path / "runs").exists()


def test_all_mistakes_of_a_recipe_come_at_once(halfstep: Callable[..., Ran], tmp_path: Path) -> None:
    write_recipes(tmp_path)
    ran = halfstep("train", "heads.yaml", "optim.lr=1", "train.stepz=2")
    assert [line.split(": ")[0] for line in ran.err.splitlines()] == ["heads.yaml:3", "command line:1", "command line:2"]


def test_an_unknown_option_names_the_nearest(halfstep: Callable[..., Ran]) -> None:
    ran = halfstep("train", "smoke", "--dryrun")
    assert ran.code == 2 and "--dry-run" in ran.err


def test_a_dry_run_prints_the_complete_recipe_and_writes_nothing(halfstep: Callable[..., Ran], tmp_path: Path) -> None:
    ran = halfstep("train", "smoke", "--dry-run", "seed=7")
    assert ran.code == 0 and "\nseed: 7\n" in ran.out and "\n  max_gradient_norm: 1.0\n" in ran.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["train", "distill"])
def test_deterministic_is_a_key_of_the_recipe(verb: str, halfstep: Callable[..., Ran]) -> None:
    ran = halfstep(verb, "demo", "--dry-run", "--deterministic", "seed=7")
    assert ran.code == 0 and "\n  deterministic: true\n" in ran.out and "\nseed: 7\n" in ran.out
    wrong = halfstep(verb, "demo", "--deterministic", "seed=x")
    assert wrong.err.startswith("command line:1: seed: got 'x'")  # the option does not shift the numbers of the words


def test_recipes_are_listed_and_printed(halfstep: Callable[..., Ran]) -> None:
    names = [line.split()[0] for line in halfstep("recipes").out.splitlines()]
    assert names == [file.stem for file in shipped("recipes")] and {"demo", "smoke", "sd21_lora_cartoon"} < set(names)
    assert halfstep("recipes", "smoke").out.startswith("# yaml-language-server: ")
    assert '"title": "halfstep recipe"' in halfstep("recipes", "--schema").out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "nowhere"], "error: nowhere: no such directory; give one that halfstep wrote"),
        (["evaluate", ".", "--reference", ".", "--steps", "8;4", "--out", "a.json"], "error: --steps 8;4: wanted step counts with commas"),
        (["shards", "pack", "--source", "folder", "--out", "s"], "error: --source folder wants the folder of images"),
        (["shards", "pack", "--source", "folder", "nowhere", "--out", "s"], "error: nowhere is not a folder"),
        (["shards", "pack", "--source", "faces", "--style", "micah", "--out", "s"], "error: face style 'micah' by Micah Lanier"),
        (["shards", "info", "."], "error: "),
        (["status", "."], "error: "),
        (["checkpoints", "nowhere"], "error: nowhere: no such directory; give one that halfstep wrote"),
        (["import-checkpoint", "nowhere.pt", "--out", "new.safetensors"], "error: nowhere.pt: no such file; give the file itself"),
    ],
)
def test_input_that_cannot_be_used_is_one_message_and_exit_code_2(
    words: list[str], message: str, halfstep: Callable[..., Ran], tmp_path: Path
) -> None:
    ran = halfstep(*words)
    assert ran.code == 2 and ran.err.startswith(message) and "Traceback" not in ran.err, ran.err
    assert list(tmp_path.iterdir()) == []


def test_shards_are_packed_described_and_verified(halfstep: Callable[..., Ran], tmp_path: Path) -> None:
    packed = halfstep("shards", "pack", "--source", "faces", "--count", "20", "--size", "16", "--workers", "1", "--out", "s")
    assert packed.code == 0 and packed.out.startswith("s: 20 images of 16 pixels in 1 shard, "), packed.err
    assert "torch" not in packed.imported
    described = halfstep("shards", "info", "s", "--sheet", "sheet.png")
    assert "Pablo Stanley" in described.out and (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert halfstep("shards", "verify", "s").code == 0
    [tar] = (tmp_path / "s").glob("*.tar")
    content = bytearray(tar.read_bytes())
    content[2000] ^= 1
    tar.write_bytes(content)
    damaged = halfstep("shards", "verify", "s")
    assert damaged.code == 2 and tar.name in damaged.err


def test_an_evaluation_goes_where_a_report_looks_for_it(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    assert evaluation_file(tmp_path) == tmp_path / "evaluation.json"
    (tmp_path / "model_index.json").touch()
    with pytest.raises(ValueError, match=r"is no run's and no chain's directory.* --out FILE\.json"):
        evaluation_file(tmp_path)
