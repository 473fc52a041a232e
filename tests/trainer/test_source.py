"""Sources: runs, chains and exports load as one model, and every contradiction is named."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_shards.files import content_record
from trainer.checkpoint import read_tensors
from trainer.descriptor import Descriptor, difference
from trainer.export import portable_recipe, write_export
from trainer.manifest import newest_checkpoint
from trainer.source import TIME_TABLE, WEIGHTS_FILE, denoiser_on, load_source
from trainer.stages import grid

WriteRun = Callable[..., Path]


def rewrite_manifest(folder: Path, name: str) -> None:
    """Make an export's manifest agree with a file that a test has changed."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = content_record((folder / name).read_bytes())
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_loads_the_ema_weights_of_its_newest_checkpoint(write_run: WriteRun, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", student_steps=63)
    source = load_source(run_dir)
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None
    ema = read_tensors(checkpoint, "ema")
    assert all(torch.equal(tensor, ema[name]) for name, tensor in source.model.state_dict().items())
    assert source.descriptor.timesteps == grid(1000, 63)
    assert source.trained_steps == 7
    assert not source.model.training
    assert not any(parameter.requires_grad for parameter in source.model.parameters())


def test_weights_are_held_in_the_lower_type_and_change_no_bit(write_run: WriteRun, tmp_path: Path) -> None:
    cast_anew, held = (load_source(write_run(tmp_path / name)).model for name in ("cast_anew", "held"))
    x_t, timestep = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 900.0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = cast_anew(x_t, timestep).sample.float()
    with torch.no_grad():
        assert torch.equal(denoiser_on(held, torch.device("cpu"), precision="bf16")(x_t, timestep), wanted)
    assert held.conv_in.weight.dtype == torch.bfloat16 and held.conv_norm_out.weight.dtype == torch.float32


def test_another_average_is_chosen_by_its_decay(write_run: WriteRun, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    first, other = load_source(run_dir), load_source(run_dir, ema=0.9)
    assert load_source(run_dir, ema=0.995).weights_sha256 == first.weights_sha256 != other.weights_sha256
    weights = first.model.state_dict()
    assert all(torch.equal(tensor, weights[name] + 0.02) for name, tensor in other.model.state_dict().items())
    with pytest.raises(ValueError, match=r"no average of decay 0\.99; give one of 0\.995, 0\.9"):
        load_source(run_dir, ema=0.99)


def test_loading_a_source_draws_no_random_number(write_run: WriteRun, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    before = torch.get_rng_state()
    load_source(run_dir)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("steps", [None, 125, 1])
def test_an_export_loads_as_the_run_that_it_was_made_from(write_run: WriteRun, tmp_path: Path, steps: int | None) -> None:
    run = load_source(write_run(tmp_path / "run", student_steps=steps))
    export = load_source(write_export(run, tmp_path / "export"))
    assert export.descriptor == run.descriptor
    assert export.weights_sha256 == run.weights_sha256
    assert export.recipe == portable_recipe(run.recipe)
    x_t, timestep = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(0)), torch.tensor([999.0, 999.0])
    assert torch.equal(export.model(x_t, timestep).sample, run.model(x_t, timestep).sample)


def test_a_chain_gives_the_stage_of_the_step_count_and_else_the_teacher(write_run: WriteRun, write_chain: WriteRun, tmp_path: Path) -> None:
    chain = write_chain({1000: write_run(tmp_path / "stage_00"), 8: write_run(tmp_path / "stage_01", student_steps=8)})
    assert load_source(chain, 8).path == tmp_path / "stage_01"
    assert load_source(chain, 50).path == tmp_path / "stage_00"
    assert load_source(chain).path == tmp_path / "stage_00"


def test_a_stage_that_was_not_started_is_named(write_run: WriteRun, write_chain: WriteRun, tmp_path: Path) -> None:
    chain = write_chain({1000: write_run(tmp_path / "stage_00"), 8: tmp_path / "stage_01"})
    with pytest.raises(ValueError, match=r"its model of 8 steps is not trained yet \(those of 1000 are\); give the command"):
        load_source(chain, 8)


def test_what_is_not_a_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing: not there"):
        load_source(tmp_path / "missing")
    with pytest.raises(ValueError, match="neither a RUN_DIR"):
        load_source(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no config\.json there nor in unet/"):
        load_source(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"an export without descriptor\.json"):
        load_source(tmp_path)


def test_a_run_without_a_checkpoint_says_how_to_train_it(write_run: WriteRun, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    next(run_dir.rglob("manifest.json")).unlink()
    with pytest.raises(ValueError, match=r"no valid checkpoint.*halfstep train"):
        load_source(run_dir)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("kind: cosine_clamped", "kind: cosine", "alpha_bar_sha256"),
        ("prediction: v", "prediction: eps", "prediction_type is v, recipe.yaml makes eps"),
        ("norm_groups: 4\n", "norm_groups: 4\n  layers_per_block: 2\n", "weight "),
    ],
)
def test_a_recipe_that_contradicts_the_checkpoint_is_refused(
    write_run: WriteRun, tmp_path: Path, old: str, new: str, complaint: str
) -> None:
    recipe = write_run(tmp_path / "run") / "recipe.yaml"
    text = recipe.read_text().replace("  layers_per_block: 1\n", "")
    assert old in text
    recipe.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=complaint):
        load_source(tmp_path / "run")


@pytest.mark.parametrize("name", ["descriptor.json", "recipe.yaml", WEIGHTS_FILE])
def test_a_damaged_or_missing_file_of_an_export_is_named(write_run: WriteRun, tmp_path: Path, name: str) -> None:
    folder = write_export(load_source(write_run(tmp_path / "run", student_steps=1)), tmp_path / "export")
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: is .*damaged or was edited"):
        load_source(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=Path(name).name):
        load_source(folder)


def test_an_export_of_other_weights_than_its_manifest_names_is_refused(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_export(load_source(write_run(tmp_path / "run", student_steps=2)), tmp_path / "export")
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors["conv_out.bias"] += 1e-3
    save_file(tensors, folder / WEIGHTS_FILE)
    rewrite_manifest(folder, WEIGHTS_FILE)
    with pytest.raises(ValueError, match="EMA weights have sha256"):
        load_source(folder)


def test_an_export_whose_time_table_is_not_of_its_timesteps_is_refused(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_export(load_source(write_run(tmp_path / "run", student_steps=2)), tmp_path / "export")
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors[TIME_TABLE] = tensors[TIME_TABLE].flip(0)
    save_file(tensors, folder / WEIGHTS_FILE)
    rewrite_manifest(folder, WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"not the table of descriptor\.json's timesteps"):
        load_source(folder)


def test_weights_that_are_a_pickle_are_never_opened(write_run: WriteRun, tmp_path: Path) -> None:
    class Canary:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "executed",)

    folder = write_export(load_source(write_run(tmp_path / "run", student_steps=1)), tmp_path / "export")
    (folder / WEIGHTS_FILE).write_bytes(pickle.dumps(Canary()))
    rewrite_manifest(folder, WEIGHTS_FILE)
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_source(folder)
    assert not (tmp_path / "executed").exists()


def test_a_descriptor_comes_back_from_its_json(write_run: WriteRun, tmp_path: Path) -> None:
    descriptor = load_source(write_run(tmp_path / "run", student_steps=8)).descriptor
    assert Descriptor.from_json(json.loads(json.dumps(descriptor.to_json()))) == descriptor
    assert difference(descriptor.to_json(), descriptor.to_json()) == ""
    assert difference(descriptor.to_json(), replace(descriptor, clip=False).to_json()) == "clip: True != False"


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("schema_version", 2, "schema_version is 2, wanted 1"),
        ("prediction_type", "v_prediction", "wanted 'v' or 'eps' or 'x_0'"),
        ("alpha_bar_sha256", "abc", "wanted 64 hexadecimal digits"),
        ("timesteps", [3, 1], "each above the one before"),
        ("timesteps", [0.5], "a list of integers"),
        ("timesteps", [], "a list of integers"),
        ("clip", 1, "clip is 1, wanted False or True"),
        ("sampler", "ddpm", "wanted 'ddim' or 'ancestral'"),
        ("variance", "learned", "wanted 'fixed_small' or 'fixed_large'"),
        ("step_count", 9, "step_count is 9, wanted 8"),
        ("teacher_sha256", "", "wanted 64 hexadecimal digits"),
        ("image_size", True, "wanted an integer above 0"),
        ("channels", 0, "wanted an integer above 0"),
    ],
)
def test_a_wrong_descriptor_field_is_named_with_what_is_wanted(
    write_run: WriteRun, tmp_path: Path, field: str, value: object, complaint: str
) -> None:
    fields = load_source(write_run(tmp_path / "run", student_steps=8)).descriptor.to_json()
    with pytest.raises(ValueError, match=complaint):
        Descriptor.from_json({**fields, field: value}, where="x/descriptor.json")
    del fields[field]
    with pytest.raises(ValueError, match=f"x/descriptor.json: the descriptor has no {field}"):
        Descriptor.from_json(fields, where="x/descriptor.json")
