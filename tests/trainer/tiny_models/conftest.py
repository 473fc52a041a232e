"""One folder of each kind, made once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.tiny_models.make import make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a kind, made where it is first asked for."""
    root, made = tmp_path_factory.mktemp("tiny"), dict[str, Path]()

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_tiny(kind, root / kind)
        return made[kind]

    return folder
