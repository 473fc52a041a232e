"""YAML as people read it (1.2 core): plain values with the line of every key, and back."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, final

import yaml

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
KeyPath: TypeAlias = tuple[str | int, ...]

# YAML 1.1, which PyYAML implements, takes `3e-4` for text, `on` and `no` for truth values, `010` for 8 and `1:30` for 90.
_PLAIN_SCALARS = [
    ("tag:yaml.org,2002:null", re.compile(r"^(|~|null|Null|NULL)$")),
    ("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$")),
    ("tag:yaml.org,2002:int", re.compile(r"^([-+]?[0-9]{1,18}|0o[0-7]{1,20}|0x[0-9a-fA-F]{1,15})$")),
    (
        "tag:yaml.org,2002:float",
        re.compile(r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    ),
]


@final
class YamlError(ValueError):
    """Text that is not YAML, or more of YAML than a configuration needs; `line` counts from 1."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line


@dataclass(frozen=True)
class Document:
    """A file's values, the line of every key and list item, and the keys that stand twice: (path, line, first line)."""

    tree: dict[str, Plain]
    lines: dict[KeyPath, int]
    duplicates: tuple[tuple[KeyPath, int, int], ...]


def parse(text: str) -> Document:
    """Reads a file that is a mapping; an empty one is an empty mapping.

    Raises: YamlError at the first place that cannot be read."""
    node = _compose(text)
    if node is None:
        return Document({}, {}, ())
    if not isinstance(node, yaml.MappingNode):
        raise YamlError(node.start_mark.line + 1, "the file is not a mapping; write `key: value` lines")
    lines: dict[KeyPath, int] = {}
    duplicates: list[tuple[KeyPath, int, int]] = []
    tree = _plain(node, (), lines, duplicates)
    assert isinstance(tree, dict), "a mapping node gives a dict"
    return Document(tree, lines, tuple(duplicates))


def parse_value(text: str) -> Plain:
    """Reads one value as it stands right of a colon, such as `3e-4` or `[32, 64]`.

    Raises: YamlError if it cannot be read."""
    node = _compose(text)
    return None if node is None else _plain(node, (), {}, [])


def dump(tree: dict[str, Plain]) -> str:
    """Writes values so that `parse` gives the same back, in the order of the keys."""
    return yaml.dump(tree, Dumper=_StrictDumper, sort_keys=False, default_flow_style=False, width=120)


class _StrictLoader(yaml.SafeLoader):
    """Composes nodes with 1.2 scalars; refuses tags, anchors and aliases."""

    yaml_implicit_resolvers: ClassVar = {None: _PLAIN_SCALARS}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise YamlError(event.start_mark.line + 1, "anchors and aliases (& and *) are not read; write the value out, or quote the text")
        if event.tag is not None:
            raise YamlError(event.start_mark.line + 1, f"the tag {event.tag} is not read; remove it, or quote the text")
        return super().compose_node(parent, index)


class _StrictDumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would take for something else than text; writes lists on one line."""

    yaml_implicit_resolvers: ClassVar = {**yaml.SafeDumper.yaml_implicit_resolvers, None: _PLAIN_SCALARS}


def _inline_list(dumper: yaml.SafeDumper, items: list[Plain]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


_StrictDumper.add_representer(list, _inline_list)


def _compose(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "not YAML"
        hint = "; indent with spaces" if r"'\t'" in problem else ""
        raise YamlError(mark.line + 1 if mark else 1, f"not YAML: {problem}{hint}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position if isinstance(error.position, int) else 0) + 1
        raise YamlError(line, f"not YAML: character {error.character!r} is not printable; remove it") from None
    except RecursionError:
        raise YamlError(1, "nested too deeply; a configuration needs a few levels") from None


def _plain(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], duplicates: list[tuple[KeyPath, int, int]]) -> Plain:
    """The node's value; notes the line of what stands under it and the keys that stand twice."""
    if isinstance(node, yaml.MappingNode):
        tree: dict[str, Plain] = {}
        for key_node, value_node in node.value:
            key, line = _key(key_node), key_node.start_mark.line + 1
            here = (*path, key)
            if key in tree:
                duplicates.append((here, line, lines[here]))
                continue
            lines[here] = line
            tree[key] = _plain(value_node, here, lines, duplicates)
        return tree
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, here, lines, duplicates) for item, here in _numbered(node, path, lines)]
    return _scalar(node)


def _numbered(node: yaml.SequenceNode, path: KeyPath, lines: dict[KeyPath, int]) -> Iterator[tuple[yaml.Node, KeyPath]]:
    for position, item in enumerate(node.value):
        lines[(*path, position)] = item.start_mark.line + 1
        yield item, (*path, position)


def _key(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise YamlError(node.start_mark.line + 1, "a key is a list or a mapping; write a word")
    return str(node.value)


def _scalar(node: yaml.Node) -> Plain:
    text = str(node.value)
    match node.tag.rpartition(":")[2]:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))
        case "float":
            return float(text)
        case _:
            return text
