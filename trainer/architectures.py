"""The true shapes of well-known bases, configs without weights, read from configs/architectures/ without torch."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import final

_FOLDER = "architectures"


@final
@dataclass(frozen=True)
class Component:
    """One part of a pipeline: its class of diffusers or transformers, and the config it is made from."""

    package: str
    class_name: str
    config: Mapping[str, object]

    def with_config(self, changes: Mapping[str, object]) -> "Component":
        """The same class with some values of its config changed.

        Raises: ValueError for a key that the config does not have."""
        strange = sorted(changes.keys() - self.config.keys())
        if strange:
            raise ValueError(f"{self.class_name} has no {strange[0]} in its config; it has {', '.join(sorted(self.config))}")
        return Component(self.package, self.class_name, {**self.config, **changes})


@final
@dataclass(frozen=True)
class Architecture:
    """A pipeline without weights.

    source: the Hub id whose configs these are; settings: what model_index.json says beside the components;
    parameters: numbers of weights, by component; beside: what training needs of another pipeline, no part of this one."""

    name: str
    pipeline: str
    source: str
    settings: Mapping[str, object]
    parameters: Mapping[str, int]
    components: Mapping[str, Component]
    beside: Mapping[str, Component]


def architecture_names() -> tuple[str, ...]:
    """All that there are, in the order of the alphabet."""
    return tuple(sorted(file.name.removesuffix(".json") for file in _folder().iterdir() if file.name.endswith(".json")))


def read_architecture(name: str) -> Architecture:
    """The architecture of that name.

    Raises: ValueError naming the others if there is none."""
    names = architecture_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise ValueError(f"architecture {name} is not known{f'; did you mean {near[0]}?' if near else ''}; there are {', '.join(names)}")
    content = json.loads((_folder() / f"{name}.json").read_text(encoding="utf-8"))
    components, beside = (
        {part: Component(entry["library"], entry["class"], entry["config"]) for part, entry in content[group].items()}
        for group in ("components", "beside")
    )
    return Architecture(name, content["pipeline"], content["source"], content["settings"], content["parameters"], components, beside)


def _folder() -> Traversable:
    return resources.files("configs") / _FOLDER
