"""Two hundred scripted mishaps of a store: each file arrives byte for byte, or ends in a clear error, in bounded time."""

import hashlib
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_shards.remote.cache import ShardCache
from data_shards.remote.locations import Location
from data_shards.remote.retry import FetchError, RefusedError, RetryPolicy, WrongContentError
from tests.data_shards.store_cases import cached
from tests.data_shards.store_server import Fault, StoreServer

pytest_plugins = ["tests.data_shards.store_fixtures"]

SEQUENCES = 200
FILE_BYTES = 200_000
WORST_REQUESTS = 4 + 4  # three faults and a good answer, and as many again for stalls that a busy machine adds
KINDS = ("429", "500", "503", "reset", "short", "stall", "html", "other", "redirect to file", "changed for good")


@dataclass(frozen=True)
class Case:
    """A file, what its store does first, and the error that must come of it, if one must."""

    path: str
    content: bytes
    kinds: tuple[str, ...]
    faults: tuple[Fault, ...]
    ends_in: type[FetchError] | None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def fault(kind: str, rng: random.Random, content: bytes) -> Fault:
    after = rng.randrange(len(content) // 4)  # so that three of them do not make a whole
    match kind:
        case "429":
            return Fault("status", status=429, headers={"Retry-After": str(rng.randrange(60))})
        case "500" | "503":
            return Fault("status", status=int(kind))
        case "reset":
            return Fault("reset", after=after)
        case "short":
            return Fault("short", after=after)
        case "stall":
            return Fault("stall", after=after)
        case "html":
            return Fault("html")
        case "redirect to file":
            return Fault("redirect", to="file:///etc/passwd")
        case _:
            return Fault("other", content=rng.randbytes(len(content) - rng.randrange(2)))


def cases(seed: int) -> list[Case]:
    """One to three faults each; the last two kinds end it and come last."""
    rng = random.Random(seed)
    made: list[Case] = []
    for number in range(SEQUENCES):
        content = rng.randbytes(FILE_BYTES)
        kinds = [rng.choice(KINDS) for _ in range(rng.randint(1, 3))]
        final = next((kind for kind in kinds if kind in KINDS[-2:]), None)
        if final is not None:
            kinds = kinds[: kinds.index(final) + 1]
        faults = [fault(kind, rng, content) for kind in kinds]
        if final == "changed for good":
            faults += [fault(final, rng, content) for _ in range(8)]
        ends_in = {"redirect to file": RefusedError, "changed for good": WrongContentError}.get(final or "")
        made.append(Case(f"/{number}.tar", content, tuple(kinds), tuple(faults), ends_in))
    return made


def test_the_script_has_every_kind_of_mishap_in_every_place() -> None:
    made = cases(1)
    assert {(place, kind) for case in made for place, kind in enumerate(case.kinds)} == {
        (place, kind) for place in range(3) for kind in KINDS
    }
    assert sum(case.ends_in is None for case in made) > SEQUENCES // 2


def test_every_mishap_ends_in_the_file_or_in_a_clear_error(clean_environment: None, tmp_path: Path) -> None:
    store = StoreServer()
    policy = RetryPolicy(stall_seconds=0.5, attempts=WORST_REQUESTS, deadline_seconds=600.0, sleep=lambda _: None)
    made = cases(1)
    for case in made:
        store.put(case.path, case.content)
        store.faults[case.path] += case.faults

    def arrived(case: Case) -> bytes | FetchError:
        location = Location.parse(store.url + case.path)
        try:
            with cache.open(location, size_bytes=len(case.content), sha256=case.sha256) as file:
                return file.read()
        except FetchError as error:
            return error

    began = time.monotonic()
    with (
        store.running(),
        ShardCache(tmp_path / "cache", 2 * SEQUENCES * FILE_BYTES, policy=policy) as cache,
        ThreadPoolExecutor(12) as pool,
    ):
        results = list(pool.map(arrived, made))
    spent = time.monotonic() - began

    for case, result in zip(made, results, strict=True):
        requests = len(store.asked_for(case.path))
        assert requests <= WORST_REQUESTS, (case.kinds, requests)
        if case.ends_in is None:
            assert isinstance(result, bytes) and result == case.content, (case.kinds, result)
            assert requests > len(case.faults), case.kinds
        else:
            assert isinstance(result, case.ends_in), (case.kinds, result)
            assert case.path in str(result), case.kinds
    whole = {case.sha256 for case in made if case.ends_in is None}
    assert cached(cache) == whole
    assert cache.bytes_fetched >= len(whole) * FILE_BYTES
    parts = {path.name[:64] for path in (tmp_path / "cache").glob("??/*.part*")}
    assert parts <= {case.sha256 for case in made if case.ends_in is not None}, "a file that arrived left something behind"
    assert spent < 60, "an attempt waited for as long as the store let it"


@pytest.mark.parametrize("kind", ["redirect to file", "changed for good"])
def test_what_can_t_be_mended_is_explained(clean_environment: None, tmp_path: Path, kind: str) -> None:
    case = next(case for case in cases(1) if case.kinds[-1] == kind)
    store = StoreServer()
    store.put(case.path, case.content)
    store.faults[case.path] += case.faults
    policy = RetryPolicy(stall_seconds=0.5, sleep=lambda _: None)
    with (
        store.running(),
        ShardCache(tmp_path / "cache", 2**30, policy=policy) as cache,
        pytest.raises(FetchError, match=r"only http and https are followed; mend the store|wanted .*; upload the file again"),
    ):
        cache.open(Location.parse(store.url + case.path), size_bytes=len(case.content), sha256=case.sha256)
