"""From the command line to a job: what is refused before anything starts, and what the ranks are told."""

from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from data_shards.faces import FacesSource
from data_shards.pack import pack
from launch import __main__ as command_line
from launch import start
from launch.job import Job
from launch.start import How, check_engine, start_train
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


@pytest.mark.parametrize("allow_fresh", [False, True])
def test_ranks_are_told_whether_they_may_start_over(allow_fresh: bool, jobs: list[Job]) -> None:
    run(lambda: command_line.train("recipe.yaml", run_dir=Path("run"), allow_fresh=allow_fresh))
    assert [(job.kind, job.path, job.options) for job in jobs] == [("train", Path("run"), {"allow_fresh": allow_fresh})]


def test_an_export_of_another_average_and_an_import_are_jobs(jobs: list[Job], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "model.pt").touch()
    run(lambda: command_line.export(Path("run"), ema=0.999))
    run(lambda: command_line.import_checkpoint(Path("model.pt"), out=Path("model.safetensors")))
    assert jobs == [
        Job("export", Path("run"), {"out": None, "steps": None, "ema": 0.999, "push": None}),
        Job("import", Path("model.pt"), {"out": "model.safetensors"}),
    ]


def run(command: Callable[[], None]) -> None:
    """A command, which ends with exit code 0."""
    with pytest.raises(typer.Exit) as ended:
        command()
    assert ended.value.exit_code == DONE
