"""Configuration files: strict YAML and KEY=VALUE overrides to frozen models, every mistake at once; and back to YAML."""

import difflib
import importlib.resources
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, final, get_args

from pydantic import ValidationError, create_model
from pydantic.fields import FieldInfo

from trainer import strict_yaml
from trainer.config import Problem, RunConfig, Section, kinds_of_family
from trainer.config_hints import field_at, section_at, unknown_key
from trainer.config_wording import dotted, value_at, wanted_instead, wrong_value, wrong_word
from trainer.strict_yaml import KeyPath, Plain, YamlError

ConfigT = TypeVar("ConfigT", bound=Section)

_COMMAND_LINE = "command line"
# Each pass drops the keys found wrong so far, so that checks of a whole section and of the whole recipe get their turn.
_PASSES = 4
_STAND_INS: tuple[Plain, ...] = (10**6, 0.5, "text", [0.5])


@dataclass(frozen=True)
class Mistake:
    """One mistake: a file and line (or the command line and the number of the override), the dotted key, and what is wrong."""

    source: str
    line: int
    key: str
    text: str

    def __str__(self) -> str:
        key = f" {self.key}:" if self.key else ""
        return f"{self.source}:{self.line}:{key} {self.text}"


@final
class RecipeErrors(ValueError):
    """Every mistake of a configuration, a line each."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        super().__init__("\n".join(map(str, mistakes)))
        self.mistakes = tuple(mistakes)


@dataclass(frozen=True)
class _Found:
    """A problem: the keys it is about, the one to show first; what is wrong; what to take out to look further."""

    paths: tuple[KeyPath, ...]
    text: str
    drop: tuple[KeyPath, ...]


@dataclass
class _Raw:
    """Values as written, where each stands, and the mistakes found so far."""

    tree: dict[str, Any]
    source: str
    places: dict[KeyPath, tuple[str, int]]
    prefix: str
    others: Sequence[type[Section]] = ()
    mistakes: list[Mistake] = field(default_factory=list)

    def place(self, path: KeyPath) -> tuple[str, int]:
        """Source and line of a key, or of its nearest parent that was written."""
        nearest = next((path[:n] for n in range(len(path), 0, -1) if path[:n] in self.places), ())
        return self.places.get(nearest, (self.source, 1))

    def forget_places(self, path: KeyPath) -> None:
        """Of a key and all below it."""
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]

    def note(self, path: KeyPath, text: str) -> None:
        """Adds a mistake."""
        source, line = self.place(path)
        self.mistakes.append(Mistake(source, line, (self.prefix if source == _COMMAND_LINE else "") + dotted(path), text))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A recipe file with KEY=VALUE overrides, checked as a whole.

    Raises: RecipeErrors with every mistake; ValueError if there is no such file."""
    return load_config(RunConfig, path, overrides)


def load_config(
    kind: type[ConfigT], path: str | Path, overrides: Sequence[str] = (), *, prefix: str = "", others: Sequence[type[Section]] = ()
) -> ConfigT:
    """A configuration file of any kind; `prefix`, such as `cluster.`, stands before the key of each override.

    others: what the file might have been instead, by its key `kind`; of use for messages.
    Raises: RecipeErrors with every mistake; ValueError if there is no such file."""
    raw = _read(kind, Path(path), prefix, others)
    _apply(kind, raw, overrides)
    for name, default in kinds_of_family(raw.tree).items() if kind is RunConfig else ():
        if isinstance(section := raw.tree.get(name), dict):
            section.setdefault("kind", default)
    _fill_kinds(kind, raw.tree)
    config = _validate(kind, raw)
    if raw.mistakes or config is None:
        raise RecipeErrors(sorted(raw.mistakes, key=lambda mistake: (mistake.source == _COMMAND_LINE, mistake.line)))
    return config


def written_kind(path: Path, overrides: Sequence[str], *, prefix: str, default: str) -> tuple[Plain, str, int]:
    """The value of a file's own key `kind`, which says what else may stand in the file; and where it stands (source, line).

    Raises: RecipeErrors, ValueError as load_config."""
    raw = _read(Section, path, prefix)
    _apply(Section, raw, [text for text in overrides if text.partition("=")[0].strip().removeprefix(prefix) == "kind"])
    if raw.mistakes:
        raise RecipeErrors(raw.mistakes)
    return (raw.tree.get("kind", default), *raw.place(("kind",)))


def dump_yaml(config: Section) -> str:
    """The configuration with every default filled in; `load_config` gives an equal one back."""
    return strict_yaml.dump(config.model_dump(mode="json"))


