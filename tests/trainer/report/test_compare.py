"""What differs between runs, and what rows of any evaluation say."""

import json
from pathlib import Path

import pytest

from trainer.report.compare import comparison_table, differing_keys
from trainer.report.evaluated import by_model, measured_alike, own_rows, read_measured
from trainer.report.measures import QUALITY
from trainer.report.subject import Measured, Stage, Subject


def stage(title: str = "Training", losses: tuple[float, ...] = (1.0, 0.5), updates: int = 2) -> Stage:
    ones = (1.0,) * len(losses)
    return Stage("run", title, updates, tuple(range(len(losses))), losses, ones, ones, ones)


def test_only_keys_that_differ_are_told() -> None:
    assert differing_keys([{"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}, {}]) == ["b", "c"]
    assert differing_keys([{"a": "1"}]) == []


def test_the_same_images_in_another_folder_do_not_differ() -> None:
    here, there = ({"data.shards": place, "data.shards sha256": "0123"} for place in ("here", "there"))
    assert differing_keys([here, there]) == []
    assert differing_keys([here, {**there, "data.shards sha256": "4567"}]) == ["data.shards"]
    assert differing_keys([here, {"data.shards": "there"}]) == ["data.shards"]


def test_the_best_loss_is_marked_only_where_losses_mean_the_same() -> None:
    subjects = [
        Subject("one", "", stages=(stage(losses=(1.0, 1.0)),), settings={"optim.learning_rate": "1", "objective.prediction": "v"}),
        Subject("two", "", stages=(stage(losses=(2.0, 2.0)),), settings={"optim.learning_rate": "2", "objective.prediction": "v"}),
    ]
    text = comparison_table(subjects)
    assert '<td class="best">1</td>' in text and "learning rate" in text and "Quality was not measured" in text
    others = [subjects[0], Subject("two", "", stages=subjects[1].stages, settings={**subjects[1].settings, "objective.prediction": "eps"})]
    assert 'class="best"' not in comparison_table(others) and "do not mean the same" in comparison_table(others)


def test_many_differences_are_a_list_with_the_rarest_first() -> None:
    settings = [{f"key_{number}": f"{number}{run if number else 0}" for number in range(12)} for run in range(2)]
    settings.append({**settings[1], "key_3": "mine"})
    text = comparison_table([Subject(f"run_{number}", "", settings=each) for number, each in enumerate(settings)])
    assert "key 3 = mine<br>" in text and "and 3 more" in text and "What differs" in text


def test_a_row_of_any_evaluation_is_read(tmp_path: Path) -> None:
    row = {"model": "previous_student", "steps": 4, "kid": -0.001, "frechet_distance": None, "cmmd": 0.5, "strange": 3, "images": 64}
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps([row, {**row, "model": "teacher", "reference": "here@sha256:aa", "kid": float("nan")}]))
    (first, second), notice = read_measured(path)
    assert notice == "" and dict(first.values) == {"kid": -0.001, "cmmd": 0.5} and dict(second.values) == {"cmmd": 0.5}
    assert (first.model, second.yardstick) == ("previous", (("reference", "sha256:aa"), ("images", "64")))
    assert list(by_model([first, second])) == ["teacher", "previous"] and own_rows([first, second]) == [second]
    assert len(measured_alike([first, second])) == 2


@pytest.mark.parametrize("text", ["{}", "[1]", "[", '[{"model": "student"}]', '[{"model": "student", "steps": 0}]'])
def test_a_damaged_file_is_a_notice(text: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    rows, notice = read_measured(tmp_path / "evaluation.json")
    assert rows == () and notice.startswith(f"{tmp_path / 'evaluation.json'}: ")
    assert read_measured(tmp_path / "none.json") == ((), "")


def test_every_measure_has_a_direction_and_a_text() -> None:
    for measure in QUALITY:
        assert measure.is_better(1.0, 2.0) == (measure.better == "lower") and measure.text(0.5)
    keys = [measure.key for measure in QUALITY]
    assert len(set(keys)) == len(keys)
    row = Measured("student", 4, {})
    assert by_model([row]) == {"student": {4: row}}
