"""Rows of evaluation.json: written and read whole, compared only where they were measured alike."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.evaluation import BatchTiming, EvaluationRow, ratio, read_rows, write_rows

ROW = EvaluationRow(
    model="student",
    steps=8,
    sampler="ddim",
    precision="fp32",
    frechet_distance=2.5,
    kid=-0.001,
    seconds_per_image=0.01,
    feature_net="faces-attributes-0123456789ab",
    reference="reference@sha256:aa",
    images=512,
    seed=0,
    attribute_accuracy=0.9,
    attribute_teacher_steps=32,
    feature_net_accuracy=0.93,
    weights_sha256="ff",
)

OF_VERSION_1 = (
    *("model", "steps", "sampler", "precision", "frechet_distance", "kid", "seconds_per_image", "feature_net", "reference", "images"),
    *("seed", "attribute_accuracy", "attribute_teacher_steps", "feature_net_accuracy", "weights_sha256"),
)


def test_rows_survive_writing_and_are_ordered_by_steps(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    slow = replace(ROW, model="teacher", steps=1000, frechet_distance=None, kid=None, attribute_accuracy=None, attribute_teacher_steps=None)
    write_rows(path, [ROW, replace(ROW, model="teacher"), slow])
    assert read_rows(path) == (slow, ROW, replace(ROW, model="teacher"))
    wanted = {"model", "steps", "sampler", "frechet_distance", "kid", "seconds_per_image", "feature_net", "reference", "images"}
    assert wanted <= json.loads(path.read_text())[0].keys()


def test_a_row_of_version_2_survives_writing(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    row = replace(
        ROW,
        cmmd=0.5,
        cmmd_net="clip-x",
        manifold_precision=0.75,
        kid_subsets=100,
        timings=(BatchTiming(8, 0.5, 4.0), BatchTiming(1, 1.0, 2.0)),
    )
    write_rows(path, [row])
    assert read_rows(path) == (row,)
    (entry,) = json.loads(path.read_text())
    assert entry["schema_version"] == 2 and entry["timings"][0] == {"batch_images": 8, "images_per_second": 4.0, "seconds_per_image": 0.5}


def test_rows_of_version_1_are_read_and_lack_what_they_lack(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    write_rows(path, [ROW])
    old = {name: value for name, value in json.loads(path.read_text())[0].items() if name in OF_VERSION_1}
    path.write_text(json.dumps([old]))
    assert read_rows(path) == (ROW,)
    for broken in ({**old, "cmmd": 1.0}, {**old, "schema_version": 3}, {name: old[name] for name in old if name != "kid"}):
        path.write_text(json.dumps([broken]))
        with pytest.raises(ValueError, match=r"row 0 has not the fields"):
            read_rows(path)


@pytest.mark.parametrize("timing", [{"batch_images": 1}, {"batch_images": 1.5, "seconds_per_image": 1.0, "images_per_second": 1.0}, 3])
def test_a_timing_of_the_wrong_kind_is_named(tmp_path: Path, timing: object) -> None:
    path = tmp_path / "evaluation.json"
    write_rows(path, [ROW])
    path.write_text(json.dumps([{**json.loads(path.read_text())[0], "timings": [timing]}]))
    with pytest.raises(ValueError, match="row 0: timings hold"):
        read_rows(path)


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "evaluation.json") == ()


@pytest.mark.parametrize("text", ["{}", "[{}]", "[", '[{"model": "student"}]'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"evaluation\.json.*delete"):
        read_rows(path)


def test_a_field_of_the_wrong_type_is_named(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    write_rows(path, [ROW])
    path.write_text(path.read_text().replace("512", '"many"'))
    with pytest.raises(ValueError, match="row 0: images is 'many'"):
        read_rows(path)


def test_the_ratio_of_rows_measured_alike() -> None:
    assert ratio(ROW, replace(ROW, steps=32, frechet_distance=2.0)) == 1.25
    assert ratio(ROW, replace(ROW, steps=500, frechet_distance=None)) is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(ROW, feature_net="faces-attributes-ffffffffffff"), "feature net faces-attributes-0123456789ab"),
        (replace(ROW, reference="reference@sha256:bb"), "reference sha256:aa"),
        (replace(ROW, images=64), "images 512"),
        (replace(ROW, seed=1), "seed 0"),
    ],
)
def test_rows_measured_differently_have_no_ratio(other: EvaluationRow, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ratio(ROW, other)


def test_a_reference_is_the_same_in_another_folder() -> None:
    assert ratio(ROW, replace(ROW, reference="held_out@sha256:aa")) == 1.0
