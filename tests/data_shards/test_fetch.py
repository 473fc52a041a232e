"""Fetching one file: whole and checked, by range after a break, within limits."""

import hashlib
import json
import logging
import os
import time
from email.utils import formatdate
from pathlib import Path

import pytest

from data_shards.remote.fetch import Fetched, Small, fetch, fetch_small
from data_shards.remote.locations import Location
from data_shards.remote.retry import OfflineError, RefusedError, RetryPolicy, UnreachableError, WrongContentError
from tests.data_shards.store_cases import CONTENT, PATH, SHA, Slept, get, names
from tests.data_shards.store_server import HTML, Fault, StoreServer

pytest_plugins = ["tests.data_shards.store_fixtures"]


def test_a_file_comes_whole_and_nothing_else_is_left(store: StoreServer, tmp_path: Path, slept: Slept) -> None:
    fetched = get(store, tmp_path / "a.tar", slept.policy())
    assert (tmp_path / "a.tar").read_bytes() == CONTENT
    assert fetched == Fetched(len(CONTENT), SHA, store.etags[PATH], len(CONTENT), 0)
    assert names(tmp_path) == ["a.tar"] and slept == []
    assert store.asked[0].headers["accept-encoding"] == "identity"


def test_a_file_is_on_the_disk_before_it_has_its_name(
    store: StoreServer, tmp_path: Path, slept: Slept, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    pwrite, fsync, rename = os.pwrite, os.fsync, os.replace

    def flush(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def put(source: Path, target: Path) -> None:
        done.append(f"-> {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "pwrite", lambda descriptor, block, offset: pwrite(descriptor, block[:1000], offset))  # as a full disk may
    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", put)
    get(store, tmp_path / "a.tar", slept.policy())
    assert done[-3:] == ["a.tar.part", "-> a.tar", tmp_path.name]
    assert (tmp_path / "a.tar").read_bytes() == CONTENT


@pytest.mark.parametrize("kind", ["reset", "short"])
def test_a_broken_transfer_goes_on_by_range_if_the_file_is_the_same(store: StoreServer, tmp_path: Path, slept: Slept, kind: str) -> None:
    store.faults[PATH] += [Fault("reset" if kind == "reset" else "short", after=5000)]
    fetched = get(store, tmp_path / "a.tar", slept.policy())
    assert (tmp_path / "a.tar").read_bytes() == CONTENT
    assert store.ranges(PATH) == [None, "bytes=5000-"] or kind == "reset"  # a reset may take bytes on their way with it
    assert store.asked[-1].headers.get("if-range", store.etags[PATH]) == store.etags[PATH]
    assert fetched.came_bytes == len(CONTENT)


def test_a_stalled_transfer_is_broken_off_and_goes_on(store: StoreServer, tmp_path: Path, slept: Slept) -> None:
    store.faults[PATH] += [Fault("stall", after=5000)]
    get(store, tmp_path / "a.tar", slept.policy(stall_seconds=0.2))
    assert (tmp_path / "a.tar").read_bytes() == CONTENT
    assert store.ranges(PATH)[1] == "bytes=5000-"


def test_a_later_process_goes_on_where_this_one_gave_up(store: StoreServer, tmp_path: Path, slept: Slept) -> None:
    store.faults[PATH] += [Fault("short", after=3000), Fault("short", after=1000)]
    with pytest.raises(UnreachableError, match=r"given up after 2 attempts.*ended after 4000 of 10240 bytes.*goes on from there"):
        get(store, tmp_path / "a.tar", slept.policy(attempts=2))
    assert names(tmp_path) == ["a.tar.part", "a.tar.part.json"]
    fetched = get(store, tmp_path / "a.tar", slept.policy())
    assert (fetched.resumed_bytes, fetched.came_bytes) == (4000, len(CONTENT) - 4000)
    assert store.ranges(PATH) == [None, "bytes=3000-", "bytes=4000-"]
    assert (tmp_path / "a.tar").read_bytes() == CONTENT and names(tmp_path) == ["a.tar"]


def test_a_part_that_is_already_whole_needs_no_request(store: StoreServer, tmp_path: Path, slept: Slept) -> None:
    part_of(store, tmp_path, CONTENT)
    get(store, tmp_path / "a.tar", slept.policy())
    assert (tmp_path / "a.tar").read_bytes() == CONTENT and store.asked == []


def part_of(store: StoreServer, folder: Path, content: bytes) -> None:
    """What a process that was killed leaves of the file."""
    identity = hashlib.sha256((store.url + PATH).encode()).hexdigest()
    (folder / "a.tar.part").write_bytes(content)
    (folder / "a.tar.part.json").write_text(json.dumps({"location": identity, "etag": store.etags[PATH]}))


@pytest.mark.parametrize("damage", ["bit", "longer", "no note", "note cut", "other location"])
def test_a_part_that_is_damaged_costs_a_repeat_but_no_file(store: StoreServer, tmp_path: Path, slept: Slept, damage: str) -> None:
    part_of(store, tmp_path, CONTENT[:5000])
    part, note = tmp_path / "a.tar.part", tmp_path / "a.tar.part.json"
    match damage:
        case "bit":
            part.write_bytes(b"\xff" + CONTENT[1:5000])
        case "longer":
            part.write_bytes(CONTENT + b"more")
        case "no note":
            note.unlink()
        case "note cut":
            note.write_text(note.read_text()[:20])
        case _:
            note.write_text(note.read_text().replace('"location": "', '"location": "0'))
    get(store, tmp_path / "a.tar", slept.policy())
    assert (tmp_path / "a.tar").read_bytes() == CONTENT
    assert store.ranges(PATH) == (["bytes=5000-", None] if damage == "bit" else [None])


def test_a_file_that_changed_in_between_starts_again(store: StoreServer, tmp_path: Path, slept: Slept) -> None:
    part_of(store, tmp_path, b"x" * 5000)
    store.put(PATH, CONTENT, '"new"')
    get(store, tmp_path / "a.tar", slept.policy())
    assert (tmp_path / "a.tar").read_bytes() == CONTENT
    assert store.ranges(PATH) == ["bytes=5000-"] and slept == []  # the store answered 200 to If-Range


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_etag_a_broken_transfer_starts_from_zero(
    store: StoreServer, tmp_path: Path, slept: Slept, etag: str | None
) -> None:
    store.put(PATH, CONTENT, etag)
    store.faults[PATH] += [Fault("short", after=5000)]
    get(store, tmp_path / "a.tar", slept.policy())
    assert (tmp_path / "a.tar").read_bytes() == CONTENT and store.ranges(PATH) == [None, None]


@pytest.mark.parametrize("kind", ["no_range", "wrong_range"])
def test_a_store_that_answers_another_range_is_not_believed(store: StoreServer, tmp_path: Path, slept: Slept, kind: str) -> None:
    store.faults[PATH] += [Fault("short", after=5000), Fault("no_range") if kind == "no_range" else Fault("wrong_range")]
    get(store, tmp_path / "a.tar", slept.policy())
    assert (tmp_path / "a.tar").read_bytes() == CONTENT
    assert store.ranges(PATH) == [None, "bytes=5000-", *([None] if kind == "wrong_range" else [])]


def test_a_206_of_other_content_under_another_etag_is_not_joined(store: StoreServer, tmp_path: Path, slept: Slept) -> None:
    headers = {"Content-Range": f"bytes 5000-{len(CONTENT) - 1}/{len(CONTENT)}", "ETag": '"x"'}
    store.faults[PATH] += [Fault("short", after=5000), Fault("body", status=206, headers=headers, content=bytes(len(CONTENT) - 5000))]
    get(store, tmp_path / "a.tar", slept.policy(), sha256=None)
    assert (tmp_path / "a.tar").read_bytes() == CONTENT and store.ranges(PATH) == [None, "bytes=5000-", None]


def test_a_206_that_nobody_asked_for_is_not_believed(store: StoreServer, tmp_path: Path, slept: Slept) -> None:
    headers = {"Content-Range": f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"}
    store.faults[PATH] += [Fault("body", status=206, headers=headers, content=bytes(len(CONTENT)))]
    get(store, tmp_path / "a.tar", slept.policy())
    assert (tmp_path / "a.tar").read_bytes() == CONTENT and len(slept) == 1


def test_a_416_starts_from_zero(store: StoreServer, tmp_path: Path, slept: Slept) -> None:
    store.put(PATH, CONTENT, '"e"')
    part_of(store, tmp_path, CONTENT + b"more")
    get(store, tmp_path / "a.tar", slept.policy(), size_bytes=None)
    assert (tmp_path / "a.tar").read_bytes() == CONTENT and store.ranges(PATH) == [f"bytes={len(CONTENT) + 4}-", None]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_store_that_is_busy_is_asked_again(store: StoreServer, tmp_path: Path, slept: Slept, status: int) -> None:
    store.faults[PATH] += [Fault("status", status=status)] * 3
    get(store, tmp_path / "a.tar", slept.policy())
    assert (tmp_path / "a.tar").read_bytes() == CONTENT
    assert slept == [0.5, 1.0, 2.0]  # half of a bound that doubles


def test_the_wait_is_anywhere_below_its_bound_and_training_s_random_numbers_stay_put() -> None:
    import random

    before = random.getstate()
    waits = [RetryPolicy().wait_seconds(3, 0.0) for _ in range(200)]
    assert min(waits) < 1.0 < 3.0 < max(waits) < 4.0
    assert RetryPolicy(longest_wait_seconds=7.0, random=lambda: 1.0).wait_seconds(40, 2.0) == 9.0
    assert random.getstate() == before


def test_what_the_store_asks_to_wait_is_waited(store: StoreServer, tmp_path: Path, slept: Slept) -> None:
    store.faults[PATH] += [
        Fault("status", status=429, headers={"Retry-After": "17"}),
        Fault("status", status=503, headers={"Retry-After": formatdate(time.time() + 100, usegmt=True)}),
    ]
    get(store, tmp_path / "a.tar", slept.policy())
    assert slept[0] == 17.5 and 95.0 < slept[1] < 102.0


def test_a_wait_beyond_the_deadline_ends_at_once(store: StoreServer, tmp_path: Path, slept: Slept) -> None:
    store.faults[PATH] += [Fault("status", status=429, headers={"Retry-After": "3600"})]
    with pytest.raises(UnreachableError, match=r"after 1 attempts: HTTP 429 .*3600 s from now, beyond the 60 s for a file"):
        get(store, tmp_path / "a.tar", slept.policy(deadline_seconds=60))
    assert slept == []


def test_attempts_are_bounded_and_the_error_says_how_it_ended(
    store: StoreServer, tmp_path: Path, slept: Slept, caplog: pytest.LogCaptureFixture
) -> None:
    store.faults[PATH] += [Fault("status", status=503)] * 9
    with caplog.at_level(logging.WARNING), pytest.raises(UnreachableError, match=r"a\.tar: given up after 4 attempts in 0 s: HTTP 503"):
        get(store, tmp_path / "a.tar", slept.policy(attempts=4))
    assert len(store.asked) == 4 and len(slept) == 3 and names(tmp_path) == []
    assert caplog.records[0].getMessage().endswith("attempt 1 of 4 failed: HTTP 503 Service Unavailable; next one in 0.5 s")


def test_a_drip_of_bytes_does_not_outlast_the_deadline(store: StoreServer, tmp_path: Path) -> None:
    now = iter(range(1000))  # each look at the clock is a second later
    policy = RetryPolicy(clock=lambda: float(next(now)), sleep=lambda _: None, random=lambda: 0.0, deadline_seconds=5)
    store.put(PATH, bytes(2**24))
    with pytest.raises(UnreachableError, match="the 5 s for a file are used up"):
        get(store, tmp_path / "a.tar", policy, size_bytes=2**24)


def test_nobody_there_is_tried_again_and_said(tmp_path: Path, slept: Slept) -> None:
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1 can't be reached: ConnectionRefusedError"):
        fetch(Location.parse("http://127.0.0.1:1/a"), tmp_path / "a", size_bytes=1, sha256=None, policy=slept.policy(attempts=3))
    assert len(slept) == 2


@pytest.mark.parametrize(
    ("status", "said"), [(401, r"~/\.netrc"), (403, "sign the URL anew"), (404, "no such file"), (410, "no such file"), (400, "owner")]
)
def test_a_no_is_not_asked_again(store: StoreServer, tmp_path: Path, slept: Slept, status: int, said: str) -> None:
    store.faults[PATH] += [Fault("status", status=status)]
    with pytest.raises(RefusedError, match=f"HTTP {status} .*{said}"):
        get(store, tmp_path / "a.tar", slept.policy())
    assert len(store.asked) == 1 and names(tmp_path) == []


def test_a_page_in_the_file_s_stead_is_found_described_and_given_up(store: StoreServer, tmp_path: Path, slept: Slept) -> None:
    store.faults[PATH] += [Fault("html")] * 4
    with pytest.raises(
        WrongContentError, match=f"4 times in 0 s .* a file of {len(HTML)} bytes \\(an HTML page\\), wanted {len(CONTENT)}; upload"
    ):
        get(store, tmp_path / "a.tar", slept.policy())
    assert names(tmp_path) == []


def test_a_page_in_between_does_not_cost_what_has_come(store: StoreServer, tmp_path: Path, slept: Slept) -> None:
    store.faults[PATH] += [Fault("short", after=5000), Fault("html")]
    get(store, tmp_path / "a.tar", slept.policy())
    assert store.ranges(PATH) == [None, "bytes=5000-", "bytes=5000-"]


def test_a_page_of_the_right_size_is_found_by_its_hash(store: StoreServer, tmp_path: Path, slept: Slept) -> None:
    page = HTML.ljust(len(CONTENT))
    store.put(PATH, page)
    wrong = hashlib.sha256(page).hexdigest()[:12]
    with pytest.raises(WrongContentError, match=rf"{len(CONTENT)} bytes of sha256 {wrong} \(an HTML page\), wanted sha256 {SHA[:12]}"):
        get(store, tmp_path / "a.tar", slept.policy())
    assert len(store.asked) == 4 and names(tmp_path) == []


def test_compressed_content_is_refused(store: StoreServer, tmp_path: Path, slept: Slept) -> None:
    store.faults[PATH] += [Fault("gzip")] * 4
    with pytest.raises(WrongContentError, match="Content-Encoding 'gzip'"):
        get(store, tmp_path / "a.tar", slept.policy())


def test_a_body_without_end_is_cut_off_at_once(store: StoreServer, tmp_path: Path, slept: Slept) -> None:
    store.faults[PATH] += [Fault("huge")] * 4
    with pytest.raises(WrongContentError, match=f"more bytes than the {len(CONTENT)} wanted"):
        get(store, tmp_path / "a.tar", slept.policy())
    assert store.sent_bytes[PATH] < 2**26 and names(tmp_path) == []


def test_a_file_of_unknown_length_is_not_begun(store: StoreServer, tmp_path: Path, slept: Slept) -> None:
    store.faults[PATH] += [Fault("chunked")]
    with pytest.raises(RefusedError, match="does not say how long"):
        get(store, tmp_path / "a.tar", slept.policy(), size_bytes=None, sha256=None)
    store.faults[PATH] += [Fault("chunked")]
    get(store, tmp_path / "a.tar", slept.policy())
    assert (tmp_path / "a.tar").read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["HALFSTEP_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_nothing_is_tried(store: StoreServer, tmp_path: Path, slept: Slept, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(OfflineError, match=f"not in the cache, and {name}=1 forbids the network; unset it"):
        get(store, tmp_path / "a.tar", slept.policy())
    assert store.asked == []


def test_a_local_path_is_not_fetched(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a local path"):
        fetch(Location.parse(tmp_path / "a"), tmp_path / "b", size_bytes=1, sha256=None)


def test_a_small_file_comes_once_and_then_only_if_it_changed(store: StoreServer, slept: Slept) -> None:
    location = Location.parse(store.url + PATH)
    small = fetch_small(location, limit_bytes=2**20, policy=slept.policy())
    assert small is not None and small == Small(CONTENT, store.etags[PATH])
    assert fetch_small(location, limit_bytes=2**20, etag=small.etag, policy=slept.policy()) is None
    store.put(PATH, b"new", '"new"')
    assert fetch_small(location, limit_bytes=2**20, etag=small.etag, policy=slept.policy()) == Small(b"new", '"new"')


def test_a_small_file_is_bounded_and_tried_again(store: StoreServer, slept: Slept) -> None:
    location = Location.parse(store.url + PATH)
    store.faults[PATH] += [Fault("short"), Fault("reset"), Fault("status", status=503), Fault("gzip"), Fault("chunked")]
    small = fetch_small(location, limit_bytes=len(CONTENT), policy=slept.policy())
    assert small is not None and small.content == CONTENT and len(slept) == 4
    with pytest.raises(RefusedError, match=f"has {len(CONTENT)} bytes, at most 100 are read"):
        fetch_small(location, limit_bytes=100, policy=slept.policy())
    store.faults[PATH] += [Fault("huge")]
    with pytest.raises(RefusedError, match="more than 100 bytes came"):
        fetch_small(location, limit_bytes=100, policy=slept.policy())
