"""A dry run shows every file and every command, and writes nothing."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.cluster import ClusterConfig, LocalCluster, SlurmCluster, load_cluster
from launch.job import Job
from launch.slurm import plan, plan_sweep
from launch.slurm_script import render, template
from launch.start import How, start_distill, start_train
from launch.start_sweep import start_sweep
from trainer.config import RunConfig
from trainer.config_io import dump_yaml, load_recipe

RECIPE = "data: {faces: {count: 4, size: 16}, global_batch_size: 16, micro_batch_size: 4}\ntrain: {steps: 2}\n"
DISTILL = "distill: {start_steps: 8, end_steps: 2, updates: 10}\n"
SLURM = "kind: slurm\nnodes: 2\nranks_per_node: 2\npartition: gpu\npython: /opt/python\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a recipe, a chain and a cluster file, and no Slurm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    Path("recipe.yaml").write_text(RECIPE)
    Path("chain.yaml").write_text(RECIPE + DISTILL)
    Path("cluster.yaml").write_text(SLURM)
    return tmp_path


class Shown:
    """What a dry run has shown: files by path, what stands below `# --- commands`, and the files of job scripts."""

    def __init__(self, text: str) -> None:
        parts = re.split(r"^# --- (.*)\n", text, flags=re.MULTILINE)
        self.title = parts[0].strip()
        sections = list(zip(parts[1::2], parts[2::2], strict=True))
        self.files = {name: content.rstrip("\n") + "\n" for name, content in sections if "/" in name}
        self.commands = {name: content.strip().splitlines() for name, content in sections if "/" not in name}


def shown(capsys: pytest.CaptureFixture[str]) -> Shown:
    captured = capsys.readouterr()
    assert captured.err == ""
    return Shown(captured.out)


def recipe(name: str = "recipe.yaml", *overrides: str) -> RunConfig:
    return load_recipe(name, overrides)


def cluster(name: str = "cluster.yaml", *overrides: str) -> SlurmCluster:
    found: ClusterConfig = load_cluster(name, overrides)
    assert isinstance(found, SlurmCluster)
    return found


def nothing_was_written(here: Path) -> bool:
    return sorted(path.name for path in here.iterdir()) == ["chain.yaml", "cluster.yaml", "recipe.yaml"]


def srun(kind: str, path: Path, *, flags: Sequence[str] = (), allow_fresh: str = "false") -> str:
    """The ranks' command on two nodes of two."""
    words = ["srun", "--kill-on-bad-exit=1", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=1"]
    words += ["--distribution=block:block", "--unbuffered", *flags, "/opt/python", "-m", "launch.slurm_rank", kind, str(path)]
    return shlex.join([*words, f'{{"allow_fresh": {allow_fresh}, "previous_end": null}}'])


def test_a_local_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start_train("recipe.yaml", ["seed=7"], How(Path("run"), ranks=2, dry_run=True)) == 0
    text = shown(capsys)
    assert text.title == "# would run on 2 local ranks in run"
    assert text.files == {
        "run/recipe.yaml": dump_yaml(recipe("recipe.yaml", "seed=7")),
        "run/cluster.yaml": dump_yaml(LocalCluster(ranks_per_node=2)),
    }
    [command] = text.commands["commands"]
    assert command.endswith(" -m launch.worker train run '{\"allow_fresh\": false}'   # 2 times, RANK=0 to 1")
    assert nothing_was_written(here)


def test_what_a_recipe_leaves_open_is_said_where_it_will_be_frozen(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ("train.compile=auto", "train.memory_format=auto")
    assert start_train("recipe.yaml", changes, How(Path("run"), dry_run=True)) == 0
    frozen = dump_yaml(recipe("recipe.yaml", *changes)).rstrip()
    said = "# rank 0 measures train.compile and train.memory_format once before step 0, and freezes the choice here"
    assert shown(capsys).files["run/recipe.yaml"].rstrip() == f"{frozen}\n{said}"


def test_one_rank_is_one_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start_train("recipe.yaml", [], How(Path("run"), ranks=1, dry_run=True)) == 0
    [command] = shown(capsys).commands["commands"]
    assert command.endswith(" -m launch.worker train run '{\"allow_fresh\": false}'")


def test_a_slurm_run_is_one_job(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = How(Path("a run"), cluster="cluster.yaml", dry_run=True, allow_fresh=True)
    assert start_train("recipe.yaml", ["cluster.container=apptainer exec x.sif"], how) == 0
    text, machines = shown(capsys), cluster("cluster.yaml", "container=apptainer exec x.sif")
    [planned] = plan(Job("train", Path("a run"), {"allow_fresh": True}), machines, [])
    script = f"{here}/a run/job/train.sbatch"
    assert text.title == "# would run on Slurm, 2 x 2 ranks, in a run"
    assert text.files == {
        "a run/recipe.yaml": dump_yaml(recipe()),
        "a run/cluster.yaml": dump_yaml(machines),
        script: render(template(), planned.script, machines),
    }
    assert text.commands["submits job 1"] == [
        f"sbatch --parsable '{script}'",
        "# which runs on its first node",
        srun("train", here / "a run", flags=["apptainer", "exec", "x.sif"], allow_fresh="true"),
    ]
    assert nothing_was_written(here)


def test_a_chain_in_one_job(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start_distill("chain.yaml", [], How(Path("chain"), cluster="cluster.yaml", dry_run=True)) == 0
    text = shown(capsys)
    assert [name for name in text.commands if name.startswith("submits")] == ["submits job 1"]
    assert text.files[f"{here}/chain/job/train.sbatch"].splitlines()[-1] == f"exec /opt/python -m launch.slurm_job distill {here}/chain"
    assert text.commands["submits job 1"][-1] == srun("distill", here / "chain")
    assert nothing_was_written(here)


def test_a_chain_of_dependent_jobs_shows_each_with_the_one_that_it_waits_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = How(Path("chain"), cluster="cluster.yaml", dry_run=True)
    assert start_distill("chain.yaml", ["cluster.chain=dependent_jobs"], how) == 0
    text = shown(capsys)
    stages = [here / "chain" / name for name in ("stage_00_1000_steps", "stage_01_0004_steps", "stage_02_0002_steps")]
    after = ["", "--dependency=afterok:JOB_1 --kill-on-invalid-dep=yes ", "--dependency=afterok:JOB_2 --kill-on-invalid-dep=yes "]
    for number, (stage, dependency) in enumerate(zip(stages, after, strict=True), 1):
        assert text.commands[f"submits job {number}"] == [
            f"sbatch --parsable {dependency}{stage}/job/train.sbatch",
            "# which runs on its first node",
            srun("train", stage),
        ]
        script = text.files[f"{stage}/job/train.sbatch"]
        assert f"#SBATCH --job-name=halfstep-chain-{stage.name}" in script.splitlines()
        assert script.splitlines()[-1] == f"exec /opt/python -m launch.slurm_job train {stage}"
    assert len(text.files) == 2 + len(stages)
    assert nothing_was_written(here)


def test_a_sweep_is_one_array_with_a_recipe_a_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = How(Path("rates"), cluster="cluster.yaml", dry_run=True, sweep=["seed=1,2", "ema.decay=0.9,0.99"])
    assert start_sweep("recipe.yaml", ["cluster.sweep_jobs_at_once=2"], how) == 0
    text, machines = shown(capsys), cluster("cluster.yaml", "sweep_jobs_at_once=2")
    runs = ["000_seed=1_decay=0.9", "001_seed=1_decay=0.99", "002_seed=2_decay=0.9", "003_seed=2_decay=0.99"]
    planned = plan_sweep(Path("rates"), range(4), machines, allow_fresh=False)
    assert text.title == "# would run 4 runs on Slurm, 2 x 2 ranks, in rates"
    assert text.files == {
        **{f"rates/{run}/cluster.yaml": dump_yaml(machines) for run in runs},
        **{f"rates/{run}/recipe.yaml": dump_yaml(recipe("recipe.yaml", f"seed={run[9]}", f"ema.decay={run[17:]}")) for run in runs},
        f"{here}/rates/job/train.sbatch": render(template(), planned.script, machines),
    }
    assert "#SBATCH --array=0,1,2,3%2" in text.files[f"{here}/rates/job/train.sbatch"].splitlines()
    assert text.commands["submits job 1"] == [
        f"sbatch --parsable {here}/rates/job/train.sbatch",
        "# which runs in each of its 4 elements, here for the first",
        srun("train", here / "rates" / runs[0]),
    ]
    assert nothing_was_written(here)


def test_a_local_sweep_is_a_command_a_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start_sweep("recipe.yaml", [], How(Path("seeds"), dry_run=True, sweep=["seed=1,2"])) == 0
    text = shown(capsys)
    assert [line.split()[4] for line in text.commands["commands"]] == ["seeds/000_seed=1", "seeds/001_seed=2"]
    assert nothing_was_written(here)


def test_submitit_is_named_where_it_hands_the_jobs_over(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = How(Path("run"), cluster="cluster.yaml", dry_run=True)
    start_train("recipe.yaml", ["cluster.submit_with=submitit"], how)
    assert "submits job 1 through submitit" in shown(capsys).commands