def json_schema() -> dict[str, object]:
    """JSON Schema of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema(), "title": "halfstep recipe"}


def shipped(folder: str) -> tuple[Path, ...]:
    """Configuration files that come with halfstep, by name; `folder` is `recipes` or `clusters`."""
    return tuple(sorted(Path(str(importlib.resources.files("configs"))).joinpath(folder).glob("*.yaml"), key=lambda file: file.stem))


def recipe_path(name_or_path: str) -> Path:
    """The file of a shipped recipe's name or of a path.

    Raises: ValueError naming the nearest shipped recipes."""
    return config_path(name_or_path, folder="recipes")


def config_path(name_or_path: str, *, folder: str) -> Path:
    """The file of a shipped configuration's name or of a path.

    Raises: ValueError naming the nearest shipped ones."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    files = {file.stem: file for file in shipped(folder)}
    if name_or_path in files:
        return files[name_or_path]
    noun = folder.removesuffix("s")
    near = difflib.get_close_matches(path.stem, files, 1, 0.4)
    hint = f" - did you mean '{near[0]}'?" if near else ""
    hint += " (halfstep recipes lists them)" if near and folder == "recipes" else f" (shipped: {', '.join(files)})"
    problem = "is a directory" if path.is_dir() else f"no such {noun} file, nor a shipped {noun} of that name"
    raise ValueError(f"{name_or_path}: {problem}{hint}")


def _read(kind: type[Section], path: Path, prefix: str, others: Sequence[type[Section]] = ()) -> _Raw:
    source = os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeErrors([Mistake(source, 1, "", f"not UTF-8 text (byte {error.start}); save the file as UTF-8")]) from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give a readable YAML file") from None
    try:
        document = strict_yaml.parse(text)
    except YamlError as error:
        raise RecipeErrors([Mistake(source, error.line, "", str(error))]) from None
    raw = _Raw(document.tree, source, {key: (source, line) for key, line in document.lines.items()}, prefix, others)
    raw.mistakes.extend(
        Mistake(source, line, dotted(key), f"stands twice, first in line {first}; remove one") for key, line, first in document.duplicates
    )
    return raw


def _apply(kind: type[Section], raw: _Raw, overrides: Sequence[str]) -> None:
    """Writes overrides over the file's values, kinds first: another kind starts its section anew."""
    parsed: list[tuple[int, tuple[str, ...], Plain]] = []
    for number, override in enumerate(overrides, 1):
        key, equals, text = override.partition("=")
        name = key.strip().removeprefix(raw.prefix)
        path = tuple(name.split("."))
        try:
            if not equals or not all(path):
                raise YamlError(1, "not KEY=VALUE; write a dotted key and a value, such as optim.learning_rate=1e-4")
            if not text.strip():
                raise YamlError(1, f"no value; write {key}=VALUE, or {key}=null for none")
            parsed.append((number, path, strict_yaml.parse_value(text)))
        except YamlError as error:
            raw.mistakes.append(Mistake(_COMMAND_LINE, number, key, str(error)))
    for number, path, value in sorted(parsed, key=lambda item: item[1][-1] != "kind"):
        if value is None and len(path) == 1 and _has_default_section(kind, path[0]):
            raw.tree.pop(path[0], None)
            raw.forget_places(path)
            continue
        _set(kind, raw, path, value, (_COMMAND_LINE, number))


def _has_default_section(kind: type[Section], name: str) -> bool:
    """Whether a name is of a section that is there even where nobody writes it: null puts it back to that."""
    about = kind.model_fields.get(name)
    return about is not None and isinstance(about.get_default(call_default_factory=True), Section)


def _set(kind: type[Section], raw: _Raw, path: tuple[str, ...], value: Plain, place: tuple[str, int]) -> None:
    node = raw.tree
    *parents, name = path
    for depth, part in enumerate(parents, 1):
        if not isinstance(node.get(part), dict):
            node[part] = {}
            raw.places[path[:depth]] = place
        node = node[part]
    section = section_at(kind, raw.tree, path[:-1])
    # A kind with keys of its own starts its section anew; engine.kind or optim.kind is one key among others.
    if name == "kind" and section and "kind" in section.model_fields and value not in get_args(section.model_fields["kind"].annotation):
        node.clear()
    node[name] = value
    raw.forget_places(path)
    raw.places[path] = place


def _fill_kinds(section: type[Section], tree: dict[str, Any]) -> None:
    """A section that names no kind is of the default's kind."""
    for name, below in tree.items():
        inner = section_at(section, tree, (name,))
        if inner and isinstance(below, dict):
            if "kind" in inner.model_fields and not inner.model_fields["kind"].is_required():
                below.setdefault("kind", inner.model_fields["kind"].default)
            _fill_kinds(inner, below)


