"""Sweeps: which runs there are, what they are called, and that a folder holds one sweep alone."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.sweep import combinations, is_sweep, run_name, run_of_element, split_words, sweep_runs, write_sweep


@pytest.mark.parametrize(
    ("sweeps", "expected"),
    [
        (["optim.learning_rate=1e-5,3e-5"], [("optim.learning_rate=1e-5",), ("optim.learning_rate=3e-5",)]),
        (["seed=1,2", "ema.decay=0.9,0.99"], [(f"seed={seed}", f"ema.decay={decay}") for seed in (1, 2) for decay in ("0.9", "0.99")]),
        (["model.channels=[32,64],[64,128]"], [("model.channels=[32,64]",), ("model.channels=[64,128]",)]),
        (["x={a: [1, 2], b: 3},{a: []}"], [("x={a: [1, 2], b: 3}",), ("x={a: []}",)]),
        (["seed= 1, 2 ,3"], [("seed=1",), ("seed=2",), ("seed=3",)]),
        (["note=a=b,c"], [("note=a=b",), ("note=c",)]),
    ],
)
def test_a_run_for_each_combination_the_last_key_fastest(sweeps: Sequence[str], expected: list[tuple[str, ...]]) -> None:
    assert combinations(sweeps) == expected


@pytest.mark.parametrize("text", ["seed", "seed=", "seed=1", "seed=1,", "seed=1,,2", "=1,2", "seed=[1,2]", ""])
def test_other_texts_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        combinations([text])
    assert str(caught.value) == f"--sweep {text}: wanted KEY=VALUE,VALUE,... such as --sweep optim.learning_rate=1e-5,3e-5"


def test_words_with_several_values_are_swept_and_the_others_hold_for_all() -> None:
    words = ["seed=1", "model.channels=[8,16]", "optim.learning_rate=1e-5,3e-5", "model.attention=[true],[false]"]
    assert split_words(words) == (words[:2], words[2:])


def test_a_sweep_varies_the_recipe_alone() -> None:
    with pytest.raises(
        ValueError, match=r"^--sweep cluster\.nodes=1,2: a sweep varies the recipe, not the cluster; give cluster\.nodes=VALUE"
    ):
        combinations(["cluster.nodes=1,2"])


def test_a_key_is_varied_once() -> None:
    with pytest.raises(ValueError, match=r"^--sweep seed=\.\.\.: given twice; put all values into one$"):
        combinations(["seed=1,2", "ema.decay=0.9,0.99", "seed=3,4"])


@pytest.mark.parametrize(
    ("number", "overrides", "name"),
    [
        (0, ["optim.learning_rate=1e-5"], "000_learning_rate=1e-5"),
        (12, ["seed=1", "ema.decay=0.99"], "012_seed=1_decay=0.99"),
        (3, ["model.channels=[32, 64]"], "003_channels=-32--64-"),
        (4, ["data.shards=../a/b"], "004_shards=..-a-b"),
    ],
)
def test_a_folder_is_called_what_is_special_about_it(number: int, overrides: Sequence[str], name: str) -> None:
    assert run_name(number, overrides) == name


def test_a_sweep_lists_its_runs_in_order(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("000_seed=2", "001_seed=1")]
    assert not is_sweep(tmp_path)
    write_sweep(tmp_path, runs)
    assert is_sweep(tmp_path) and sweep_runs(tmp_path) == runs
    assert [run_of_element(tmp_path, element) for element in (0, 1)] == runs
    write_sweep(tmp_path, runs)
    assert json.loads((tmp_path / "sweep.json").read_text()) == {"schema_version": 1, "runs": ["000_seed=2", "001_seed=1"]}


def test_another_sweep_is_refused_and_the_first_one_stays(tmp_path: Path) -> None:
    write_sweep(tmp_path, [tmp_path / "000_seed=1"])
    with pytest.raises(ValueError) as caught:
        write_sweep(tmp_path, [tmp_path / "000_seed=1", tmp_path / "001_seed=2"])
    assert str(caught.value) == (
        f"{tmp_path}: holds a sweep of 000_seed=1, not of 000_seed=1, 001_seed=2; "
        "give the same --sweep to go on with it, or another --run-dir"
    )
    assert sweep_runs(tmp_path) == [tmp_path / "000_seed=1"]


@pytest.mark.parametrize("element", [-1, 2])
def test_an_element_that_the_sweep_does_not_have_is_refused(element: int, tmp_path: Path) -> None:
    write_sweep(tmp_path, [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match=rf"the sweep has 2 runs, this job is number {element}$"):
        run_of_element(tmp_path, element)


@pytest.mark.parametrize("runs", [None, "a", [1], ["../elsewhere"], ["/etc"], [""], [".."]])
def test_runs_outside_of_the_folder_are_never_followed(runs: object, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": runs}))
    with pytest.raises(ValueError, match=r"sweep\.json: wanted a list of folder names under runs$"):
        sweep_runs(tmp_path)
