"""Files that are whole or absent: atomic writes, durable directories, hashes."""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_LARGEST_JSON_BYTES = 1 << 28


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durable(path: Path, content: bytes) -> None:
    """Write a new file and wait until the disk holds it."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes | str) -> None:
    """Put `content` in place of the file at `path`, or leave the old one whole."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        write_durable(temporary, content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


@contextmanager
def held(out: Path, partial: str, *, doing: str) -> Iterator[None]:
    """Holds a folder that is being written for this process, by a lock in its subfolder `partial`, which is made.

    Raises: RuntimeError if another process holds it; doing: what it does to the folder, as in "packed"."""
    (out / partial).mkdir(parents=True, exist_ok=True)
    with (out / partial / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{out} is being {doing} by another process; wait for it, or give another --out") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # some network file systems have no locks: go on without
                raise
        yield


def json_text(value: object) -> str:
    """JSON for people and for git: two spaces, a final newline."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def read_json_object(path: Path) -> dict[str, object]:
    """The object in a JSON file.

    Raises: ValueError naming the file if it is not there, too large for what we write, not JSON or not an object."""
    try:
        if path.stat().st_size > _LARGEST_JSON_BYTES:
            raise ValueError(f"larger than {_LARGEST_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {type(value).__name__}, wanted a JSON object")
    return value


def content_record(content: bytes) -> Mapping[str, int | str]:
    """Size and sha256 of a file's content, as manifests list them."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def cut_lines(path: Path, *, before_step: int) -> None:
    """Drop the lines of a JSON-lines file whose step is not below `before_step`, and a half-written last line.

    The file's lines are in step order, so all that is kept is a prefix: the file is truncated in place."""
    if not path.exists():
        return
    keep = 0
    with open(path, "rb+") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] >= before_step:
                break
            keep += len(line)
        file.truncate(keep)
        file.flush()
        os.fsync(file.fileno())
