"""The commands in the headers of shipped recipes are commands that there are, with words that they take."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.__main__ import app
from launch.shards.pack_recipe import is_recipe
from trainer.config_io import shipped
from trainer.tiny_models.kinds import KINDS

_COMMAND = re.compile(r"^#   halfstep (?P<words>.*?)(?:  .*)?$", re.MULTILINE)
"""What follows two spaces is a remark."""
_MADE_BEFORE = re.compile(r"(distill\.teacher|model\.\w+)=runs/|index\.json: there is no index")
"""What a command says of what an earlier one would have made."""


@pytest.mark.parametrize("file", shipped("recipes"), ids=lambda file: file.stem)
def test_the_commands_in_a_recipes_header_can_be_given(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [match["words"].split() for match in _COMMAND.finditer(file.read_text())]
    assert any(words[0] == "demo" or file.stem in words[1:2] for words in commands)
    for words in commands:
        match words:
            case ["train" | "distill", *_]:
                ran = CliRunner().invoke(app, [*(word.replace("my-slurm.yaml", "slurm") for word in words), "--dry-run"])
                waits = _MADE_BEFORE.search(str(ran.exception)) is not None
                assert ran.exit_code == 0 or waits, ran.output
            case ["shards", "pack", name]:
                assert is_recipe(name)
            case ["make-tiny", kind, folder]:
                assert kind in KINDS and folder == f"runs/tiny/{kind}"
                (tmp_path / folder).mkdir(parents=True)
                (tmp_path / folder / "model_index.json").write_text("{}")
            case _:
                assert words[0] in ("demo", "export", "shards"), words
