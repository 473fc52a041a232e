"""Room in the cache: the least recently used goes, a reader keeps its file, and a full disk is said."""

import errno
import fcntl
import os

import pytest

from data_shards.remote.cache import ShardCache
from data_shards.remote.locations import Location
from tests.data_shards.store_cases import PATH, SHA, SIZE, cached, content_of, fill, names, open_letter, until
from tests.data_shards.store_server import Fault, StoreServer

pytest_plugins = ["tests.data_shards.store_fixtures"]


def test_the_least_recently_used_goes_first(store: StoreServer, cache: ShardCache) -> None:
    hashes = fill(store, cache, "abcd")
    open_letter(store, cache, "a").close()  # used again
    fill(store, cache, "e")
    assert cached(cache) == {hashes[letter] for letter in "acd"} | {content_of("e")[1]}
    fill(store, cache, "f")
    assert hashes["c"] not in cached(cache) and hashes["a"] in cached(cache)


def test_what_is_being_read_stays(store: StoreServer, cache: ShardCache) -> None:
    hashes = fill(store, cache, "abcd")
    with open_letter(store, cache, "a") as file:
        os.utime(cache.folder / hashes["a"][:2] / hashes["a"], ns=(1, 1))
        fill(store, cache, "efg")
        assert hashes["a"] in cached(cache) and file.read() == content_of("a")[0]
    fill(store, cache, "h")
    assert hashes["a"] not in cached(cache)


def test_a_cache_that_is_all_being_read_says_what_to_raise(store: StoreServer, cache: ShardCache) -> None:
    fill(store, cache, "abcd")
    files = [open_letter(store, cache, letter) for letter in "abcd"]
    store.put("/e", content_of("e")[0])
    with pytest.raises(
        RuntimeError, match=rf"no room for {SIZE} bytes: {4 * SIZE} of {4 * SIZE} .*raise data\.cache_gib by at least {SIZE} bytes"
    ):
        open_letter(store, cache, "e")
    files.pop().close()
    open_letter(store, cache, "e").close()


def test_a_file_larger_than_the_cache_is_refused_before_anything_is_evicted(store: StoreServer, cache: ShardCache) -> None:
    fill(store, cache, "abcd")
    with pytest.raises(ValueError, match=rf"{5 * SIZE} bytes does not fit a cache of {4 * SIZE}; raise data\.cache_gib"):
        cache.open(Location.parse(store.url + "/big"), size_bytes=5 * SIZE, sha256="0" * 64)
    assert len(cached(cache)) == 4 and store.asked_for("/big") == []


def test_what_others_are_fetching_counts_and_what_they_left_goes(store: StoreServer, cache: ShardCache) -> None:
    fill(store, cache, "abc")
    other, left = "1" * 64, "2" * 64
    for sha256, promise in ((other, 2 * SIZE), (left, SIZE)):
        (cache.folder / sha256[:2]).mkdir()
        (cache.folder / sha256[:2] / f"{sha256}.part").write_bytes(bytes(1000))
        (cache.folder / sha256[:2] / f"{sha256}.lock").write_text(str(promise))
        os.utime(cache.folder / sha256[:2] / f"{sha256}.part", ns=(1, 1))
    with open(cache.folder / "11" / f"{other}.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fill(store, cache, "d")
        assert len(cached(cache)) == 2  # with the other's file it will be full
        assert names(cache.folder / "11") == [f"{other}.lock", f"{other}.part"]
        assert names(cache.folder / "22") == [f"{left}.lock"]


def test_a_file_that_is_on_its_way_has_its_room_already(store: StoreServer, cache: ShardCache) -> None:
    fill(store, cache, "ab")
    store.faults[PATH] += [Fault("pause", after=0)]
    cache.prefetch(Location.parse(store.url + PATH), size_bytes=SIZE, sha256=SHA)
    assert store.stalled.wait(20)
    hashes = fill(store, cache, "de")
    store.let_go.set()
    until(lambda: SHA in cached(cache))
    assert len(cached(cache)) == 4 and set(hashes.values()) < cached(cache)


@pytest.mark.parametrize("times", [1, 2])
def test_a_full_disk_evicts_and_tries_once_more(store: StoreServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    hashes = fill(store, cache, "ab")
    pwrite, left = os.pwrite, [times]

    def full(descriptor: int, block: bytes, offset: int) -> int:
        if len(block) > 100 and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, block, offset)

    monkeypatch.setattr(os, "pwrite", full)
    if times == 1:
        fill(store, cache, "c")
        assert cached(cache) == {hashes["b"], content_of("c")[1]}
    else:
        with pytest.raises(OSError, match=rf"the disk is full: .*/c needs {SIZE} bytes, \d+ are free .* HALFSTEP_CACHE"):
            fill(store, cache, "c")
