"""A store's index: asked for by its ETag, kept for when the store can't be reached."""

import pytest

from data_shards.remote.cache import ShardCache
from data_shards.remote.locations import Location
from data_shards.remote.retry import OfflineError, RefusedError, UnreachableError
from data_shards.remote.text import load_remote_text
from tests.data_shards.store_server import Fault, StoreServer

pytest_plugins = ["tests.data_shards.store_fixtures"]


def test_a_text_is_asked_for_by_its_etag_and_survives_its_store(
    store: StoreServer, cache: ShardCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("/index.json", '{"a": "ä"}\nline'.encode())
    location = Location.parse(store.url + "/index.json")
    assert load_remote_text(location, cache) == load_remote_text(location, cache) == '{"a": "ä"}\nline'
    assert [asked.headers.get("if-none-match") for asked in store.asked] == [None, store.etags["/index.json"]]
    store.put("/index.json", b"new")
    assert load_remote_text(location, cache) == "new"
    store.faults["/index.json"] += [Fault("status", status=503)] * 8
    assert load_remote_text(location, cache) == "new"
    assert "the store can't be asked, so the copy of the last time is used" in caplog.text
    monkeypatch.setenv("HALFSTEP_OFFLINE", "1")
    assert load_remote_text(location, cache) == "new"
    with pytest.raises(OfflineError):
        load_remote_text(Location.parse(store.url + "/other.json"), cache)


def test_a_text_that_is_gone_is_not_served_from_the_cache(store: StoreServer, cache: ShardCache) -> None:
    store.put("/index.json", b"text")
    location = Location.parse(store.url + "/index.json")
    load_remote_text(location, cache)
    del store.files["/index.json"]
    with pytest.raises(RefusedError, match="no such file"):
        load_remote_text(location, cache)


def test_a_kept_text_that_is_damaged_is_not_used(store: StoreServer, cache: ShardCache) -> None:
    store.put("/index.json", b"text")
    location = Location.parse(store.url + "/index.json")
    load_remote_text(location, cache)
    [kept] = (cache.folder / "texts").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    store.faults["/index.json"] += [Fault("status", status=503)] * 8
    with pytest.raises(UnreachableError):
        load_remote_text(location, cache)
    assert load_remote_text(location, cache) == "text"
    store.put("/index.json", b"\xff")
    with pytest.raises(ValueError, match="not text in UTF-8"):
        load_remote_text(location, cache)
