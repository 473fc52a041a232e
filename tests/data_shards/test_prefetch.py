"""Prefetching: in the background, once, without errors of its own, in every process anew."""

import fcntl
import logging
import os
import threading
from pathlib import Path

import pytest

from data_shards.remote.cache import ShardCache
from data_shards.remote.locations import Location
from data_shards.remote.retry import RefusedError, RetryPolicy
from tests.data_shards.store_cases import PATH, SHA, SIZE, cached, content_of, until
from tests.data_shards.store_server import Fault, StoreServer

pytest_plugins = ["tests.data_shards.store_fixtures"]


def test_a_prefetched_file_is_there_when_it_is_opened(store: StoreServer, cache: ShardCache) -> None:
    location = Location.parse(store.url + PATH)
    cache.prefetch(location, size_bytes=SIZE, sha256=SHA)
    until(lambda: cached(cache) == {SHA})
    cache.open(location, size_bytes=SIZE, sha256=SHA).close()
    cache.prefetch(location, size_bytes=SIZE, sha256=SHA)
    assert len(store.asked) == 1 and cache.hits == 1


def test_a_prefetch_that_fails_is_left_to_open(store: StoreServer, cache: ShardCache, caplog: pytest.LogCaptureFixture) -> None:
    store.faults[PATH] += [Fault("status", status=404)]
    with caplog.at_level(logging.INFO):
        cache.prefetch(Location.parse(store.url + PATH), size_bytes=SIZE, sha256=SHA)
        until(lambda: "not prefetched, opening it will try again" in caplog.text)
    store.faults[PATH] += [Fault("status", status=404)]
    with pytest.raises(RefusedError, match="no such file"):
        cache.open(Location.parse(store.url + PATH), size_bytes=SIZE, sha256=SHA)


def test_a_prefetch_leaves_alone_what_another_one_fetches(store: StoreServer, cache: ShardCache) -> None:
    content, other = content_of("z")
    store.put("/z", content)
    (cache.folder / SHA[:2]).mkdir()
    with open(cache.folder / SHA[:2] / f"{SHA}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache.prefetch(Location.parse(store.url + PATH), size_bytes=SIZE, sha256=SHA)
        cache.prefetch(Location.parse(store.url + "/z"), size_bytes=SIZE, sha256=other)
        until(lambda: cached(cache) == {other})
    assert store.asked_for(PATH) == []


def test_closing_ends_a_prefetch_and_keeps_its_part(store: StoreServer, tmp_path: Path) -> None:
    store.faults[PATH] += [Fault("stall", after=4000)]
    before = threading.active_count()
    with ShardCache(tmp_path / "cache", 4 * SIZE, policy=RetryPolicy(stall_seconds=0.5)) as cache:
        cache.prefetch(Location.parse(store.url + PATH), size_bytes=SIZE, sha256=SHA)
        for letter in "abcdefgh":  # more than may wait
            cache.prefetch(Location.parse(f"{store.url}/{letter}"), size_bytes=SIZE, sha256=content_of(letter)[1])
        store.stalled.wait(20)
        part = cache.folder / SHA[:2] / f"{SHA}.part"
        until(lambda: part.exists() and part.stat().st_size == 4000)
    assert not any(thread.name == "shard-prefetch" for thread in threading.enumerate()) and threading.active_count() <= before + 1
    assert part.stat().st_size == 4000 and len(store.asked) == 1


def test_a_forked_process_prefetches_with_a_thread_of_its_own(store: StoreServer, cache: ShardCache) -> None:
    content, other = content_of("z")
    store.put("/z", content)
    cache.prefetch(Location.parse(store.url + PATH), size_bytes=SIZE, sha256=SHA)
    until(lambda: cached(cache) == {SHA})
    child = os.fork()
    if child == 0:
        try:
            cache.prefetch(Location.parse(store.url + "/z"), size_bytes=SIZE, sha256=other)
            until(lambda: cached(cache) == {SHA, other})
            cache.close()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_process_forked_in_a_download_does_not_keep_its_lock(store: StoreServer, cache: ShardCache) -> None:
    store.faults[PATH] += [Fault("pause")]
    location = Location.parse(store.url + PATH)
    cache.prefetch(location, size_bytes=SIZE, sha256=SHA)
    store.stalled.wait(20)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    try:
        store.let_go.set()
        until(lambda: cached(cache) == {SHA})
        (cache.folder / SHA[:2] / SHA).unlink()
        taker = threading.Thread(target=lambda: cache.open(location, size_bytes=SIZE, sha256=SHA).close(), daemon=True)
        taker.start()
        taker.join(10)
        assert not taker.is_alive()
    finally:
        os.close(writing)
        os.waitpid(child, 0)
