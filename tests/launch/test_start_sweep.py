"""`halfstep sweep`: which jobs are started, in which order, what ends it, and the report at its end."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from launch import __main__ as command_line
from launch.job import Job
from launch.sweep import is_sweep, sweep_runs
from tests.launch.slurm_on_path import SlurmOnPath
from trainer.chain import read_chain
from trainer.exit_codes import CALL_AGAIN, DONE, NUMERIC

CHAIN = "distill: {start_steps: 4, end_steps: 2, updates: 10}\n"
RATES = ["optim.learning_rate=1e-4,3e-4", "seed=7"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four faces."""
    out = tmp_path_factory.mktemp("shards")
    pack(FacesSource("open-peeps", 4), out, size=16, workers=1)
    return out


class Started:
    """The jobs that are started, none of which runs; their exit codes by the folder's name."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.codes: dict[str, int] = {}

    def __call__(self, job: Job, *_: object, **__: object) -> int:
        self.jobs.append(job)
        return self.codes.get(job.path.name, DONE)

    @property
    def kinds(self) -> list[tuple[str, str]]:
        return [(job.kind, job.path.name) for job in self.jobs]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shards: Path) -> Started:
    found = Started()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.local._attempt", found)
    recipe = f"data: {{shards: {shards}, global_batch_size: 16, micro_batch_size: 4}}\ntrain: {{steps: 2}}\n"
    Path("recipe.yaml").write_text(recipe)
    Path("chain.yaml").write_text(recipe + CHAIN)
    return found


def code(command: Callable[[], None]) -> int:
    with pytest.raises(typer.Exit) as ended:
        command()
    return ended.value.exit_code


RUNS = ["000_learning_rate=1e-4", "001_learning_rate=3e-4"]


def test_runs_follow_one_another_and_one_report_compares_them(started: Started, capsys: pytest.CaptureFixture[str]) -> None:
    assert code(lambda: command_line.sweep_("recipe.yaml", RATES)) == DONE
    folder = Path("runs/recipe_sweep")
    assert started.kinds == [("train", RUNS[0]), ("train", RUNS[1]), ("report", "recipe_sweep")]
    assert is_sweep(folder) and [run.name for run in sweep_runs(folder)] == RUNS
    frozen = [(run / "recipe.yaml").read_text() for run in sweep_runs(folder)]
    assert ["learning_rate: 0.0001" in text and "seed: 7" in text for text in frozen] == [True, False]
    assert started.jobs[-1].options == {
        "dirs": [str(folder / name) for name in RUNS],
        "out": str(folder / "report.html"),
        "title": "recipe_sweep",
    }
    assert capsys.readouterr().out.endswith("runs/recipe_sweep: 2 runs, compared in runs/recipe_sweep/report.html\n")


def test_every_run_is_measured_where_there_are_images_to_compare_with(started: Started, shards: Path) -> None:
    for name in RUNS:
        manifest = Path("runs/recipe_sweep") / name / "checkpoints/step_000002/manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.touch()
    assert code(lambda: command_line.sweep_("recipe.yaml", RATES, reference=shards, steps="8,2", images=64)) == DONE
    assert started.kinds[2:] == [("evaluate", RUNS[0]), ("evaluate", RUNS[1]), ("report", "recipe_sweep")]
    options = started.jobs[2].options
    assert (options["reference"], options["steps"], options["images"]) == (str(shards), [8, 2], 64)
    assert (options["out"], options["cache"]) == (f"runs/recipe_sweep/{RUNS[0]}/evaluation.json", "runs/recipe_sweep/evaluation_cache")


def test_step_counts_without_a_reference_are_refused(started: Started) -> None:
    with pytest.raises(ValueError, match=r"^--steps and --images say how quality is measured; give --reference SHARDS too"):
        command_line.sweep_("recipe.yaml", RATES, steps="8")
    with pytest.raises(ValueError, match=r"^nothing to try: give KEY=V1,V2"):
        command_line.sweep_("recipe.yaml", ["seed=1", "model.channels=[8,16]"])
    assert started.jobs == [] and not Path("runs").exists()


def test_a_recipe_with_halvings_is_a_chain_for_each_value(started: Started) -> None:
    assert code(lambda: command_line.sweep_("chain.yaml", ["distill.loss=v_mse,x_mse"])) == DONE
    assert [kind for kind, _ in started.kinds] == ["distill", "distill", "report"]
    chains = sweep_runs(Path("runs/chain_sweep"))
    assert [[stage.steps for stage in read_chain(chain)] for chain in chains] == [[1000, 2]] * 2
    losses = ["loss: x_mse" in (read_chain(chain)[1].run_dir / "recipe.yaml").read_text() for chain in chains]
    assert losses == [False, True]
    started.jobs.clear()
    assert code(lambda: command_line.sweep_("chain.yaml", ["distill=null", *RATES], run_dir=Path("teachers"))) == DONE
    assert [kind for kind, _ in started.kinds] == ["train", "train", "report"]


def test_a_run_that_fails_does_not_keep_the_others_from_running(started: Started) -> None:
    started.codes[RUNS[0]] = NUMERIC
    assert code(lambda: command_line.sweep_("recipe.yaml", RATES)) == NUMERIC
    assert [name for _, name in started.kinds] == [*RUNS, "recipe_sweep"]


def test_a_sweep_that_is_asked_to_stop_starts_nothing_more(started: Started, capsys: pytest.CaptureFixture[str]) -> None:
    started.codes[RUNS[0]] = CALL_AGAIN
    assert code(lambda: command_line.sweep_("recipe.yaml", RATES)) == CALL_AGAIN
    assert [name for _, name in started.kinds] == [RUNS[0]]
    assert "halfstep report runs/recipe_sweep --out runs/recipe_sweep/report.html" in capsys.readouterr().err
    started.jobs.clear()
    started.codes[RUNS[0]] = CALL_AGAIN
    limited = [*RATES, "train.stop_after_steps=1"]  # each of them by its own limit
    assert code(lambda: command_line.sweep_("recipe.yaml", limited)) == CALL_AGAIN
    assert [name for _, name in started.kinds] == [*RUNS, "recipe_sweep"]


def test_train_takes_a_sweep_too_and_trains_teachers_alone(started: Started) -> None:
    assert code(lambda: command_line.train("chain.yaml", run_dir=Path("seeds"), sweep=["seed=1,2"])) == DONE
    assert started.kinds == [("train", "000_seed=1"), ("train", "001_seed=2"), ("report", "seeds")]


def test_on_slurm_chains_are_elements_of_one_array(started: Started, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str]) -> None:
    Path("cluster.yaml").write_text("kind: slurm\n")
    slurm.says("sbatch", "17\n")
    assert code(lambda: command_line.sweep_("chain.yaml", ["seed=1,2"], cluster="cluster.yaml")) == DONE
    script = Path("runs/chain_sweep/job/train.sbatch").read_text()
    assert "#SBATCH --array=0,1\n" in script and script.splitlines()[-1].endswith(
        f"-m launch.slurm_job distill {Path('runs/chain_sweep').resolve()} --array"
    )
    assert started.jobs == [] and "halfstep report runs/chain_sweep --out" in capsys.readouterr().err


def test_a_report_of_a_sweep_is_of_its_runs(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    code(lambda: command_line.sweep_("recipe.yaml", RATES))
    started.jobs.clear()
    assert code(lambda: command_line.report([Path("runs/recipe_sweep")], out=Path("page.html"), draw=False)) == DONE
    [job] = started.jobs
    assert job.options["dirs"] == [f"runs/recipe_sweep/{name}" for name in RUNS] and job.options["title"] == "recipe_sweep"
    assert json.loads(json.dumps(job.options))["draw"] is False
