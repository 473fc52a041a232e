"""Evaluation of a chain: its rows, that a second call computes nothing, and that measures are never mixed."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_shards.index import ShardIndex
from data_shards.packing.pack import pack
from data_shards.reading.read import read_all
from data_shards.sources.faces import FacesSource
from tests.trainer.conftest import IMAGE_SIZE, WriteRun
from trainer.evaluate import evaluate_job
from trainer.evaluation import read_rows
from trainer.feature_net import features_of
from trainer.frechet import frechet_distance, mean_and_covariance
from trainer.quality import timing
from trainer.quality.discrepancy import cmmd, kernel_distance, subset_distances
from trainer.quality.faces_net import load_feature_net
from trainer.quality.manifold import share_within, squared_radii
from trainer.quality.nets import TransformerFeatures
from trainer.quality.statistics import read_arrays
from trainer.sample import draw_images
from trainer.source import load_source
from trainer.tiny_models.make import make_tiny

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


def test_a_teacher_is_cut_to_many_steps_only_where_it_is_asked_for(chain: Path, options: Options, tmp_path: Path) -> None:
    evaluate_job(chain, {**options, "steps": None, "measure_up_to": 1})
    found = {(row.model, row.steps) for row in read_rows(tmp_path / "out" / "evaluation.json")}
    assert found == {("teacher", 64), ("student", 2), ("student", 1), ("teacher", 1)}
    evaluate_job(chain, {**options, "steps": [2], "measure_up_to": 1})
    assert ("teacher", 2) in {(row.model, row.steps) for row in read_rows(tmp_path / "out" / "evaluation.json")}


def test_distances_are_those_of_the_images_that_sample_draws(chain: Path, options: Options, tmp_path: Path) -> None:
    evaluate_job(chain, {**options, "steps": [2]})
    row = read_rows(tmp_path / "out" / "evaluation.json")[0]
    cache = tmp_path / "out" / "evaluation_cache"
    (net_file,), (reference_file,) = cache.glob("*/feature_net.json"), cache.glob("features_*.npz")
    images = draw_images(load_source(chain / "student_2"), steps=2, seed=3, count=10)
    features = features_of(load_feature_net(net_file.parent).trained.net, images.permute(0, 3, 1, 2))
    against = features.new_tensor(read_arrays(reference_file, ("features",))["features"])
    assert row.frechet_distance == pytest.approx(frechet_distance(*mean_and_covariance(features), *mean_and_covariance(against)), rel=1e-3)
    assert row.kid == pytest.approx(kernel_distance(features, against), rel=1e-3, abs=1e-4)
    subsets = subset_distances(features, against, seed=3)
    assert row.kid_mean == pytest.approx(float(subsets.mean()), rel=1e-2, abs=1e-3)
    assert row.kid_spread == pytest.approx(float(subsets.std(correction=0)), rel=1e-2)
    assert (row.kid_subsets, row.kid_subset_images) == (100, 5)
    assert row.manifold_precision == share_within(features, against, squared_radii(against))
    assert row.manifold_recall == share_within(against, features, squared_radii(features))


def test_the_distance_to_the_teacher_is_that_of_the_images_of_the_same_noise(chain: Path, options: Options, tmp_path: Path) -> None:
    evaluate_job(chain, {**options, "steps": [2, 1]})
    rows = {(row.model, row.steps): row for row in read_rows(tmp_path / "out" / "evaluation.json")}
    first = rows["teacher", 2]
    assert first.teacher_feature_distance is None and first.teacher_pixel_rmse is None
    row = rows["student", 1]
    teacher, student = load_source(chain / "teacher"), load_source(chain / "student_1")
    wanted = draw_images(teacher, steps=2, seed=3, count=10, sampler="ddim").double() / 255
    drawn = draw_images(student, steps=1, seed=3, count=10).double() / 255
    assert row.teacher_pixel_rmse == pytest.approx(float((drawn - wanted).square().mean().sqrt()), rel=1e-3)
    assert row.teacher_feature_distance is not None and row.teacher_feature_distance > 0
    assert (row.teacher_images, row.attribute_teacher_steps, row.made_for_steps) == (10, 2, 1)
    assert rows["teacher", 1].made_for_steps == 64


def test_a_row_says_how_fast_and_on_what_it_was_drawn(
    chain: Path, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_MOST_DRAWS", 2)
    evaluate_job(chain, {**options, "steps": [2, 1], "measure_up_to": 1, "time_batches": [1, 3]})
    for row in read_rows(tmp_path / "out" / "evaluation.json"):
        assert [timing.batch_images for timing in row.timings] == [1, 3]
        assert all(timing.images_per_second == pytest.approx(1 / timing.seconds_per_image) for timing in row.timings)
        assert row.ranks == 1 and row.device == "cpu"
        if row.steps == 1:
            assert row.batch_images == 4 and row.images_per_second == pytest.approx(1 / row.seconds_per_image)


def test_more_steps_are_measured_where_that_is_asked_for(chain: Path, options: Options, tmp_path: Path) -> None:
    out = tmp_path / "out" / "evaluation.json"
    evaluate_job(chain, {**options, "steps": [2, 1], "measure_up_to": 1})
    before = {(row.model, row.steps): row for row in read_rows(out)}
    assert before["student", 2].frechet_distance is None and before["student", 1].frechet_distance is not None
    evaluate_job(chain, {**options, "steps": [2, 1], "measure_up_to": 2})
    after = {(row.model, row.steps): row for row in read_rows(out)}
    assert after["student", 2].frechet_distance is not None and after["student", 2].images == 10
    assert after["student", 1] == before["student", 1]


def test_the_student_before_is_measured_at_the_next_ones_steps(chain: Path, options: Options, tmp_path: Path) -> None:
    evaluate_job(chain, {**options, "steps": [2, 1], "previous": True})
    rows = {(row.model, row.steps): row for row in read_rows(tmp_path / "out" / "evaluation.json")}
    assert [key for key in rows if key[0] == "previous"] == [("previous", 1)]
    previous = rows["previous", 1]
    assert previous.made_for_steps == 2 and previous.weights_sha256 == rows["student", 2].weights_sha256
    assert previous.frechet_distance not in (None, rows["student", 1].frechet_distance, rows["student", 2].frechet_distance)


def test_a_lone_student_is_compared_with_a_teacher_that_is_named(chain: Path, options: Options, tmp_path: Path) -> None:
    evaluate_job(chain, {**options, "steps": [2, 1]})
    of_chain = {(row.model, row.steps): row for row in read_rows(tmp_path / "out" / "evaluation.json")}
    out = tmp_path / "lone.json"
    lone = {**options, "steps": [1], "out": str(out), "cache": str(tmp_path / "out" / "evaluation_cache")}
    evaluate_job(chain / "student_1", lone)
    assert [(row.model, row.teacher_pixel_rmse) for row in read_rows(out)] == [("student", None)]
    out.unlink()
    evaluate_job(chain / "student_1", {**lone, "teacher": str(chain / "teacher")})
    student, teacher = read_rows(out)
    assert (student.model, teacher.model) == ("student", "teacher")
    assert student.attribute_teacher_steps == 1 and student.teacher_pixel_rmse is not None
    assert student.frechet_distance == pytest.approx(of_chain["student", 1].frechet_distance, rel=1e-3)


def test_the_nearest_training_images_are_shown(chain: Path, options: Options, tmp_path: Path) -> None:
    pack(FacesSource("open-peeps", 12, seed=9), tmp_path / "learnt", size=IMAGE_SIZE)
    evaluate_job(chain, {**options, "steps": [1], "training": str(tmp_path / "learnt")})
    for row in read_rows(tmp_path / "out" / "evaluation.json"):
        assert row.training is not None and row.training.startswith("learnt@sha256:")
        assert row.training_distance is not None and row.training_distance_of_reference is not None
        assert row.training_distance > row.training_distance_of_reference > 0  # untrained models draw noise
        name = f"evaluation_neighbours/{row.model}_0001_steps.png"
        assert row.neighbours_sheet == name
        with Image.open(tmp_path / "out" / name) as sheet:
            assert sheet.height > 8 * 96 and sheet.width > 6 * 96


def test_another_net_measures_distances_and_clip_adds_cmmd(chain: Path, options: Options, tmp_path: Path) -> None:
    make_tiny("clip", tmp_path / "clip", seed=0)
    out = tmp_path / "out" / "evaluation.json"
    evaluate_job(chain, {**options, "steps": [1]})
    plain = read_rows(out)[0]
    assert plain.cmmd is None and plain.attribute_net == plain.feature_net
    evaluate_job(chain, {**options, "steps": [1], "clip": str(tmp_path / "clip")})
    with_clip = read_rows(out)[0]
    assert with_clip.frechet_distance == pytest.approx(plain.frechet_distance, rel=1e-6)
    net = TransformerFeatures("clip", str(tmp_path / "clip"), "bicubic-antialias", torch.device("cpu"))
    assert with_clip.cmmd_net == net.name
    images = draw_images(load_source(chain / "student_1"), steps=1, seed=3, count=10).permute(0, 3, 1, 2)
    reference = read_all(ShardIndex.load(str(options["reference"])), ("image",)).images
    assert with_clip.cmmd == pytest.approx(cmmd(net.features(images), net.features(reference)), rel=1e-3)
    with pytest.raises(ValueError, match="cannot be compared"):
        evaluate_job(chain, {**options, "steps": [1], "feature_net": f"clip={tmp_path / 'clip'}"})
    other = tmp_path / "out" / "clip.json"
    evaluate_job(chain, {**options, "steps": [1], "feature_net": f"clip={tmp_path / 'clip'}", "out": str(other)})
    row = read_rows(other)[0]
    assert row.feature_net == row.cmmd_net == net.name and row.resize == net.resize
    assert row.cmmd == pytest.approx(with_clip.cmmd, rel=1e-6) and row.attribute_net == plain.attribute_net
    assert row.attribute_accuracy == plain.attribute_accuracy and row.frechet_distance != plain.frechet_distance


def test_one_net_serves_two_references(chain: Path, options: Options, tmp_path: Path) -> None:
    pack(FacesSource("open-peeps", 24, seed=4), tmp_path / "second", size=IMAGE_SIZE)
    rows = []
    for number, reference in enumerate((options["reference"], str(tmp_path / "second"))):
        out = tmp_path / "out" / f"{number}.json"
        own = {"steps": [1], "reference": reference, "feature_net": f"faces={options['reference']}", "out": str(out)}
        evaluate_job(chain, {**options, **own})
        rows.append(read_rows(out)[0])
    assert rows[0].feature_net == rows[1].feature_net and rows[0].reference != rows[1].reference
    assert rows[0].frechet_distance != rows[1].frechet_distance


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
        ({"feature_net": "vgg=x"}, "--feature-net vgg=x: wanted faces"),
        ({"feature_net": "inception=nowhere.pth"}, r"nowhere\.pth: no such file"),
        ({"resize": "bilinear"}, "--resize bilinear: the project's own"),
        ({"training": str(tmp_path / "nowhere")}, "there is no index"),
        ({"clip": "./nowhere"}, "no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_job(chain, {**options, **change})
    assert not (tmp_path / "out").exists()


def test_a_reference_that_was_trained_on_is_said(chain: Path, options: Options, faces: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = {"data.mixture sha256": ["0123", ShardIndex.load(faces).sha256]}
    (chain / "identity.json").write_text(json.dumps(known))
    evaluate_job(chain, {**options, "steps": [1]})
    assert f"{chain} was trained on the images of --reference {faces}" in caplog.text


def test_a_single_student_has_no_students_before_it(chain: Path, options: Options) -> None:
    with pytest.raises(ValueError, match=r"--previous: .* is no chain"):
        evaluate_job(chain / "student_1", {**options, "steps": None, "previous": True})
