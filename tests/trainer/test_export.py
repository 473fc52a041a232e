"""Exports: stock diffusers loads them and draws the same images; whole or absent."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from trainer.config import RunConfig
from trainer.export import export_job, export_run, exported_sha256, portable_recipe, push_export, write_export
from trainer.sample import draw_images
from trainer.source import load_source

WriteRun = Callable[..., Path]

COUNT = 2


def stock_images(pipeline: DDIMPipeline | DDPMPipeline, steps: int, count: int = COUNT) -> np.ndarray:
    """What a user's four lines draw from the seeds 5, 6, ..., as bytes."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(5 + image) for image in range(count)]
    output = pipeline(batch_size=count, generator=generators, num_inference_steps=steps)
    assert isinstance(output, ImagePipelineOutput)
    return np.stack([np.asarray(image) for image in output.images])


def largest_difference(stock: np.ndarray, ours: torch.Tensor) -> int:
    return int(np.abs(stock.astype(int) - ours.numpy().astype(int)).max())


@pytest.mark.parametrize("steps", [500, 63, 8, 1])
@pytest.mark.parametrize("schedule", ["cosine_clamped", "linear"])
def test_a_stock_ddim_pipeline_draws_a_students_images(write_run: WriteRun, tmp_path: Path, steps: int, schedule: str) -> None:
    source = load_source(write_run(tmp_path / "run", student_steps=steps, schedule=schedule, image_levels=2 if steps < 500 else 1))
    folder = write_export(source, tmp_path / "export")
    count = COUNT if steps < 500 else 1
    ours = draw_images(source, steps=steps, seed=5, count=count)
    assert ours.float().std() > 10
    assert largest_difference(stock_images(DDIMPipeline.from_pretrained(folder), steps, count), ours) <= 2


@pytest.mark.parametrize("steps", [500, 63, 8, 1])
@pytest.mark.parametrize("schedule", ["cosine_clamped", "linear"])
def test_a_stock_ddpm_pipeline_draws_an_ancestral_students_images(write_run: WriteRun, tmp_path: Path, steps: int, schedule: str) -> None:
    run_dir = write_run(tmp_path / "run", student_steps=steps, schedule=schedule, sampler="ancestral", image_levels=2 if steps < 500 else 1)
    source = load_source(run_dir)
    folder = write_export(source, tmp_path / "export")
    count = COUNT if steps < 500 else 1
    ours = draw_images(source, steps=steps, seed=5, count=count)
    assert largest_difference(stock_images(DDPMPipeline.from_pretrained(folder), steps, count), ours) <= 2


def test_a_stock_pipeline_draws_a_teachers_images_at_its_full_length_and_in_fewer_steps(write_run: WriteRun, tmp_path: Path) -> None:
    source = load_source(write_run(tmp_path / "run", levels=60))
    folder = write_export(source, tmp_path / "export")
    for steps in (60, 30):
        ours = draw_images(source, steps=steps, seed=5, count=COUNT)
        assert largest_difference(stock_images(DDIMPipeline.from_pretrained(folder), steps), ours) <= 2


