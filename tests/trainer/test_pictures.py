"""Rows of pictures from fixed seeds: which models there are, drawn once, drawn again when they change."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.trainer.conftest import WriteRun
from trainer.pictures import PICTURES, Models, load_models, picture_row
from trainer.sample import draw_images
from trainer.source import load_source

WriteChain = Callable[[dict[int, Path]], Path]


@pytest.fixture
def chain(write_run: WriteRun, write_chain: WriteChain, tmp_path: Path) -> Models:
    """A teacher of 1000 steps and its students of 2 and 1 steps; one of 4 has not been started."""
    runs = {1000: write_run(tmp_path / "teacher"), 4: tmp_path / "stage_08_0004_steps"}
    for steps in (2, 1):
        runs[steps] = write_run(tmp_path / f"stage_{steps}", student_steps=steps, seed=steps)
    return load_models(write_chain(runs))


def test_a_chain_has_a_teacher_at_every_count_and_the_students_that_were_trained(chain: Models) -> None:
    found = [(entry.model, entry.steps, entry.source.descriptor.step_count) for entry in chain.entries([1, 4, 2])]
    assert found == [("teacher", 4, 1000), ("teacher", 2, 1000), ("student", 2, 2), ("teacher", 1, 1000), ("student", 1, 1)]
    assert chain.step_counts() == (1000, 2, 1)


def test_a_single_student_is_run_in_its_own_steps_only(write_run: WriteRun, tmp_path: Path) -> None:
    models = load_models(write_run(tmp_path / "run", student_steps=4, sampler="ancestral"))
    assert [(entry.model, entry.steps, entry.sampler) for entry in models.entries([4])] == [("student", 4, "ancestral")]
    with pytest.raises(ValueError, match="no model here samples in 2 steps; --steps may be 4"):
        models.entries([4, 2])


def test_counts_above_the_noise_levels_are_refused(chain: Models) -> None:
    with pytest.raises(ValueError, match="1001 steps; --steps may be 2, 1, any from 1 to 1000"):
        chain.entries([1001])


def test_pictures_are_drawn_once_and_are_those_of_sample(chain: Models) -> None:
    (entry,) = (entry for entry in chain.entries([2]) if entry.model == "student")
    row = picture_row(entry, chain.path)
    assert torch.equal(row.images, draw_images(load_source(chain.students[2]), steps=2, seed=0, count=PICTURES))
    assert row.seconds_per_image > 0
    (file,) = (chain.path / "pictures").iterdir()
    written = file.stat().st_mtime_ns
    again = picture_row(entry, chain.path)
    assert torch.equal(again.images, row.images) and again.seconds_per_image == row.seconds_per_image
    assert file.stat().st_mtime_ns == written


@pytest.mark.parametrize("content", [b"", b"not a PNG"])
def test_damaged_pictures_are_drawn_again(chain: Models, content: bytes) -> None:
    entry = next(chain.entries([1]))
    row = picture_row(entry, chain.path)
    (file,) = (chain.path / "pictures").iterdir()
    file.write_bytes(content)
    assert torch.equal(picture_row(entry, chain.path).images, row.images)
    assert file.stat().st_size > 100


def test_other_weights_get_other_pictures(chain: Models, write_run: WriteRun, tmp_path: Path) -> None:
    picture_row(next(chain.entries([1])), chain.path)
    other = load_models(write_run(tmp_path / "other", seed=9))
    picture_row(next(other.entries([1])), chain.path)
    assert len(list((chain.path / "pictures").iterdir())) == 2
