"""How a wrong value is put into words: what stands there, what is wanted, what was probably meant."""

import math
import re
from collections.abc import Mapping

from trainer import strict_yaml
from trainer.config_hints import field_at, near_value, section_at
from trainer.config_sections import Section
from trainer.strict_yaml import KeyPath, Plain

A_SECTION = "a section"


def value_at(tree: Plain, path: KeyPath) -> Plain:
    """The value at a path, null where there is none."""
    for part in path:
        if isinstance(tree, dict):
            tree = tree.get(str(part))
        elif isinstance(tree, list) and isinstance(part, int):
            tree = tree[part]
    return tree


def wrong_word(got: Plain, expected: str) -> str:
    """A value that is none of the `expected` words, each in single quotes."""
    allowed = re.findall(r"'([^']*)'", expected)
    near = near_value(str(got), allowed) if got is not None else None
    hint = f" - did you mean '{near}'?" if near else ""
    return f"got {_shown(got)}, wanted {'one of ' if len(allowed) > 1 else ''}{', '.join(allowed)}{hint}"


def wanted_instead(code: str, context: Mapping[str, float]) -> str | None:
    """What pydantic wanted, by its error code; None for a code without words of ours."""
    match code:
        case "int_type" | "int_from_float":
            return "a whole number"
        case "float_type" | "finite_number":
            return "a number"
        case "bool_type":
            return "true or false"
        case "string_type":
            return "text"
        case "tuple_type":
            return "a list"
        case "model_type" | "model_attributes_type" | "dict_type":
            return A_SECTION
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            (name, bound), *_ = context.items()
            words = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
            return f"{words[name]} {bound:g}"
        case "too_short" | "too_long":
            return (
                f"a list of {context.get('min_length', context.get('max_length'))} or {'more' if code == 'too_short' else 'fewer'} values"
            )
        case _:
            return None


def wrong_value(kind: type[Section], tree: Plain, path: KeyPath, wanted: list[str]) -> str:
    """A value of the wrong type or size, with the likely one or the default."""
    got = value_at(tree, path)
    text = f"got {_shown(got)}, wanted {' or '.join(wanted)}"
    if (near := _near_literal(got, wanted)) is not None:
        return f"{text} - did you mean {near}?"
    section = section_at(kind, tree, path)
    if A_SECTION in wanted and section:
        names = [name for name in section.model_fields if name != "kind"] or ["kind"]
        return f"{text}: keys below it, such as {dotted((*path, names[0]))}"
    about = field_at(kind, tree, path)
    default = about.default if about and not about.is_required() else None
    if isinstance(default, bool | int | float | str | tuple):
        return f"{text}; the default is {_shown(list(default) if isinstance(default, tuple) else default)}"
    if about and about.description:
        return f"{text}: {about.description[0].lower()}{about.description[1:].rstrip('.')}"
    return text


def _near_literal(got: Plain, wanted: list[str]) -> str | None:
    """The same value as YAML would want it: `1e3` for a whole number, `yes`, `1_000`, `32, 64`."""
    if "true or false" in wanted:
        return {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}.get(str(got).lower())
    if isinstance(got, str) and ("a number" in wanted or "a whole number" in wanted):
        digits = re.sub(r"[_,\s'\"]", "", re.sub(r"(?<=\d)k$", "000", got))
        got = strict_yaml.parse_value(digits) if re.fullmatch(r"[-+.\deE]+", digits) else None
    if "a whole number" in wanted and isinstance(got, float) and math.isfinite(got):
        return str(round(got))
    if ("a number" in wanted or "a whole number" in wanted) and isinstance(got, int | float) and not isinstance(got, bool):
        return str(got)
    if "a list" in wanted and isinstance(got, int | float | bool):
        return f"[{_shown(got)}]"
    return None


def _shown(value: Plain) -> str:
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, str):
        return f"'{value[:60]}'"
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value[:8]))}{', ...' if len(value) > 8 else ''}]"
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)


def dotted(path: KeyPath) -> str:
    """A path as people write it: `optim.betas[1]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
