"""A teacher is trained, fine-tuned and halved on each role of data, for both samplers, on two ranks, as the tiny twins' headers say."""

from pathlib import Path

import pytest

from data_shards.derive.request import DeriveJob, DrawRequest
from launch.chain import freeze_chain, with_teacher
from launch.cluster import LocalCluster
from launch.data import pack_faces
from launch.start import freeze_run
from launch.status import is_done, print_status
from tests.distributed.forked_ranks import ForkedRanks
from tests.distributed.runs import curves
from trainer.chain import read_chain
from trainer.config import FacesConfig
from trainer.config_io import load_recipe, recipe_path
from trainer.hash import hash_run
from trainer.source import load_source

ROLES = ("source", "finetune", "mixture", "teacher_samples")
CASES = [(role, target) for role in ROLES for target in ("ddim", "ancestral")]
SAMPLE = (("mixture", "ancestral"), ("teacher_samples", "ddim"))
"""Of the cases, those in make test."""
PIXELS, RANKS, STEPS = 16, 2, 4
NETWORK = ("model.channels=[8,16]", "model.attention=[false,true]", "model.attention_heads=2", "model.norm_groups=4")
SMALL = (*NETWORK, f"train.steps={STEPS}", "lr_schedule.warmup_steps=1", "logging.sample_every_steps=0")


def faces(folder: Path, name: str) -> Path:
    """Sixty-four faces of a style."""
    style = {"source": "open-peeps", "finetune": "voxel-art"}[name]
    return pack_faces(FacesConfig(style=style, count=64, size=PIXELS), folder / "shards" / name)


def trained(forked: ForkedRanks, folder: Path, recipe: str, *overrides: str) -> list[int]:
    """The exit codes of a run's ranks."""
    config = load_recipe(recipe_path(recipe), (*SMALL, *overrides))
    freeze_run(folder, config, LocalCluster(), shards_in=folder / "shards")
    forked.start("train", folder, ranks=RANKS)
    return forked.wait()


@pytest.fixture(scope="session")
def teachers(forked: ForkedRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source's teacher, the one that was fine-tuned from it, and shards of both styles and of its own images."""
    folder = tmp_path_factory.mktemp("teachers")
    assert trained(forked, folder / "source", "faces_source", f"data.shards={faces(folder, 'source')}") == [0] * RANKS
    words = (f"data.shards={faces(folder, 'finetune')}", f"model.start={folder / 'source'}")
    assert trained(forked, folder / "finetuned", "faces_finetuned", *words) == [0] * RANKS
    run_dir = folder / "shards" / "teacher_samples" / "run"
    run_dir.mkdir(parents=True)
    DeriveJob.drawing(DrawRequest(str(folder / "finetuned"), 64, steps=2, seed=1, samples_per_shard=32)).write(run_dir)
    forked.start("draw", run_dir, ranks=RANKS)
    assert forked.wait() == [0] * RANKS
    return folder


@pytest.mark.models_sample
def test_a_fine_tuned_teacher_says_what_it_began_with_and_goes_on_bit_for_bit(teachers: Path, forked: ForkedRanks, tmp_path: Path) -> None:
    source, tuned = load_source(teachers / "source"), load_source(teachers / "finetuned")
    assert tuned.descriptor.start_sha256 == source.weights_sha256 != tuned.weights_sha256
    run_dir = tmp_path / "stopped"
    words = (f"data.shards={teachers / 'shards' / 'finetune'}", f"model.start={teachers / 'source'}")
    assert trained(forked, run_dir, "faces_finetuned", *words, "train.stop_after_steps=2") == [75] * RANKS
    assert trained(forked, run_dir, "faces_finetuned", *words) == [0] * RANKS
    assert curves(run_dir)[run_dir.name].values == curves(teachers / "finetuned")["finetuned"].values
    assert hash_run(run_dir) == hash_run(teachers / "finetuned")


@pytest.mark.parametrize(
    ("role", "target"), [pytest.param(*case, marks=pytest.mark.models_sample if case in SAMPLE else pytest.mark.models) for case in CASES]
)
def test_the_teacher_is_halved_on_every_role_of_data_for_both_samplers(
    teachers: Path, forked: ForkedRanks, tmp_path: Path, capsys: pytest.CaptureFixture[str], role: str, target: str
) -> None:
    names = ("source", "finetune") if role == "mixture" else (role,)
    shards = [teachers / "shards" / name for name in names]
    listed = ", ".join(f"{{shards: {folder}, weight: 1}}" for folder in shards)
    data = f"data.mixture=[{listed}]" if role == "mixture" else f"data.shards={shards[0]}"
    chain = (f"distill.target={target}", "distill.start_steps=4", "distill.updates=2", "distill.learning_rate=1e-3")
    config = load_recipe(recipe_path(f"distill_finetuned_{role}-tiny"), (data, *chain, f"distill.teacher={teachers / 'finetuned'}"))
    assert config.distill is not None and config.distill.teacher is not None
    run_dir = tmp_path / "chain"
    freeze_chain(run_dir, with_teacher(config, Path(config.distill.teacher)), config.distill, shards=shards)
    forked.start("distill", run_dir, ranks=RANKS)
    assert forked.wait() == [0] * RANKS
    first, last = (load_source(stage.run_dir) for stage in read_chain(run_dir)[1:])
    assert (last.descriptor.step_count, last.descriptor.sampler) == (1, target)
    assert first.descriptor.teacher_sha256 == load_source(teachers / "finetuned").weights_sha256 and first.descriptor.start_sha256 is None
    assert is_done(run_dir)
    print_status(run_dir, as_json=False)
    assert capsys.readouterr().out.count(f"done, step 2/2, data: {role.replace('_', ' ')}") == 2
