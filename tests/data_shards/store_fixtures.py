"""Fixtures of the tests that fetch: a store on loopback, and an environment without secrets; a plugin, because few tests need them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from data_shards.remote.cache import ShardCache
from tests.data_shards.store_cases import CONTENT, PATH, SIZE, Slept
from tests.data_shards.store_server import StoreServer


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a token nor a proxy nor an offline switch of the machine's own."""
    for name in ("HF_HUB_OFFLINE", "HALFSTEP_OFFLINE", "HF_TOKEN", "HF_ENDPOINT", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def store(clean_environment: None) -> Iterator[StoreServer]:
    """A store that holds CONTENT at PATH."""
    store = StoreServer()
    store.put(PATH, CONTENT)
    with store.running():
        yield store


@pytest.fixture
def slept() -> Slept:
    """Collects waits."""
    return Slept()


@pytest.fixture
def cache(tmp_path: Path, slept: Slept) -> Iterator[ShardCache]:
    """An empty cache with room for four files."""
    with ShardCache(tmp_path / "cache", 4 * SIZE, policy=slept.policy()) as cache:
        yield cache
