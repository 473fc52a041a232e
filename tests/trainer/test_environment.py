"""environment.json says what a run's numbers were made on."""

import json
from pathlib import Path

import torch

from trainer.environment import describe_device, record_devices

ENGINE = {"kind": "replicated", "precision": "fp32"}


def read(folder: Path) -> dict[str, object]:
    return json.loads((folder / "environment.json").read_text())


def test_devices_are_added_to_what_the_launcher_wrote(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text('{"python": "3.11", "devices": ["of the attempt before"]}')
    record_devices(tmp_path, attention="sdpa", engine=ENGINE, deterministic=False)
    written = read(tmp_path)
    assert {**written, "devices": None} == {
        "python": "3.11",
        "devices": None,
        "attention": "sdpa",
        "engine": ENGINE,
        "deterministic": False,
    }
    assert written["devices"] == [describe_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["environment.json"]


def test_a_stage_takes_the_chains_half_anew_each_time(tmp_path: Path) -> None:
    stage = tmp_path / "stage_00_1000_steps"
    stage.mkdir()
    (tmp_path / "chain.json").touch()
    for commit in ("abc", "def"):
        (tmp_path / "environment.json").write_text(json.dumps({"git_commit": commit}))
        record_devices(stage, attention="sdpa", engine=ENGINE, deterministic=True)
        assert read(stage)["git_commit"] == commit and read(stage)["deterministic"] is True
    assert read(tmp_path) == {"git_commit": "def"}


def test_a_folder_without_one_gets_one(tmp_path: Path) -> None:
    record_devices(tmp_path, attention="xformers", engine=ENGINE, deterministic=False)
    assert read(tmp_path)["attention"] == "xformers"


def test_a_processor_is_described() -> None:
    described = describe_device(torch.device("cpu"))
    assert described.keys() == {"kind", "name", "count", "cores", "torch_threads"}
    assert described["name"] and described["torch_threads"] == torch.get_num_threads()