def test_either_stock_pipeline_loads_an_export_and_refuses_more_steps_than_it_has(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_export(load_source(write_run(tmp_path / "run", student_steps=8)), tmp_path / "export")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "DDIMPipeline"
    for pipeline in (DDIMPipeline, DDPMPipeline):
        with pytest.raises(ValueError, match="cannot be larger"):
            stock_images(pipeline.from_pretrained(folder), 50)


def test_the_card_says_how_to_sample_and_holds_recipe_and_numbers(write_run: WriteRun, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "chain" / "run", student_steps=8, sampler="ancestral")
    rows = [
        {"model": "student", "steps": 8, "frechet_distance": 12.345678, "kid": None, "seconds_per_image": 0.01, "feature_net": "abc"},
        {"model": "student", "steps": 4, "frechet_distance": 99.0, "kid": 1.0, "seconds_per_image": 0.01, "feature_net": "abc"},
    ]
    (tmp_path / "chain" / "evaluation.json").write_text(json.dumps(rows))
    folder = write_export(load_source(run_dir), tmp_path / "export", repository="me/faces-8")
    card = (folder / "README.md").read_text()
    for wanted in (
        "library_name: diffusers",
        "- progressive-distillation",
        'pipeline = DDPMPipeline.from_pretrained("me/faces-8")',
        "num_inference_steps=8)",
        "| Seed | 0 |",
        "| 8 | 12.35 | - | 0.01 |",
        "![8 sampling steps from fixed noise](samples.png)",
    ):
        assert wanted in card
    assert "99" not in card.split("## Metrics")[1]


def test_an_export_of_the_same_weights_is_kept_and_of_others_replaced(write_run: WriteRun, tmp_path: Path) -> None:
    first, second = (load_source(write_run(tmp_path / f"run_{seed}", student_steps=1, seed=seed)) for seed in (1, 2))
    folder = write_export(first, tmp_path / "export")
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert write_export(first, folder) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    write_export(second, folder)
    assert load_source(folder).weights_sha256 == second.weights_sha256
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_damaged_export_is_replaced_and_what_a_killed_one_left_is_swept(write_run: WriteRun, tmp_path: Path) -> None:
    source = load_source(write_run(tmp_path / "run", student_steps=1))
    folder = write_export(source, tmp_path / "export")
    (folder / "descriptor.json").unlink()
    shutil.copytree(folder, tmp_path / ".export.tmp-0123")
    write_export(source, folder)
    assert load_source(folder).descriptor == source.descriptor
    assert not (tmp_path / ".export.tmp-0123").exists()


def test_a_full_disk_leaves_the_old_export_whole_and_nothing_else(write_run: WriteRun, tmp_path: Path) -> None:
    first, second = (load_source(write_run(tmp_path / f"run_{seed}", student_steps=1, seed=seed)) for seed in (1, 2))
    folder = write_export(first, tmp_path / "export")
    before = sorted(path.name for path in tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The weights' file is larger than this, so that writing it fails half-way as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(Exception, match="too large"):
            write_export(second, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert load_source(folder).weights_sha256 == first.weights_sha256


def test_a_folder_that_is_no_export_is_never_overwritten(write_run: WriteRun, tmp_path: Path) -> None:
    source = load_source(write_run(tmp_path / "run", student_steps=1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="not an export and not empty"):
        write_export(source, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_an_export_names_its_weights_for_as_long_as_it_is_whole(write_run: WriteRun, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", student_steps=2)
    assert exported_sha256(run_dir / "export") is None
    assert exported_sha256(export_run(run_dir)) == load_source(run_dir).weights_sha256
    (run_dir / "export" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert exported_sha256(run_dir / "export") is None


def test_a_chain_is_exported_stage_by_stage(write_run: WriteRun, write_chain: WriteRun, tmp_path: Path) -> None:
    chain = write_chain({1000: write_run(tmp_path / "stage_00"), 8: write_run(tmp_path / "stage_01", student_steps=8)})
    with pytest.raises(ValueError, match="say which: --steps 1000 or 8"):
        export_job(chain, {"out": str(tmp_path / "export")})
    with pytest.raises(ValueError, match="none of 9: --steps 1000 or 8"):
        export_job(chain, {"out": str(tmp_path / "export"), "steps": 9})
    assert export_job(chain, {"out": str(tmp_path / "export"), "steps": 8}) == 0
    assert load_source(tmp_path / "export").descriptor.step_count == 8


def test_a_push_without_network_names_the_finished_folder_and_no_token(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    folder = write_export(load_source(write_run(tmp_path / "run", student_steps=1)), tmp_path / "export")
    with pytest.raises(RuntimeError, match=r"--push me/faces: .*the export is complete in .*export") as failure:
        push_export(folder, "me/faces", endpoint="http://127.0.0.1:9")
    assert "secret" not in str(failure.value)
    with pytest.raises(ValueError, match="wanted owner/name"):
        push_export(folder, "not//a name", endpoint="http://127.0.0.1:9")


def test_an_export_does_not_say_where_data_and_teacher_lie() -> None:
    config = RunConfig.model_validate(
        {
            "data": {"shards": "/home/someone/shards/mine"},
            "objective": {"kind": "progressive_distillation", "teacher": "/home/someone/teacher", "teacher_steps": 2, "student_steps": 1},
            "train": {"steps": 1},
        }
    )
    shown = portable_recipe(config)
    assert shown.data.shards == "mine" and "someone" not in shown.model_dump_json()
