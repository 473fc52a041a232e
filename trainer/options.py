"""Typed reading of a job's options, JSON values that the command line wrote; a wrong type is our own bug."""

from collections.abc import Mapping

Options = Mapping[str, object]


def integer(options: Options, name: str, default: int) -> int:
    """An integer option; the default where it is absent or null."""
    value = options.get(name)
    assert value is None or (isinstance(value, int) and not isinstance(value, bool)), f"option {name} is {value!r}, wanted an integer"
    return default if value is None else value


def optional_integer(options: Options, name: str) -> int | None:
    """An integer option; None where it is absent or null."""
    return None if options.get(name) is None else integer(options, name, 0)


def optional_text(options: Options, name: str) -> str | None:
    """A text option; None where it is absent or null."""
    value = options.get(name)
    assert value is None or isinstance(value, str), f"option {name} is {value!r}, wanted text"
    return value


def flag(options: Options, name: str) -> bool:
    """A yes or no; no where it is absent."""
    value = options.get(name, False)
    assert isinstance(value, bool), f"option {name} is {value!r}, wanted true or false"
    return value


def optional_number(options: Options, name: str) -> float | None:
    """A number; None where it is absent or null."""
    value = options.get(name)
    assert value is None or (isinstance(value, int | float) and not isinstance(value, bool)), f"option {name} is {value!r}, wanted a number"
    return value
