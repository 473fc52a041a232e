"""What may stand in an extension header of a tar: a long name, and the few PAX records that change how the next member is read."""

import re
from collections.abc import Mapping

MAX_EXTENSION_BYTES = 2**15  # attributes of a file system lie here too
MAX_NAME_BYTES = 1024
_LENGTH = re.compile(rb"([1-9][0-9]{0,5}) ")
_SIZE = re.compile(r"0|[1-9][0-9]{0,15}")


class TarError(ValueError):
    """Bytes of a tar that are refused; says what they are."""


def pax_records(content: bytes) -> Mapping[str, bytes]:
    """The records `LENGTH KEYWORD=VALUE` of a PAX header.

    Raises: TarError at the first that is not written so, or comes twice.
    """
    records: dict[str, bytes] = {}
    at = 0
    while at < len(content):
        found = _LENGTH.match(content, at)
        end = at + int(found[1]) if found is not None else 0
        if found is None or not found.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise TarError(f"a PAX record that is not `LENGTH KEYWORD=VALUE`: {content[at : at + 24]!r}")
        keyword, mark, value = content[found.end() : end - 1].partition(b"=")
        name = keyword.decode("ascii", "backslashreplace")
        if not mark or not name or name in records:
            raise TarError(f"a PAX record {name!r:.60} {'that comes twice' if name in records else 'without a value'}")
        records[name] = value
        at = end
    return records


def pax_name_and_size(content: bytes, *, for_all: bool) -> tuple[str | None, int | None]:
    """Name and size that a PAX header gives to the next member; for_all: it stands for every member after it and may give neither.

    Raises: TarError for sparse files, for sizes that are not decimal numbers, for names with NUL or longer than MAX_NAME_BYTES.
    """
    records = pax_records(content)
    sparse = next((name for name in records if name.startswith("GNU.sparse")), None)
    if sparse is not None:
        raise TarError(f"a sparse file (PAX record {sparse!r:.60})")
    changing = next((name for name in ("path", "size", "linkpath") if name in records), None)
    if for_all and changing is not None:
        raise TarError(f"a global PAX header with {changing!r}, which would rename or resize every member after it")
    size = records["size"].decode("ascii", "backslashreplace") if "size" in records else None
    if size is not None and not _SIZE.fullmatch(size):
        raise TarError(f"a PAX size {size!r:.40} that is not a decimal number")
    return (member_name(records["path"]) if "path" in records else None), (int(size) if size is not None else None)


def member_name(field: bytes) -> str:
    """A long name as text; bytes that are not UTF-8 come as backslashes, which no safe name has. Raises: TarError."""
    if b"\0" in field:
        raise TarError(f"a name with NUL in it: {field[:60]!r}")
    if not 0 < len(field) <= MAX_NAME_BYTES:
        raise TarError(f"a name of {len(field)} bytes ({field[:40]!r}...), wanted 1 to {MAX_NAME_BYTES}")
    return field.decode("utf-8", "backslashreplace")
