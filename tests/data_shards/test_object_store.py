"""Objects through fsspec: going on by seek, errors explained, missing packages named."""

import hashlib
import json
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_shards.remote.fetch import Small, fetch, fetch_small
from data_shards.remote.locations import Location
from data_shards.remote.retry import RefusedError
from tests.data_shards.store_cases import CONTENT, SHA, Slept

pytest_plugins = ["tests.data_shards.store_fixtures"]


class BrittleStore(MemoryFileSystem):
    """An object store in memory whose `info` fails by script."""

    protocol = "s3"
    store: ClassVar[dict[str, object]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]
    errors: ClassVar[list[Exception]] = []
    etag = "1"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("s3://").strip("/")

    def info(self, path: str, **options: object) -> dict[str, object]:
        if self.errors:
            raise self.errors.pop(0)
        return {**super().info(path), "ETag": self.etag}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, clean_environment: None) -> type[BrittleStore]:
    monkeypatch.setattr(BrittleStore, "store", {})
    monkeypatch.setattr(BrittleStore, "errors", [])
    monkeypatch.setattr(fsspec, "filesystem", lambda _, **__: BrittleStore())
    BrittleStore().pipe("s3://b/a.tar", CONTENT)
    return BrittleStore


OBJECT = Location.parse("s3://b/a.tar")


def test_an_object_comes_through_fsspec_and_goes_on_by_seek(bucket: type[BrittleStore], tmp_path: Path, slept: Slept) -> None:
    class PassingError(Exception):
        pass

    bucket.errors = [PassingError("SlowDown"), TimeoutError("read")]
    identity = hashlib.sha256(b"s3://b/a.tar").hexdigest()
    (tmp_path / "a.tar.part").write_bytes(CONTENT[:4000])
    (tmp_path / "a.tar.part.json").write_text(json.dumps({"location": identity, "etag": "1"}))
    fetched = fetch(OBJECT, tmp_path / "a.tar", size_bytes=len(CONTENT), sha256=SHA, policy=slept.policy())
    assert (fetched.resumed_bytes, fetched.came_bytes, len(slept)) == (4000, len(CONTENT) - 4000, 2)
    small = fetch_small(OBJECT, limit_bytes=2**20)
    assert small == Small(CONTENT, "1") and fetch_small(OBJECT, limit_bytes=2**20, etag="1") is None


def test_an_object_that_is_missing_or_denied_is_explained(bucket: type[BrittleStore], tmp_path: Path, slept: Slept) -> None:
    with pytest.raises(RefusedError, match="no such file"):
        fetch(Location.parse("s3://b/none"), tmp_path / "a", size_bytes=1, sha256=None, policy=slept.policy())
    bucket.errors = [PermissionError("Forbidden")]
    with pytest.raises(RefusedError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"):
        fetch(OBJECT, tmp_path / "a", size_bytes=1, sha256=None, policy=slept.policy())


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("az", "adlfs")])
def test_a_missing_package_is_named(tmp_path: Path, slept: Slept, scheme: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError(f"Install {package}")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(RefusedError, match=f"{scheme}:// needs {package}; pip install {package}"):
        fetch(Location.parse(f"{scheme}://b/a"), tmp_path / "a", size_bytes=1, sha256=None, policy=slept.policy())
