"""Evaluation of a chain: its rows, that a second call computes nothing, and that measures are never mixed."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from tests.trainer.conftest import IMAGE_SIZE, WriteRun
from trainer.evaluate import evaluate_job
from trainer.evaluation import read_rows
from trainer.feature_net import features_of
from trainer.frechet import frechet_distance, kernel_distance, mean_and_covariance
from trainer.reference import load_feature_net, read_arrays
from trainer.sample import draw_images
from trainer.source import load_source

Options = dict[str, object]


@pytest.fixture
def chain(write_run: WriteRun, write_chain: Callable[[Mapping[int, Path]], Path], tmp_path: Path) -> Path:
    """A teacher of 64 steps and its students of 2 and 1 steps."""
    runs = {64: write_run(tmp_path / "teacher", levels=64)}
    runs |= {steps: write_run(tmp_path / f"student_{steps}", student_steps=steps, levels=64, seed=steps) for steps in (2, 1)}
    return write_chain(runs)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 faces to compare with."""
    folder = tmp_path_factory.mktemp("data") / "held_out"
    pack(FacesSource("open-peeps", 24), folder, size=IMAGE_SIZE)
    return folder


@pytest.fixture
def options(faces: Path, tmp_path: Path) -> Options:
    """A small evaluation with a quickly trained net."""
    out = str(tmp_path / "out" / "evaluation.json")
    return {"reference": str(faces), "steps": [64, 2, 1], "images": 10, "seed": 3, "out": out, "batch_size": 4, "feature_net_updates": 3}


def test_a_chain_has_a_row_for_each_model_and_count(chain: Path, options: Options, tmp_path: Path) -> None:
    assert evaluate_job(chain, options) == 0
    rows = read_rows(tmp_path / "out" / "evaluation.json")
    assert [(row.model, row.steps) for row in rows] == [("teacher", 64), ("student", 2), ("teacher", 2), ("student", 1), ("teacher", 1)]
    slow, student, teacher = rows[:3]
    assert slow.frechet_distance is None and slow.kid is None and slow.attribute_accuracy is None and slow.seconds_per_image > 0
    assert teacher.attribute_accuracy is None
    assert student.attribute_accuracy is not None and 0 <= student.attribute_accuracy < 1 and student.attribute_teacher_steps == 2
    assert student.reference.startswith("held_out@sha256:") and student.feature_net.startswith("faces-attributes-")
    assert student.weights_sha256 == load_source(chain / "student_2").weights_sha256


def test_distances_are_those_of_the_images_that_sample_draws(chain: Path, options: Options, tmp_path: Path) -> None:
    evaluate_job(chain, {**options, "steps": [2]})
    row = read_rows(tmp_path / "out" / "evaluation.json")[0]
    cache = tmp_path / "out" / "evaluation_cache"
    (net_file,), (reference_file,) = cache.glob("*/feature_net.json"), cache.glob("reference_*.npz")
    images = draw_images(load_source(chain / "student_2"), steps=2, seed=3, count=10)
    features = features_of(load_feature_net(net_file.parent).trained.net, images.permute(0, 3, 1, 2))
    reference = mean_and_covariance(features.new_tensor(read_arrays(reference_file, ("features",))["features"]))
    assert row.frechet_distance == pytest.approx(frechet_distance(*mean_and_covariance(features), *reference), rel=1e-3)
    assert row.kid == pytest.approx(
        kernel_distance(features, features.new_tensor(read_arrays(reference_file, ("features",))["features"])), rel=1e-3, abs=1e-4
    )


def test_a_second_call_keeps_rows_and_a_lost_row_is_computed_again(chain: Path, options: Options, tmp_path: Path) -> None:
    out = tmp_path / "out" / "evaluation.json"
    evaluate_job(chain, options)
    first = read_rows(out)
    evaluate_job(chain, options)
    assert read_rows(out) == first
    out.write_text(json.dumps(json.loads(out.read_text())[:-2]))
    evaluate_job(chain, options)
    again = read_rows(out)
    assert [row.frechet_distance for row in again] == pytest.approx([row.frechet_distance for row in first])
    assert again[:3] == first[:3]
    assert [row.attribute_accuracy for row in again] == [row.attribute_accuracy for row in first]


def test_a_model_that_was_trained_on_is_evaluated_again(chain: Path, options: Options, tmp_path: Path, write_run: WriteRun) -> None:
    out = tmp_path / "out" / "evaluation.json"
    evaluate_job(chain, {**options, "steps": [1]})
    before = {row.model: row for row in read_rows(out)}
    (chain / "student_1").rename(chain / "old")
    write_run(chain / "student_1", student_steps=1, levels=64, seed=77)
    evaluate_job(chain, {**options, "steps": [1]})
    after = {row.model: row for row in read_rows(out)}
    assert after["teacher"] == before["teacher"]
    assert after["student"].weights_sha256 != before["student"].weights_sha256


@pytest.mark.parametrize("change", [{"feature_net_updates": 4}, {"images": 12}, {"seed": 4}])
def test_rows_of_another_measure_are_refused(chain: Path, options: Options, tmp_path: Path, change: Options) -> None:
    evaluate_job(chain, {**options, "steps": [1]})
    before = read_rows(tmp_path / "out" / "evaluation.json")
    with pytest.raises(ValueError, match="cannot be compared"):
        evaluate_job(chain, {**options, "steps": [2], **change})
    assert read_rows(tmp_path / "out" / "evaluation.json") == before


def test_bad_requests_are_refused_before_anything_is_written(chain: Path, options: Options, tmp_path: Path) -> None:
    small = tmp_path / "small"
    pack(FacesSource("open-peeps", 4), small, size=4)
    for change, message in (
        ({"reference": None}, "--reference SHARDS"),
        ({"reference": str(small)}, "--size 8"),
        ({"steps": [65]}, "no model here samples in 65 steps"),
        ({"images": 1}, "at least 2 images"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_job(chain, {**options, **change})
    assert not (tmp_path / "out").exists()
