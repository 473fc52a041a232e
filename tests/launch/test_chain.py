"""A chain's folders: one run a stage, each frozen before the first step."""

import json
from pathlib import Path

import pytest

from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from launch.chain import freeze_chain, planned_stages, stage_names, stage_seed, student_config, with_teacher
from launch.run_dir import freeze
from launch.start import check_ranks
from trainer.chain import read_chain
from trainer.config import (
    DdpmConfig,
    DenoisingConfig,
    LinearNoiseSchedule,
    ProgressiveDistillationConfig,
    RunConfig,
    TinyUNetConfig,
)
from trainer.config_io import dump_yaml, load_recipe


def _chain(**distill: object) -> RunConfig:
    settings = {"start_steps": 8, "end_steps": 2, "updates": [10, 30], "learning_rate": [1e-5, 1e-4], **distill}
    return RunConfig.model_validate(
        {
            "data": {"faces": {"count": 4, "size": 16}, "global_batch_size": 16, "micro_batch_size": 4},
            "train": {"steps": 10},
            "distill": settings,
        }
    )


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frozen chain of two halvings that trains its own teacher."""
    folder = tmp_path_factory.mktemp("chain")
    pack(FacesSource("open-peeps", 4), folder / "shards", size=16, workers=1)
    config = _chain()
    assert config.distill is not None
    freeze_chain(folder, config, config.distill, shards=folder / "shards")
    return folder


def test_a_chain_lists_its_teacher_and_every_student(chain: Path) -> None:
    stages = [(stage.name, stage.steps, stage.trained_here) for stage in read_chain(chain)]
    assert stages == [("stage_00_1000_steps", 1000, True), ("stage_01_0004_steps", 4, True), ("stage_02_0002_steps", 2, True)]


def test_a_student_learns_from_the_stage_before_it(chain: Path) -> None:
    recipe = load_recipe(chain / "stage_02_0002_steps" / "recipe.yaml")
    objective = recipe.objective
    assert isinstance(objective, ProgressiveDistillationConfig)
    assert (objective.teacher, objective.teacher_steps, objective.student_steps) == ("../stage_01_0004_steps", 4, 2)
    assert recipe.train.steps == 30 and recipe.optim.learning_rate == 1e-4 and recipe.distill is None
    assert recipe.data.shards == "../shards"


def test_a_moved_chain_needs_no_absolute_path(chain: Path) -> None:
    for recipe in chain.glob("*/recipe.yaml"):
        assert str(chain) not in recipe.read_text()
    assert str(chain) not in json.dumps(json.loads((chain / "chain.json").read_text()))


def test_every_stage_has_a_seed_of_its_own() -> None:
    seeds = {stage_seed(seed, number) for seed in range(10) for number in range(1, 11)}
    assert len(seeds) == 100 and max(seeds) < 2**31


def test_stages_may_have_batches_of_their_own() -> None:
    config = _chain(global_batch_size=12, micro_batch_size=2)
    assert config.distill is not None
    [first, _] = [student_config(config, config.distill, stage, teacher="..") for stage in planned_stages(config, config.distill)]
    assert (first.data.global_batch_size, first.data.micro_batch_size, first.micro_batches) == (12, 2, 6)
    assert (config.data.global_batch_size, config.data.micro_batch_size) == (16, 4), "the teacher's stay"
    check_ranks(config.stage_data, 3)
    with pytest.raises(ValueError, match=r"^4 ranks cannot divide 6 micro-batches .*or change distill\.micro_batch_size$"):
        check_ranks(config.stage_data, 4, section="distill")
    with pytest.raises(ValueError, match=r"6 is not a multiple of data\.micro_batch_size=4; set distill\.global_batch_size=8"):
        _chain(global_batch_size=6)
    with pytest.raises(ValueError, match=r"16 is not a multiple of distill\.micro_batch_size=3; set distill\.global_batch_size=15"):
        _chain(micro_batch_size=3)


def test_warm_up_takes_a_fifth_of_a_short_stage() -> None:
    config = _chain(lr_schedule={"kind": "linear", "warmup_steps": 5})
    assert config.distill is not None
    stages = planned_stages(config, config.distill)
    warmups = [student_config(config, config.distill, stage, teacher="..").lr_schedule.warmup_steps for stage in stages]
    assert warmups == [2, 5]


def test_a_teacher_from_elsewhere_decides_the_model(tmp_path: Path, chain: Path) -> None:
    teacher = chain / "stage_00_1000_steps"
    config = with_teacher(_chain(teacher=str(teacher)), teacher)
    assert config.model == load_recipe(teacher / "recipe.yaml").model
    other = RunConfig.model_validate({"data": {"shards": "x"}, "train": {"steps": 1}, "noise_schedule": {"kind": "linear"}})
    with pytest.raises(
        ValueError, match=r'noise_schedule\.kind is "linear" in the recipe, not "cosine_clamped" as the teacher .* give noise_schedule=null'
    ):
        with_teacher(other, teacher)


def test_students_of_a_fine_tuned_teacher_begin_with_the_teacher_alone(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    tuned = _chain(updates=1, learning_rate=1e-4).model_copy(update={"model": TinyUNetConfig(start="/runs/source")})
    (teacher / "recipe.yaml").write_text(dump_yaml(tuned.model_copy(update={"distill": None})))
    config = with_teacher(_chain(teacher=str(teacher)), teacher)
    assert config.model == TinyUNetConfig(), "a recipe may name the teacher's own sections, too"
    with_teacher(_chain(teacher=str(teacher)).model_copy(update={"model": TinyUNetConfig()}), teacher)
    assert tuned.distill is not None
    student = student_config(tuned, tuned.distill, planned_stages(tuned, tuned.distill)[0], teacher="..")
    assert student.model == TinyUNetConfig(), "a chain that fine-tunes its own teacher"


def _stock(folder: Path, **scheduler: object) -> Path:
    """A stock pipeline as far as a launcher looks at it."""
    (folder / "scheduler").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def test_a_stock_pipeline_is_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(_stock(tmp_path / "google", num_train_timesteps=1000).parent)
    config = with_teacher(_chain(teacher="google"), "google")
    assert config.model == DdpmConfig(base=str(tmp_path / "google"))
    assert config.noise_schedule.kind == "base" and config.objective == DenoisingConfig(prediction="base")
    named = RunConfig.model_validate(
        _chain().model_dump() | {"model": {"kind": "ddpm", "base": "google"}, "noise_schedule": {"kind": "base"}}
    )
    assert with_teacher(named, "google").model == config.model, "a base that the recipe names too is the same"
    assert config.distill is not None
    pack(FacesSource("open-peeps", 4), tmp_path / "shards", size=16, workers=1)
    freeze_chain(tmp_path / "chain", config, config.distill, shards=tmp_path / "shards")
    first, second, _ = read_chain(tmp_path / "chain")
    assert (first.run_dir, first.steps, first.trained_here, second.trained_here) == (tmp_path / "google", 1000, False, True)
    student = load_recipe(second.run_dir / "recipe.yaml").objective
    assert isinstance(student, ProgressiveDistillationConfig)
    assert (student.teacher, student.prediction) == (str(tmp_path / "google"), "base")


def test_a_stock_pipelines_other_number_of_levels_is_spelled_out(tmp_path: Path) -> None:
    short = with_teacher(_chain(), _stock(tmp_path / "short", num_train_timesteps=60, beta_end=0.01))
    assert short.noise_schedule == LinearNoiseSchedule(steps=60, beta_end=0.01)


def test_a_hub_id_is_a_teacher_at_one_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    config = with_teacher(_chain(teacher="google/ddpm-cifar10-32"), "google/ddpm-cifar10-32")
    assert config.model == DdpmConfig(base="google/ddpm-cifar10-32") and config.distill is not None
    pinned = config.model_copy(update={"model": config.model.model_copy(update={"revision": commit})})
    pack(FacesSource("open-peeps", 4), tmp_path / "shards", size=16, workers=1)
    freeze_chain(tmp_path / "chain", pinned, config.distill, shards=tmp_path / "shards")
    first, second, third = read_chain(tmp_path / "chain")
    assert (first.run_dir, first.trained_here) == (Path(f"google/ddpm-cifar10-32@{commit}"), False)
    taught = [load_recipe(stage.run_dir / "recipe.yaml").objective for stage in (second, third)]
    assert [getattr(objective, "teacher", None) for objective in taught] == [str(first.run_dir), f"../{second.name}"]
    at = with_teacher(_chain(), f"google/ddpm-cifar10-32@{commit}")
    assert at.model == DdpmConfig(base="google/ddpm-cifar10-32", revision=commit)


def test_a_teacher_that_is_nowhere_says_how_to_make_a_tiny_one() -> None:
    with pytest.raises(ValueError, match=r"distill.teacher=runs/tiny/ddpm: no such .*: halfstep make-tiny ddpm runs/tiny/ddpm"):
        with_teacher(_chain(), "runs/tiny/ddpm")


def test_a_chain_with_more_updates_is_another_chain(chain: Path) -> None:
    manifest = chain / "stage_00_1000_steps" / "checkpoints" / "step_000001" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    config = _chain(updates=[10, 31])
    assert config.distill is not None
    with pytest.raises(ValueError, match=r"distill\.updates: was \[10, 30\], now \[10, 31\]"):
        freeze_chain(chain, config, config.distill, shards=chain / "shards")
    stage = chain / "stage_02_0002_steps"
    freeze(stage, load_recipe(stage / "recipe.yaml"), shards=chain / "shards", steps_fixed=True)


def test_a_chain_or_a_student_is_no_teacher(chain: Path) -> None:
    with pytest.raises(ValueError, match="wanted the folder of one run or export"):
        with_teacher(_chain(), chain)
    with pytest.raises(ValueError, match="is a student already"):
        with_teacher(_chain(), chain / "stage_01_0004_steps")


def test_a_head_changes_in_a_stage_of_its_own_with_the_steps_of_its_teacher() -> None:
    change = {"prediction": "x_0", "at_steps": 4, "updates": 50, "turn": 0.5, "learning_rate": 2e-4}
    config = _chain(head_change=change)
    assert config.distill is not None
    stages = planned_stages(config, config.distill)
    assert [(stage.number, stage.teacher_steps, stage.steps, stage.prediction) for stage in stages] == [
        (1, 8, 4, "v"),
        (2, 4, 4, "x_0"),
        (3, 4, 2, "x_0"),
    ]
    assert stage_names(config, config.distill)[1:] == ["stage_01_0004_steps", "stage_02_0004_steps", "stage_03_0002_steps"]
    recipes = [student_config(config, config.distill, stage, teacher="..") for stage in stages]
    assert [recipe.train.steps for recipe in recipes] == [10, 50, 30]
    assert [recipe.optim.learning_rate for recipe in recipes] == [1e-5, 2e-4, 1e-4]
    objectives = [recipe.objective for recipe in recipes]
    assert all(isinstance(objective, ProgressiveDistillationConfig) for objective in objectives)
    assert [getattr(objective, "turn_steps", None) for objective in objectives] == [None, 25, None]
    assert [getattr(objective, "clip_target", None) for objective in objectives] == [False, True, False]
    assert [getattr(objective, "teacher_precision", None) for objective in objectives] == [None, "fp32", None]


def test_a_head_changes_before_the_first_halving_unless_the_recipe_says_when() -> None:
    config = _chain(head_change={"prediction": "x_0", "updates": 5})
    assert config.distill is not None
    assert [(stage.halving, stage.steps) for stage in planned_stages(config, config.distill)] == [(None, 8), (1, 4), (2, 2)]


def test_a_skipped_student_leaves_four_steps_to_the_next_one() -> None:
    config = _chain(skip=[4], updates=10, learning_rate=1e-4)
    assert config.distill is not None
    [stage] = planned_stages(config, config.distill)
    objective = student_config(config, config.distill, stage, teacher="..").objective
    assert isinstance(objective, ProgressiveDistillationConfig)
    assert (objective.teacher_steps, objective.student_steps) == (8, 2)


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ({"skip": [2]}, r"2 is no student between start_steps=8 and end_steps=2 \(4\)"),
        ({"skip": [4]}, r"2 values for 1 stages"),
        ({"head_change": {"updates": 5}}, r"the first teacher predicts v already"),
        ({"head_change": {"prediction": "x_0", "updates": 5, "at_steps": 3}}, r"no model of the chain samples in 3 steps, only in 8, 4, 2"),
    ],
)
def test_a_chain_that_cannot_be_says_why(distill: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _chain(**distill)


def test_a_stage_is_told_how_its_times_are_drawn() -> None:
    config = _chain(stratified=False)
    assert config.distill is not None
    objectives = [student_config(config, config.distill, stage, teacher="..").objective for stage in planned_stages(config, config.distill)]
    assert [getattr(objective, "stratified", None) for objective in objectives] == [False, False]
