"""From the command line to a job: what is refused before anything starts, and what the ranks are told."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from launch import __main__ as command_line
from launch import start
from launch.job import Job, as_flags, from_flags
from launch.start import How, check_engine, start_distill, start_train
from launch.start_sweep import start_sweep
from launch.submitted import Submission, record_submission, submissions
from tests.launch.slurm_on_path import SlurmOnPath
from trainer.config import EngineConfig, RunConfig
from trainer.exit_codes import DONE


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four faces."""
    out = tmp_path_factory.mktemp("shards")
    pack(FacesSource("open-peeps", 4), out, size=16, workers=1)
    return out


def with_engine(**engine: object) -> RunConfig:
    return RunConfig.model_validate({"data": {"shards": "x"}, "train": {"steps": 1}, "engine": engine})


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "find_spec", lambda name: None)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shards: Path) -> list[Job]:
    """The jobs that are started, none of which runs; recipes and runs in an empty folder."""
    started: list[Job] = []

    def run_job(job: Job, *_: object, **__: object) -> int:
        started.append(job)
        return DONE

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.local._attempt", run_job)
    (tmp_path / "recipe.yaml").write_text(f"data: {{shards: {shards}}}\ntrain: {{steps: 2}}\n")
    return started


@pytest.mark.parametrize(("kind", "ranks", "fits"), [("fsdp", 4, True), ("fsdp", 6, True), ("fsdp", 3, False), ("fsdp", 1, False)])
def test_replicas_divide_the_ranks(kind: str, ranks: int, fits: bool) -> None:
    config = with_engine(kind=kind, replicas=2)
    if fits:
        check_engine(config, ranks)
    else:
        with pytest.raises(ValueError, match=rf"^{ranks} ranks cannot hold engine\.replicas=2 .*; give --ranks a multiple of 2, or"):
            check_engine(config, ranks)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"kind": "deepspeed"}, r"DeepSpeed is not installed; pip install 'halfstep\[deepspeed\]', or set engine\.kind=fsdp"),
        ({"attention": "xformers"}, r"xformers is not installed; pip install 'halfstep\[xformers\]', or set engine\.attention=auto"),
    ],
)
def test_a_missing_package_names_its_extra_before_anything_is_written(
    engine: dict[str, object], message: str, nothing_installed: None, jobs: list[Job], tmp_path: Path
) -> None:
    words = [f"engine.{key}={value}" for key, value in engine.items()]
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=message):
            start_train("recipe.yaml", words, How(Path("run"), dry_run=dry_run))
    assert jobs == [] and not (tmp_path / "run").exists()


def test_what_is_not_asked_for_need_not_be_installed(nothing_installed: None) -> None:
    check_engine(with_engine(kind="fsdp", attention="auto"), 1)


def test_xformers_is_not_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "find_spec", lambda name: object())
    check_engine(with_engine(attention="xformers"), 1)
    with pytest.raises(ValueError, match=r"engine\.deterministic=true wants; set engine\.attention=sdpa"):
        check_engine(with_engine(attention="xformers", deterministic=True), 1)


@pytest.mark.parametrize("engine", [EngineConfig(kind="fsdp"), EngineConfig(kind="deepspeed", zero_stage=3)])
def test_a_run_goes_on_under_another_engine(engine: EngineConfig, jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "find_spec", lambda name: object())
    start_train("recipe.yaml", [], How(Path("run")))
    manifest = Path("run/checkpoints/step_000001/manifest.json")
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    words = [f"engine.kind={engine.kind}", f"engine.zero_stage={engine.zero_stage}"]
    start_train("recipe.yaml", words, How(Path("run")))
    assert f"kind: {engine.kind}" in Path("run/recipe.yaml").read_text()
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        start_train("recipe.yaml", ["seed=1"], How(Path("run")))


