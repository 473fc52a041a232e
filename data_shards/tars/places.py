"""Which tars a user means: paths, folders, brace patterns and URLs, and the one place that they all lie in."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from braceexpand import braceexpand

from data_shards.index import SHARD_NAME
from data_shards.remote.locations import Location

MAX_TARS = 100_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d{1,9})\.\.(-?\d{1,9})(?:\.\.-?\d{1,9})?")
_CHOICE = re.compile(r"[^{}]*,[^{}]*")


@final
@dataclass(frozen=True)
class TarSource:
    """One tar and the name that it has in the index."""

    name: str
    location: Location


@final
@dataclass(frozen=True)
class TarSources:
    """Tars of one folder or URL, by name."""

    parent: Location
    tars: tuple[TarSource, ...]


def find_tars(arguments: Sequence[str]) -> TarSources:
    """The tars of the command line: each argument a tar, a folder of tars, a URL, or one of these with {000..099} or {a,b} in it.

    Raises: ValueError if there are none or too many, if they do not lie in one place, or if an index could not name them.
    """
    texts = [text for argument in arguments for text in _expanded(argument)]
    locations = [location for text in texts for location in _in_folder(Location.parse(text))]
    if not locations:
        raise ValueError("no tars are named; give paths, folders, URLs or patterns such as shard-{000000..000099}.tar")
    _check_count(len(locations), "the command line")
    parents: dict[str, Location] = {}
    tars: dict[str, TarSource] = {}
    for location in locations:
        parent, name = _split(location)
        parents.setdefault(parent.secret_text, parent)
        if len(parents) > 1:
            first, other = list(parents.values())[:2]
            raise ValueError(f"the tars lie in several places ({first} and {other}); index each place by itself, or move them together")
        if not SHARD_NAME.fullmatch(name):
            raise ValueError(f"{location}: wanted a name of letters, digits, '.', '_' and '-' that ends in .tar; rename it, or unpack it")
        if name in tars:
            raise ValueError(f"{location}: is named twice")
        tars[name] = TarSource(name, location)
    (parent,) = parents.values()
    return TarSources(parent, tuple(tars[name] for name in sorted(tars)))


def _expanded(argument: str) -> list[str]:
    """A brace pattern's texts. Raises: ValueError if it is none, or stands for more than MAX_TARS."""
    if "{" not in argument and "}" not in argument:
        return [argument]
    count = 1
    for found in _BRACES.finditer(argument):
        numbers = _RANGE.fullmatch(found[1])
        if numbers is None and not _CHOICE.fullmatch(found[1]):
            raise ValueError(f"{argument}: {found[0]!r:.40} is neither a range nor a choice; wanted {{000000..000099}} or {{a,b}}")
        count *= abs(int(numbers[1]) - int(numbers[2])) + 1 if numbers is not None else found[1].count(",") + 1
        _check_count(count, argument)  # before anything is expanded
    left = _BRACES.sub("", argument)
    if "{" in left or "}" in left:
        raise ValueError(f"{argument}: braces in braces, or one without its other; wanted patterns such as shard-{{000000..000099}}.tar")
    return list(braceexpand(argument, escape=False))


def _check_count(count: int, what: str) -> None:
    if count > MAX_TARS:
        raise ValueError(f"{what}: stands for {count} tars, at most {MAX_TARS} are indexed together")


def _in_folder(location: Location) -> list[Location]:
    """The tars of a local folder, or the location itself. Raises: ValueError if it is not there or holds none."""
    if location.is_remote:
        return [location]
    path = location.path
    if path.is_file():
        return [location]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    tars = sorted(found for found in path.glob("*.tar") if found.is_file())
    if not tars:
        packed = next((found.name for found in path.iterdir() if re.search(r"\.(tgz|tar\.\w+)$", found.name)), None)
        raise ValueError(f"{path}: holds no .tar{f', but {packed}: unpack that to a plain tar first' if packed else ''}")
    return [Location.parse(f"./{tar}" if ":" in str(tar) else tar) for tar in tars]


def _split(location: Location) -> tuple[Location, str]:
    """Folder and name. Raises: ValueError for a URL that holds a secret, which an index must not show."""
    if not location.is_remote:
        path = location.path.absolute()
        return Location("", str(path.parent.resolve())), path.name
    if str(location) != location.secret_text:
        raise ValueError(
            f"{location}: an index names its tars' place for everybody to read, and this one holds a password, a signature or a query; "
            "give user and password in ~/.netrc, or fetch the tars and index the files"
        )
    folder, _, name = location.secret_text.rpartition("/")
    return Location.parse(folder), name
