"""The node's cache: one download among any processes, parts that outlive a kill, and eviction that hurts no reader."""

import copy
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data_shards.remote.cache import ShardCache, default_cache_folder
from data_shards.remote.locations import Location
from data_shards.remote.retry import OfflineError
from tests.data_shards.store_cases import CONTENT, PATH, SHA, SIZE, cached, fill, names, open_letter, until
from tests.data_shards.store_server import Fault, StoreServer

pytest_plugins = ["tests.data_shards.store_fixtures"]

OPEN = """
import sys
from pathlib import Path
from data_shards.remote.cache import ShardCache
from data_shards.remote.locations import Location
folder, url, size, sha256 = sys.argv[1:]
cache = ShardCache(Path(folder), 2**30)
print("ready", flush=True)
sys.stdin.readline()
print(len(cache.open(Location.parse(url), size_bytes=int(size), sha256=sha256).read()), cache.bytes_fetched, flush=True)
"""


def start_process(store: StoreServer, folder: Path) -> "subprocess.Popen[str]":
    """A process that opens CONTENT when it is told to."""
    command = [sys.executable, "-c", OPEN, str(folder), store.url + PATH, str(SIZE), SHA]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_file_is_fetched_once_and_then_found(store: StoreServer, cache: ShardCache) -> None:
    location = Location.parse(store.url + PATH)
    for _ in range(3):
        with cache.open(location, size_bytes=SIZE, sha256=SHA) as file:
            assert file.read() == CONTENT
    assert len(store.asked) == 1 and (cache.bytes_fetched, cache.hits) == (SIZE, 2)
    assert cached(cache) == {SHA} and names(cache.folder / SHA[:2]) == [SHA, f"{SHA}.lock"]


def test_content_is_found_under_another_location_too(store: StoreServer, cache: ShardCache) -> None:
    cache.open(Location.parse(store.url + PATH), size_bytes=SIZE, sha256=SHA).close()
    cache.open(Location.parse("s3://elsewhere/a.tar"), size_bytes=SIZE, sha256=SHA).close()
    assert len(store.asked) == 1


def test_four_processes_cost_one_download(store: StoreServer, cache: ShardCache) -> None:
    store.faults[PATH] += [Fault("pause")]  # the winner is held up until the others are there
    processes = [start_process(store, cache.folder) for _ in range(4)]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        store.stalled.wait(20)
        store.let_go.set()
        said = [process.communicate(timeout=30)[0].split() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [size for size, _ in said] == [str(SIZE)] * 4
    assert sorted(int(came) for _, came in said) == [0, 0, 0, SIZE]
    assert len(store.asked) == 1


def test_threads_of_one_process_share_a_download(store: StoreServer, cache: ShardCache) -> None:
    read: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: read.append(cache.open(Location.parse(store.url + PATH), size_bytes=SIZE, sha256=SHA).read()))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == [CONTENT] * 6 and len(store.asked) == 1


def test_what_a_killed_process_had_is_gone_on_with_by_range(store: StoreServer, cache: ShardCache) -> None:
    store.faults[PATH] += [Fault("stall", after=4000)]
    process = start_process(store, cache.folder)
    try:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        part = cache.folder / SHA[:2] / f"{SHA}.part"
        until(lambda: part.exists() and part.stat().st_size == 4000)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with cache.open(Location.parse(store.url + PATH), size_bytes=SIZE, sha256=SHA) as file:
        assert file.read() == CONTENT
    assert store.ranges(PATH) == [None, "bytes=4000-"] and cache.bytes_fetched == SIZE - 4000


def test_a_file_of_another_size_is_not_served(store: StoreServer, cache: ShardCache) -> None:
    location = Location.parse(store.url + PATH)
    cache.open(location, size_bytes=SIZE, sha256=SHA).close()
    os.truncate(cache.folder / SHA[:2] / SHA, 100)
    with cache.open(location, size_bytes=SIZE, sha256=SHA) as file:
        assert file.read() == CONTENT


def test_a_bit_that_rotted_is_found_if_asked_for(store: StoreServer, cache: ShardCache, caplog: pytest.LogCaptureFixture) -> None:
    location = Location.parse(store.url + PATH)
    cache.open(location, size_bytes=SIZE, sha256=SHA, verify=True).close()
    (cache.folder / SHA[:2] / SHA).write_bytes(b"x" + CONTENT[1:])
    assert cache.open(location, size_bytes=SIZE, sha256=SHA).read() != CONTENT
    with cache.open(location, size_bytes=SIZE, sha256=SHA, verify=True) as file:
        assert file.read() == CONTENT
    assert "the cached copy is damaged; it is fetched again" in caplog.text


def test_a_copy_for_another_process_counts_for_itself(store: StoreServer, cache: ShardCache, tmp_path: Path) -> None:
    cache.open(Location.parse(store.url + PATH), size_bytes=SIZE, sha256=SHA).close()
    cache.prefetch(Location.parse(store.url + "/none"), size_bytes=SIZE, sha256="0" * 64)
    other = copy.copy(cache)  # by the same way as pickle
    assert (other.bytes_fetched, other.hits) == (0, 0)
    other.open(Location.parse(store.url + PATH), size_bytes=SIZE, sha256=SHA).close()
    assert other.hits == 1 and cache.hits == 0


@pytest.mark.parametrize("name", ["HALFSTEP_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_what_is_here_is_served_and_the_rest_is_an_error(
    store: StoreServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    hashes = fill(store, cache, "a")
    asked = len(store.asked)
    monkeypatch.setenv(name, "1")
    open_letter(store, cache, "a").close()
    with pytest.raises(OfflineError, match=f"/b: not in the cache, and {name}=1 forbids the network"):
        open_letter(store, cache, "b")
    assert len(store.asked) == asked and cached(cache) == set(hashes.values())


@pytest.mark.parametrize("sha256", ["", "../../x", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_a_hash_that_is_none_leads_nowhere(cache: ShardCache, sha256: str) -> None:
    with pytest.raises(ValueError, match="is not 64 lower-case hexadecimal digits"):
        cache.open(Location.parse("s3://b/a"), size_bytes=1, sha256=sha256)


def test_the_folder_is_private_and_a_public_one_is_refused(tmp_path: Path) -> None:
    ShardCache(tmp_path / "a" / "b", 1)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ValueError, match="others may write to it"):
        ShardCache(tmp_path / "open", 1)


def test_the_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HALFSTEP_CACHE", "/scratch/x")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache_folder() == Path("/scratch/x")
    monkeypatch.delenv("HALFSTEP_CACHE")
    assert default_cache_folder() == Path("/xdg/halfstep")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / ".cache" / "halfstep"