def test_a_run_that_is_done_says_what_is_next(jobs: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    start_train("recipe.yaml", [], How(Path("run")))
    Path("run/export").mkdir()
    start_train("recipe.yaml", [], How(Path("run")))
    assert capsys.readouterr().out.splitlines() == [
        "run: all 2 steps are done; halfstep export run makes the model ready to hand on",
        "run: all 2 steps are done; the model is in run/export",
    ]


@pytest.mark.parametrize("allow_fresh", [False, True])
def test_ranks_are_told_whether_they_may_start_over(allow_fresh: bool, jobs: list[Job]) -> None:
    run(lambda: command_line.train("recipe.yaml", run_dir=Path("run"), allow_fresh=allow_fresh))
    assert [(job.kind, job.path, job.options) for job in jobs] == [("train", Path("run"), {"allow_fresh": allow_fresh})]


def test_rank_0_is_told_to_watch_its_steps_of_a_single_run(jobs: list[Job]) -> None:
    run(lambda: command_line.train("recipe.yaml", run_dir=Path("run"), profile=True))
    assert [job.options for job in jobs] == [{"allow_fresh": False, "profile": True}]
    assert from_flags(as_flags(jobs[0].options)) == jobs[0].options, "as a job script passes them on"
    with pytest.raises(ValueError, match="--profile watches one run; leave --sweep out"):
        command_line.train("recipe.yaml", profile=True, sweep=["seed=1,2"])


def test_an_export_of_another_average_and_an_import_are_jobs(jobs: list[Job], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "model.pt").touch()
    run(lambda: command_line.export(Path("run"), ema=0.999))
    run(lambda: command_line.import_checkpoint(Path("model.pt"), out=Path("model.safetensors")))
    run(
        lambda: command_line.import_checkpoint(
            Path("model.pt"), out=Path("m"), family="guided-diffusion", heads=1, rescale_timesteps="no", eps_only=True
        )
    )
    assert jobs == [
        Job("export", Path("run"), {"out": None, "steps": None, "ema": 0.999, "merged": False, "push": None}),
        Job("import", Path("model.pt"), {"out": "model.safetensors"}),
        Job(
            "import",
            Path("model.pt"),
            {"out": "m", "family": "guided-diffusion", "heads": 1, "rescale_timesteps": False, "eps_only": True},
        ),
    ]


def run(command: Callable[[], None]) -> None:
    """A command, which ends with exit code 0."""
    with pytest.raises(typer.Exit) as ended:
        command()
    assert ended.value.exit_code == DONE


SLURM = "kind: slurm\nnodes: 2\nranks_per_node: 2\n"
HOW = How(Path("run"), cluster="cluster.yaml")


@pytest.fixture
def site(slurm: SlurmOnPath, tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmOnPath:
    """A folder with recipes and a cluster file of two nodes of two ranks, whose sbatch gives the numbers 17, 18, 19."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(f"data: {{shards: {shards}, global_batch_size: 16, micro_batch_size: 4}}\ntrain: {{steps: 2}}\n")
    Path("chain.yaml").write_text(Path("recipe.yaml").read_text() + "distill: {start_steps: 4, end_steps: 2, updates: 10}\n")
    Path("cluster.yaml").write_text(SLURM)
    for job_id in ("17", "18", "19"):
        slurm.says("sbatch", f"{job_id}\n")
    return slurm


def finish(run_dir: Path, steps: int) -> None:
    for manifest in (run_dir / "checkpoints" / f"step_{steps:06d}" / "manifest.json", run_dir / "export" / "model_index.json"):
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.touch()


def test_ranks_are_a_matter_of_the_cluster_file_where_there_is_one(site: SlurmOnPath) -> None:
    with pytest.raises(ValueError) as caught:
        start_train("recipe.yaml", [], replace(HOW, ranks=4))
    assert str(caught.value) == (
        "--ranks 4: is for runs on this machine; set cluster.nodes and cluster.ranks_per_node, or leave --cluster cluster.yaml out"
    )
    assert site.calls == [] and not Path("run").exists()


def test_ranks_that_do_not_divide_the_batch_are_refused_before_anything_is_queued(site: SlurmOnPath) -> None:
    with pytest.raises(ValueError, match=r"^6 ranks cannot divide 4 micro-batches .*\(or cluster\.nodes x .*\) a divisor of 4"):
        start_train("recipe.yaml", ["cluster.nodes=3"], HOW)
    assert site.calls == [] and not Path("run").exists()


def test_here_is_for_slurm_alone(jobs: list[Job]) -> None:
    with pytest.raises(ValueError, match=r"^--here runs on the nodes of a Slurm job, and --cluster local is of kind local; give slurm's$"):
        start_train("recipe.yaml", [], How(Path("run"), here=True))
    assert jobs == []


def test_a_run_is_queued_once_and_its_job_written_down(site: SlurmOnPath, capsys: pytest.CaptureFixture[str]) -> None:
    assert start_train("recipe.yaml", [], HOW) == DONE
    script = Path("run/job/train.sbatch").resolve()
    assert site.calls == [f"sbatch --parsable {script}"]
    [job] = submissions(Path("run"))
    assert (job.launcher, job.job_id, job.output) == ("slurm", "17", "job/slurm-17.out")
    said = capsys.readouterr().err.splitlines()
    assert said[-2:] == [
        f"queued as job 17: {script.parents[1]}",
        "  halfstep status run      halfstep logs run --follow      halfstep stop run",
    ]
    assert Path("run/recipe.yaml").exists() and "kind: slurm" in Path("run/cluster.yaml").read_text()


@pytest.mark.parametrize("state", ["pending", "running"])
def test_the_same_command_on_a_queued_run_submits_nothing(state: str, site: SlurmOnPath, capsys: pytest.CaptureFixture[str]) -> None:
    start_train("recipe.yaml", [], HOW)
    site.job_is("17", state)
    capsys.readouterr()
    assert start_train("recipe.yaml", [], HOW) == DONE
    assert "nothing is submitted" in capsys.readouterr().err
    assert len(site.calls) == 1 and len(submissions(Path("run"))) == 1


def test_a_run_whose_job_is_over_is_queued_again(site: SlurmOnPath) -> None:
    start_train("recipe.yaml", [], HOW)
    site.job_is("17", "failed")
    assert start_train("recipe.yaml", [], HOW) == DONE
    assert [job.job_id for job in submissions(Path("run"))] == ["17", "18"]


def test_a_run_that_is_done_is_not_queued_again(site: SlurmOnPath, capsys: pytest.CaptureFixture[str]) -> None:
    start_train("recipe.yaml", [], HOW)
    site.job_is("17", "completed")
    finish(Path("run"), 2)
    assert start_train("recipe.yaml", [], HOW) == DONE
    assert capsys.readouterr().err.endswith("run: is done; nothing is submitted\n")
    assert len(site.calls) == 1 and len(submissions(Path("run"))) == 1


def test_a_queue_that_does_not_answer_never_gets_a_second_job(site: SlurmOnPath) -> None:
    start_train("recipe.yaml", [], HOW)
    site.is_dead("17")
    with pytest.raises(RuntimeError, match="Unable to contact slurm controller"):
        start_train("recipe.yaml", [], HOW)
    assert len(site.calls) == 1


def test_a_job_that_sbatch_refuses_is_not_written_down(slurm: SlurmOnPath, site: SlurmOnPath) -> None:
    script = Path("run/job/train.sbatch").resolve()
    slurm.says(f"sbatch --parsable {script}", err="sbatch: error: invalid partition specified: nope\n", code=1)
    with pytest.raises(RuntimeError, match=r"sbatch: error: invalid partition specified: nope$"):
        start_train("recipe.yaml", [], HOW)
    assert submissions(Path("run")) == []


def test_dependent_jobs_of_a_chain_wait_for_one_another(site: SlurmOnPath) -> None:
    assert start_distill("chain.yaml", ["cluster.chain=dependent_jobs"], HOW) == DONE
    run = Path("run").resolve()
    assert site.calls == [
        f"sbatch --parsable {run}/stage_00_1000_steps/job/train.sbatch",
        f"sbatch --parsable --dependency=afterok:17 --kill-on-invalid-dep=yes {run}/stage_01_0002_steps/job/train.sbatch",
    ]
    stages = [run / "stage_00_1000_steps", run / "stage_01_0002_steps"]
    assert [[job.job_id for job in submissions(stage)] for stage in (run, *stages)] == [[], ["17"], ["18"]]
    assert all((stage / "cluster.yaml").exists() for stage in stages)


def test_of_a_chain_only_what_is_not_done_is_queued_and_then_waits_for_nothing(site: SlurmOnPath) -> None:
    start_distill("chain.yaml", ["cluster.chain=dependent_jobs"], HOW)
    site.job_is("17", "completed")
    site.job_is("18", "cancelled before it ran")
    finish(Path("run/stage_00_1000_steps"), 2)
    assert start_distill("chain.yaml", ["cluster.chain=dependent_jobs"], HOW) == DONE
    assert site.calls[2:] == [f"sbatch --parsable {Path('run').resolve()}/stage_01_0002_steps/job/train.sbatch"]


def test_a_sweep_is_one_array_of_what_is_not_done(site: SlurmOnPath, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = replace(HOW, sweep=["seed=1,2,3"])
    assert start_sweep("recipe.yaml", [], seeds) == DONE
    runs = [Path("run") / f"00{number}_seed={number + 1}" for number in range(3)]
    jobs = [submissions(run)[-1] for run in runs]
    assert [(job.job_id, job.output) for job in jobs] == [(f"17_{n}", f"../job/slurm-17_{n}.out") for n in range(3)]
    for job_id in ("17_0", "17_1", "17_2"):
        site.does_not_know(job_id)
    finish(runs[1], 2)
    assert start_sweep("recipe.yaml", [], seeds) == DONE
    assert "#SBATCH --array=0,2\n" in Path("run/job/train.sbatch").read_text()
    assert [submissions(run)[-1].job_id for run in runs] == ["18_0", "17_1", "18_2"]
    for job_id in ("18_0", "18_2"):
        site.does_not_know(job_id)
    finish(runs[0], 2)
    finish(runs[2], 2)
    capsys.readouterr()
    assert start_sweep("recipe.yaml", [], seeds) == DONE
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "run: every run of the sweep is done",
        "to compare its runs:  halfstep report run --out run/report.html",
    ]
    assert len(site.calls) == 2


def test_a_sweeps_folder_and_a_runs_are_kept_apart(site: SlurmOnPath) -> None:
    start_sweep("recipe.yaml", [], replace(HOW, sweep=["seed=1,2"]))
    with pytest.raises(ValueError, match=r"^run: holds a sweep; go on with the same --sweep, or give another --run-dir$"):
        start_train("recipe.yaml", [], HOW)
    with pytest.raises(ValueError, match=r"^run: holds a sweep; give another --run-dir$"):
        start_distill("chain.yaml", [], HOW)
    start_train("recipe.yaml", [], replace(HOW, run_dir=Path("single")))
    with pytest.raises(ValueError, match=r"^single: holds a run; give --sweep another --run-dir$"):
        start_sweep("recipe.yaml", [], replace(HOW, run_dir=Path("single"), sweep=["seed=1,2"]))
    assert len(site.calls) == 2


def test_ranks_of_several_machines_that_share_a_shard_are_warned(site: SlurmOnPath, capsys: pytest.CaptureFixture[str]) -> None:
    start_train("recipe.yaml", [], HOW)
    assert capsys.readouterr().err.startswith("warning: 4 ranks share 1 shard of ")
    start_train("recipe.yaml", ["cluster.nodes=1", "cluster.ranks_per_node=1"], replace(HOW, run_dir=Path("one")))
    assert "warning" not in capsys.readouterr().err


def test_ranks_of_this_machine_that_share_a_shard_are_not(jobs: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    start_train("recipe.yaml", ["data.global_batch_size=16", "data.micro_batch_size=4"], How(Path("run"), ranks=4))
    assert len(jobs) == 1 and capsys.readouterr().err == ""


def test_the_command_on_a_queued_run_ends_with_0(site: SlurmOnPath, tmp_path: Path) -> None:
    Path("run").mkdir()
    record_submission(Path("run"), Submission("slurm", "17", "job/slurm-17.out"))
    site.job_is("17", "pending")
    words = [sys.executable, "-m", "launch", "train", "recipe.yaml", "--cluster", "cluster.yaml", "--run-dir", "run"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "run: job 17 is queued (Resources) already; nothing is submitted\n")
    assert site.calls == []


def test_a_recipe_that_only_halves_is_not_trained(jobs: list[Job]) -> None:
    with pytest.raises(ValueError, match=r"distill\.teacher=runs/faces_finetuned\); use `halfstep distill distill_finetuned_source-tiny`"):
        start_train("distill_finetuned_source-tiny", [], How())
    assert jobs == []


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("start", "words", "message"),
    [
        (start_train, ["model.start=runs/none"], r"model\.start=runs/none: wanted the folder of one run"),
        (start_train, ["data.shards=nowhere"], r"nowhere/index\.json: there is no index"),
        (start_train, ["model={kind: ddpm, base: runs/none}"], r"model\.base=runs/none: no such file or folder; train it first"),
        (
            start_distill,
            ["distill={teacher: runs/none, updates: 1}"],
            r"distill\.teacher=runs/none: no such file or folder; train it first",
        ),
    ],
)
def test_what_is_not_there_is_named_before_anything_is_written(
    start: Callable[[str, list[str], How], int], words: list[str], message: str, dry_run: bool, jobs: list[Job]
) -> None:
    with pytest.raises(ValueError, match=message):
        start("recipe.yaml", words, How(run_dir=Path("run"), dry_run=dry_run))
    assert jobs == [] and not Path("run").exists()


def test_the_recipe_in_a_run_dir_goes_on_there_with_the_data_beside_it(
    jobs: list[Job], shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shards, "runs/first/shards")
    assert start_train("recipe.yaml", ["data.shards=runs/first/shards"], How(run_dir=Path("runs/first"))) == DONE
    first = Path("runs/first/recipe.yaml").read_text()
    assert "shards: shards\n" in first
    assert start_train("runs/first/recipe.yaml", [], How()) == DONE
    assert start_train("runs/first/recipe.yaml", [], How(run_dir=Path("other/second"))) == DONE
    monkeypatch.chdir("runs")
    assert start_train("first/recipe.yaml", [], How()) == DONE
    assert [job.path for job in jobs] == [Path("runs/first"), Path("runs/first"), Path("other/second"), Path("first")]
    assert Path("first/recipe.yaml").read_text() == first
    assert f"shards: {Path('first/shards').resolve()}\n" in Path("../other/second/recipe.yaml").read_text()


def test_a_stage_is_not_trained_alone(jobs: list[Job]) -> None:
    assert start_distill("recipe.yaml", ["distill={start_steps: 4, end_steps: 2, updates: 1}"], How(run_dir=Path("chain"))) == DONE
    with pytest.raises(ValueError, match=r"is a stage of a chain; go on with `halfstep distill chain/recipe\.yaml`"):
        start_train("chain/stage_01_0002_steps/recipe.yaml", [], How())
    assert start_distill("chain/recipe.yaml", [], How()) == DONE
    assert [job.path for job in jobs] == [Path("chain"), Path("chain")]
