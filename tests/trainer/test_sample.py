"""Sampling: which levels, which noise, which bytes, and the files written."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image

from trainer.models.network import network
from trainer.sample import draw_grid, draw_images, draw_on_ranks, grid_image, sample_job, sampling_timesteps, to_uint8
from trainer.source import load_source

WriteRun = Callable[..., Path]


def test_a_student_is_sampled_on_its_own_levels_or_on_every_second_of_them(write_run: WriteRun, tmp_path: Path) -> None:
    descriptor = load_source(write_run(tmp_path / "run", student_steps=8)).descriptor
    assert sampling_timesteps(descriptor, 8) == (103, 231, 359, 487, 615, 743, 871, 999)
    assert sampling_timesteps(descriptor, 4) == (231, 487, 743, 999)
    assert sampling_timesteps(descriptor, 1) == (999,)
    assert set(sampling_timesteps(descriptor, 5)) < set(descriptor.timesteps)


@pytest.mark.parametrize("steps", [0, 9, 1000])
def test_a_step_count_that_a_student_does_not_have_names_its_own(write_run: WriteRun, tmp_path: Path, steps: int) -> None:
    descriptor = load_source(write_run(tmp_path / "run", student_steps=8)).descriptor
    with pytest.raises(ValueError, match=rf"steps={steps} .*give --steps 8"):
        sampling_timesteps(descriptor, steps)


def test_an_image_depends_on_its_own_seed_alone(write_run: WriteRun, tmp_path: Path) -> None:
    source = load_source(write_run(tmp_path / "run", student_steps=4, sampler="ancestral"))
    together = draw_images(source, steps=4, seed=3, count=5, batch_size=2).int()
    alone = draw_images(source, steps=4, seed=6, count=1).int()
    shifted = draw_images(source, steps=4, seed=3, start=3, count=2).int()
    assert (together[3:4] - alone).abs().max() <= 1
    assert (together[3:] - shifted).abs().max() <= 1
    assert (together[0] - together[1]).abs().max() > 20


def test_the_two_samplers_differ_and_the_models_own_is_the_default(write_run: WriteRun, tmp_path: Path) -> None:
    source = load_source(write_run(tmp_path / "run", student_steps=4, sampler="ancestral"))
    default, ancestral, ddim = (draw_images(source, steps=4, seed=0, count=2, sampler=sampler) for sampler in (None, "ancestral", "ddim"))
    assert torch.equal(default, ancestral)
    assert not torch.equal(default, ddim)


def test_bytes_are_rounded_as_stock_pipelines_round_them() -> None:
    x_0 = torch.linspace(-1.2, 1.2, 3 * 40 * 40).reshape(1, 3, 40, 40)
    arrays = (x_0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    stock = np.asarray(DiffusionPipeline.numpy_to_pil(arrays)[0])
    assert np.array_equal(to_uint8(x_0)[0].numpy(), stock)


def test_one_rank_draws_all_images_of_a_grid(write_run: WriteRun, tmp_path: Path) -> None:
    source = load_source(write_run(tmp_path / "run", student_steps=2))
    predict = network(source.model)
    assert torch.equal(draw_on_ranks(predict, source, steps=2, seed=0, count=3), draw_images(source, steps=2, seed=0, count=3))
    assert draw_grid(predict, source, images=3, steps=50, seed=0).size == (2 * 128 + 8, 2 * 128 + 8)


@pytest.mark.parametrize(("size", "columns", "wanted"), [(32, 3, (3 * 128 + 4, 128 + 128 + 2)), (256, 2, (2 * 256 + 1, 3 * 256 + 2))])
def test_a_grid_enlarges_small_images_by_a_whole_factor(size: int, columns: int, wanted: tuple[int, int]) -> None:
    assert grid_image(torch.zeros((5, size, size, 3), dtype=torch.uint8), columns).size == wanted


def test_a_grid_of_grey_images_is_written_too() -> None:
    grid = grid_image(torch.full((1, 8, 8, 1), 7, dtype=torch.uint8), 1)
    assert grid.getpixel((60, 60)) == (7, 7, 7)


def test_a_job_writes_a_grid_or_a_folder_of_images(write_run: WriteRun, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", student_steps=2)
    options = {"steps": None, "images": 3, "seed": 4, "sampler": None, "batch_size": None}
    assert sample_job(run_dir, {**options, "out": str(tmp_path / "new" / "grid.png")}) == 0
    assert Image.open(tmp_path / "new" / "grid.png").size == (264, 264)
    assert sample_job(run_dir, {**options, "out": str(tmp_path / "folder")}) == 0
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["grid.png", *(f"image_{i:05d}.png" for i in range(3))]
    single = np.asarray(Image.open(tmp_path / "folder" / "image_00002.png"))
    assert np.array_equal(single, draw_images(load_source(run_dir), steps=2, seed=4, count=3)[2].numpy())


def test_a_picture_in_bf16_is_that_of_the_network_in_bf16(write_run: WriteRun, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", student_steps=2)
    for precision in ("fp32", "bf16"):
        assert sample_job(run_dir, {"images": 1, "precision": precision, "out": str(tmp_path / precision)}) == 0
    fp32, bf16 = (torch.from_numpy(np.array(Image.open(tmp_path / name / "image_00000.png"))) for name in ("fp32", "bf16"))
    assert torch.equal(bf16, draw_images(load_source(run_dir), steps=2, seed=0, count=1, precision="bf16")[0])
    assert 0 < (fp32.int() - bf16.int()).abs().max() <= 8


def test_a_chain_is_drawn_by_its_last_student_and_says_so_when_its_teacher_draws(
    write_run: WriteRun, write_chain: Callable[[dict[int, Path]], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    student = write_run(tmp_path / "stage_01", student_steps=2)
    chain = write_chain({1000: write_run(tmp_path / "stage_00"), 2: student, 1: tmp_path / "stage_02"})
    for source in (chain, student):
        assert sample_job(source, {"images": 2, "out": str(tmp_path / f"of_{source.name}.png")}) == 0
    assert (tmp_path / f"of_{chain.name}.png").read_bytes() == (tmp_path / "of_stage_01.png").read_bytes()
    assert sample_job(chain, {"images": 1, "steps": 3, "out": str(tmp_path / "3.png")}) == 0
    assert "has no student of 3 steps (but of 2): its teacher draws" in caplog.text
    assert sample_job(student, {"images": 1, "steps": 1, "out": str(tmp_path / "1.png")}) == 0
    assert "was made for 2 steps, not for 1" in caplog.text


@pytest.mark.distributed
def test_two_ranks_write_the_grid_that_one_writes(write_run: WriteRun, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", student_steps=4, sampler="ancestral")
    sample_job(run_dir, {"images": 5, "seed": 3, "out": str(tmp_path / "one.png")})
    words = ["sample", str(run_dir), "--images", "5", "--seed", "3", "--out", str(tmp_path / "two.png"), "--ranks", "2"]
    subprocess.run([sys.executable, "-m", "launch", *words], check=True, timeout=120)
    one, two = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("one.png", "two.png"))
    assert one.shape == (2 * 136 - 8, 3 * 136 - 8, 3)
    assert np.abs(one - two).max() <= 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"images": 0}, "--images 0"),
        ({"sampler": "euler"}, "give ddim or ancestral"),
        ({"precision": "fp16"}, "--precision fp16 is not known; give fp32 or bf16"),
        ({"steps": 3}, "--steps 2"),
        ({"out": "grid.jpg"}, "PNG"),
    ],
)
def test_a_wrong_option_is_named_and_nothing_written(
    write_run: WriteRun, tmp_path: Path, options: dict[str, object], complaint: str
) -> None:
    run_dir = write_run(tmp_path / "run", student_steps=2)
    named = {**options, "out": str(tmp_path / str(options.get("out", "grid.png")))}
    with pytest.raises(ValueError, match=complaint):
        sample_job(run_dir, named)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_model_of_pixels_is_told_nothing(write_run: WriteRun, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", student_steps=2)
    for options, message in (
        ({"prompts": ["a woman"]}, "--prompt: this model draws images of one kind and reads no text"),
        ({"size": "64"}, "--size: this model draws images of the size that it was trained on"),
        ({"lora_scale": 0.5}, "--lora-scale: this model draws images of one kind with nothing beside it"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_job(run_dir, options)
