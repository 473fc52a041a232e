"""Training's reader over a remote store: each node fetches its share once, ahead of its use; faults lose and double nothing."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data_shards.config import OnBadSample
from data_shards.index import ShardIndex
from data_shards.reading.plan import Plan
from data_shards.reading.read import MicroBatches, loader
from data_shards.reading.sample import BadSampleError, MicroBatch
from data_shards.remote.cache import ShardCache
from data_shards.remote.retry import RetryPolicy, UnreachableError
from data_shards.remote.store import store_of
from tests.data_shards.store_server import Fault, StoreServer
from tests.data_shards.test_order import make_index

NODES, RANKS, LANES, SHARDS_A_LANE = 4, 2, 8, 11
QUICK = RetryPolicy(attempts=4, wrong_content_attempts=2, first_wait_seconds=0.001, longest_wait_seconds=0.002, stall_seconds=0.1)


@pytest.fixture
def server() -> Iterator[StoreServer]:
    with StoreServer().running() as running:
        yield running


@pytest.fixture
def remote(tmp_path: Path, server: StoreServer) -> ShardIndex:
    """88 shards of 5 to 9 samples on a web server, 11 a lane."""
    index = make_index(tmp_path / "tars", [5 + number % 5 for number in range(LANES * SHARDS_A_LANE)])
    for shard in index.shards:
        server.put(f"/faces/{shard.name}", (index.root / shard.name).read_bytes())
        (index.root / shard.name).unlink()  # nobody may read it here
    return replace(index, location=f"{server.url}/faces")


def reading(index: ShardIndex, cache: ShardCache, *, on_bad_sample: OnBadSample = "raise") -> MicroBatches:
    plan = Plan(index.samples_per_shard, 0, LANES * 2, 2)
    return MicroBatches(index, plan, on_bad_sample=on_bad_sample, stores=[store_of(index, cache)])


def test_four_nodes_fetch_little_more_than_their_share_with_a_cache_of_few_shards(
    tmp_path: Path, remote: ShardIndex, server: StoreServer
) -> None:
    size = max(shard.size_bytes for shard in remote.shards)
    sample_bytes = {key: shard.size_bytes / shard.samples for shard in remote.shards for key in shard.keys}
    delivered: Counter[str] = Counter()
    ratios: list[float] = []
    for node in range(NODES):
        # Two ranks of a lane each: what is read and what comes next of both, and one on its way.
        with ShardCache(tmp_path / f"node{node}", 5 * size) as cache:
            lanes = range(node * RANKS, (node + 1) * RANKS)
            ranks = [read_lane(reading(remote, cache), lane) for lane in lanes]
            keys = [key for row in zip(*ranks, strict=True) for batch in row for key in batch.keys]
            kept = sum(path.stat().st_size for path in (tmp_path / f"node{node}").rglob("*") if path.is_file())
            assert kept <= 5.1 * size
        delivered.update(keys)
        ratios.append(cache.bytes_fetched / sum(sample_bytes[key] for key in keys))
    assert set(delivered.values()) == {1} and remote.samples - len(delivered) < 2 * LANES
    assert min(ratios) >= 1 and max(ratios) <= 1.2, ratios
    asked = Counter(asked.path for asked in server.asked)
    assert max(asked.values()) <= 2, "a shard is fetched by at most two lanes"


def read_lane(batches: MicroBatches, lane: int) -> Iterator[MicroBatch]:
    return loader(batches, start_step=0, stop_step=batches.plan.steps_per_epoch, indices=range(lane, lane + 1))


def test_the_next_shard_of_a_lane_comes_while_this_one_is_read(tmp_path: Path, remote: ShardIndex, server: StoreServer) -> None:
    with ShardCache(tmp_path / "cache", 2**40) as cache:
        batches = reading(remote, cache)
        first, second = (remote.shards[number].name for number in batches.plan.lane_shards(0, 3)[:2])
        batches[0, 3]
        while not any(asked.path == f"/faces/{second}" for asked in server.asked):
            server.stalled.wait(0.01)
        assert server.asked[0].path == f"/faces/{first}"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_node_downloads_a_shard_once_however_many_processes_read_it(
    tmp_path: Path, remote: ShardIndex, server: StoreServer, workers: int
) -> None:
    cache = ShardCache(tmp_path / "cache", 2**40)
    batches = reading(remote, cache)
    epochs = 2 * batches.plan.steps_per_epoch
    keys = [key for batch in loader(batches, start_step=0, stop_step=epochs, indices=range(LANES), workers=workers) for key in batch.keys]
    assert max(Counter(keys).values()) == 2
    assert max(Counter(asked.path for asked in server.asked).values()) == 1
    cache.close()


FAULTS = {
    "429": Fault("status", status=429, headers={"Retry-After": "0"}),
    "500": Fault("status", status=500),
    "503": Fault("status", status=503, headers={"Retry-After": "0"}),
    "reset": Fault("reset"),
    "short": Fault("short"),
    "stall": Fault("stall"),
    "html": Fault("html"),
    "changed": Fault("other", content=b"x" * 4096),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_store_neither_lose_nor_double_a_sample(tmp_path: Path, remote: ShardIndex, server: StoreServer, name: str) -> None:
    for shard in remote.shards[::9]:
        server.faults[f"/faces/{shard.name}"].append(FAULTS[name])
    with ShardCache(tmp_path / "cache", 2**40, policy=QUICK) as cache:
        batches = reading(remote, cache)
        delivered = list(loader(batches, start_step=0, stop_step=batches.plan.steps_per_epoch, indices=range(LANES)))
    assert not any(batch.replaced for batch in delivered)
    assert set(Counter(key for batch in delivered for key in batch.keys).values()) == {1}


def test_a_shard_that_was_changed_for_good_is_a_bad_one_under_the_policy(tmp_path: Path, remote: ShardIndex, server: StoreServer) -> None:
    plan = reading(remote, ShardCache(tmp_path / "unused", 2**40)).plan
    changed = remote.shards[plan.lane_shards(0, 0)[0]]
    server.put(f"/faces/{changed.name}", b"y" * changed.size_bytes)
    with ShardCache(tmp_path / "cache", 2**40, policy=QUICK) as cache:
        with pytest.raises(BadSampleError, match="sent something else"):
            reading(remote, cache)[0, 0]
        batch = reading(remote, cache, on_bad_sample="skip")[0, 0]
    assert [bad.shard for bad in batch.replaced] == [changed.name] * 2 and len(batch.keys) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_that_is_down_is_no_bad_sample(tmp_path: Path, remote: ShardIndex, server: StoreServer, workers: int) -> None:
    """It would empty the run of its data, shard by shard: the run ends, and the same command goes on."""
    for shard in remote.shards:
        server.faults[f"/faces/{shard.name}"].extend([FAULTS["503"]] * 20)
    with ShardCache(tmp_path / "cache", 2**40, policy=QUICK) as cache, pytest.raises(UnreachableError, match="503"):
        next(loader(reading(remote, cache, on_bad_sample="skip"), start_step=0, stop_step=1, indices=range(1), workers=workers))


def test_what_was_read_once_is_read_again_without_the_store(
    tmp_path: Path, remote: ShardIndex, server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ShardCache(tmp_path / "cache", 2**40) as cache:
        batches = reading(remote, cache)
        steps = batches.plan.steps_per_epoch
        before = [batch.keys for batch in loader(batches, start_step=0, stop_step=steps, indices=range(LANES))]
    asked = len(server.asked)
    monkeypatch.setenv("HALFSTEP_OFFLINE", "1")
    with ShardCache(tmp_path / "cache", 2**40) as cache:
        again = reading(remote, cache)
        assert [batch.keys for batch in loader(again, start_step=0, stop_step=steps, indices=range(LANES))] == before
    assert len(server.asked) == asked