def _validate(kind: type[ConfigT], raw: _Raw) -> ConfigT | None:
    """The model, or None after noting every mistake."""
    wrong: list[KeyPath] = []
    for _ in range(_PASSES):
        try:
            return kind.model_validate(raw.tree)
        except ValidationError as error:
            found = _problems(kind, raw, error)
        for item in found:
            if not _follows(item, wrong):
                raw.note(item.paths[0], item.text)
        for item in found:
            wrong += item.paths
            for path in item.drop:
                _drop(kind, raw.tree, path)
    return None


def _follows(problem: _Found, wrong: Sequence[KeyPath]) -> bool:
    """Whether a problem is about a key that is known to be wrong already, or about one above or below it."""
    return any(path[: len(bad)] == bad[: len(path)] for path in problem.paths for bad in wrong)


def _drop(kind: type[Section], tree: dict[str, Any], path: KeyPath) -> None:
    """Takes a wrong value out; where one is required, something of its type takes its place."""
    names = tuple(part for part in path if isinstance(part, str))  # a list with a wrong item goes as a whole
    about = field_at(kind, tree, names)
    for part in names[:-1]:
        tree = tree.setdefault(part, {}) if isinstance(tree, dict) else {}
    if isinstance(tree, dict):
        tree.pop(names[-1], None)
        if about and about.is_required():
            tree[names[-1]] = _stand_in(about)


def _stand_in(about: FieldInfo) -> Plain:
    """A value that the field takes."""
    holder = create_model("Holder", value=(about.annotation or object, about))
    for candidate in _STAND_INS:
        try:
            holder.model_validate({"value": candidate})
            return candidate
        except ValidationError:
            continue
    return None


def _problems(kind: type[Section], raw: _Raw, error: ValidationError) -> list[_Found]:
    """pydantic's errors by key, in our words; the members of a union (a number or a list) speak as one."""
    wanted: dict[KeyPath, list[str]] = {}
    words: dict[KeyPath, str] = {}
    found: list[_Found] = []
    for item in error.errors(include_url=False, include_input=False):
        path, context = _path_in(raw.tree, item["loc"], item["type"]), item.get("ctx", {})
        match item["type"]:
            case "problems":
                problems: tuple[Problem, ...] = context["problems"]
                for problem in problems:
                    paths = tuple((*path, *key.split(".")) for key in problem.keys)
                    found.append(_Found(paths, problem.text, paths))
            case "extra_forbidden":
                typed = _typed(raw, path)
                prefix = raw.prefix if raw.place(typed)[0] == _COMMAND_LINE else ""
                found.append(_Found((typed,), unknown_key(kind, raw.tree, typed, prefix=prefix, others=raw.others), (path,)))
            case "missing":
                path = _first_required(kind, raw.tree, path)
                about = field_at(kind, raw.tree, path)
                found.append(_Found((path,), f"missing; add it: {about.description if about else ''}".rstrip(".: "), (path,)))
            case "union_tag_invalid":
                found.append(_Found(((*path, "kind"),), wrong_word(value_at(raw.tree, (*path, "kind")), context["expected_tags"]), (path,)))
            case "literal_error":
                words[path] = context["expected"]
            case code:
                wanted.setdefault(path, []).append(wanted_instead(code, context) or item["msg"])
    for path, expected in words.items():
        if path in wanted:  # a word or something else, such as auto or true
            wanted[path].append(expected.replace("'", ""))
        else:
            found.append(_Found((path,), wrong_word(value_at(raw.tree, path), expected), (path,)))
    for path, phrases in wanted.items():
        # a list inside a union is also "not a number": its items' own errors say more
        if not any(other != path and other[: len(path)] == path for other in wanted):
            found.append(_Found((path,), wrong_value(kind, raw.tree, path, list(dict.fromkeys(phrases))), (path,)))
    return found


def _first_required(kind: type[Section], tree: Plain, path: KeyPath) -> KeyPath:
    """The key to add where a whole section is missing."""
    section = section_at(kind, tree, path)
    required = [name for name, about in section.model_fields.items() if about.is_required()] if section else []
    return (*path, required[0]) if required else path


def _path_in(tree: Plain, location: tuple[int | str, ...], code: str) -> KeyPath:
    """The part of pydantic's location that stands in the file: without the names of union members."""
    path: list[str | int] = []
    for position, part in enumerate(location):
        if isinstance(tree, dict) and part in tree:
            tree = tree[str(part)]
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        elif not (code == "missing" and position == len(location) - 1):
            continue
        path.append(part)
    return tuple(path)


def _typed(raw: _Raw, path: KeyPath) -> KeyPath:
    """The whole key that was typed, if an override made this unknown section."""
    value = value_at(raw.tree, path)
    while raw.places.get(path, ("", 0))[0] == _COMMAND_LINE and isinstance(value, dict) and len(value) == 1:
        (name, value), *_ = value.items()
        path = (*path, name)
    return path
