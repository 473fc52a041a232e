"""The global order of training: the same for every number of ranks and workers and from every step it is resumed at."""

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from data_shards.index import Shard, ShardIndex, index_text
from data_shards.packing.write import PackedSample, write_shard
from data_shards.reading.plan import Plan
from data_shards.reading.read import MicroBatches, loader

UNEVEN = (1, 97, 13, 40, 2, 31)
EPOCHS = 3
CUTS = 20
WORLDS = (1, 2, 4)
WORKERS = (0, 1, 2, 4)


def make_index(folder: Path, samples_per_shard: Sequence[int]) -> ShardIndex:
    """Shards of 2 x 2 pixels, each of its own colour."""
    folder.mkdir()
    shards: list[Shard] = []
    for number, samples in enumerate(samples_per_shard):
        with (folder / f"shard-{number:06d}.tar").open("wb") as file:
            shards.append(write_shard(file, f"shard-{number:06d}.tar", [coloured(folder.name, number, at) for at in range(samples)]))
    text = index_text(image_size=2, licence={}, source={}, pack={}, shards=shards)
    (folder / "index.json").write_text(text)
    return ShardIndex.load(folder)


def coloured(name: str, shard: int, position: int) -> PackedSample:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), (len(name), shard, position)).save(file, "PNG")
    return PackedSample(f"{name}-{shard}-{position}", (("png", file.getvalue()),))


def delivered(batches: MicroBatches, *, start: int, stop: int, world_size: int, workers: int) -> list[str]:
    """The keys of all ranks in the order of (step, index), each picture compared with its key."""
    share = batches.plan.micro_batches // world_size
    by_rank = [
        loader(batches, start_step=start, stop_step=stop, indices=range(rank * share, (rank + 1) * share), workers=workers)
        for rank in range(world_size)
    ]
    keys: list[str] = []
    for _ in range(start, stop):
        for rank in by_rank:
            for _ in range(share):
                batch = next(rank)
                assert [colour_key(image) for image in batch.images[:, :, 0, 0].tolist()] == [tail(key) for key in batch.keys]
                keys += batch.keys
    assert all(next(rank, None) is None for rank in by_rank)
    return keys


def colour_key(colour: Sequence[int]) -> tuple[int, ...]:
    return tuple(colour)


def tail(key: str) -> tuple[int, int, int]:
    name, shard, position = key.split("-")
    return len(name), int(shard), int(position)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> MicroBatches:
    """184 samples in shards of 1 to 97, in global batches of 16, micro-batches of 4."""
    index = make_index(tmp_path_factory.mktemp("order") / "uneven", UNEVEN)
    return MicroBatches(index, Plan(index.samples_per_shard, 3, 16, 4))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> MicroBatches:
    """Three data sets mixed by weight."""
    folder = tmp_path_factory.mktemp("mixed")
    sets = [make_index(folder / name, counts) for name, counts in (("a", (30, 1, 9)), ("bb", (55,)), ("ccc", (17, 8)))]
    counts = tuple(samples for index in sets for samples in index.samples_per_shard)
    return MicroBatches(sets, Plan(counts, 3, 16, 4, (3, 1, 2), (1.0, 2.5, 0.5)))


def whole(batches: MicroBatches) -> list[str]:
    """Three epochs on one rank without workers."""
    return delivered(batches, start=0, stop=EPOCHS * batches.plan.steps_per_epoch, world_size=1, workers=0)


def resumed_in_order(batches: MicroBatches, *, world_size: int, workers: int, cuts: int) -> None:
    stop, size = EPOCHS * batches.plan.steps_per_epoch, batches.plan.global_batch_size
    expected = whole(batches)
    for number in range(cuts):
        start = number * stop // cuts
        assert delivered(batches, start=start, stop=stop, world_size=world_size, workers=workers) == expected[start * size :]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_the_order_is_the_same_on_any_ranks_and_workers_from_any_step(uneven: MicroBatches, world_size: int, workers: int) -> None:
    resumed_in_order(uneven, world_size=world_size, workers=workers, cuts=2)


@pytest.mark.all_cases
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_the_order_is_the_same_from_every_one_of_20_steps(uneven: MicroBatches, world_size: int, workers: int) -> None:
    resumed_in_order(uneven, world_size=world_size, workers=workers, cuts=CUTS)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (4, 1)])
def test_a_mixture_comes_in_the_same_order_too(mixed: MicroBatches, world_size: int, workers: int) -> None:
    resumed_in_order(mixed, world_size=world_size, workers=workers, cuts=3)


def test_each_sample_comes_once_an_epoch_but_for_a_remainder(uneven: MicroBatches) -> None:
    keys, steps = whole(uneven), uneven.plan.steps_per_epoch * uneven.plan.global_batch_size
    for epoch in range(EPOCHS):
        counts = Counter(keys[epoch * steps : (epoch + 1) * steps])
        assert set(counts.values()) == {1} and 0 <= sum(UNEVEN) - len(counts) < 16


def test_the_parts_of_a_mixture_are_exact_over_an_epoch(mixed: MicroBatches) -> None:
    """Of 112 samples an epoch, weights 1 : 2.5 : 0.5 take 28, 70 and 14."""
    keys, steps = whole(mixed), mixed.plan.steps_per_epoch * mixed.plan.global_batch_size
    assert steps == 112
    for epoch in range(EPOCHS):
        of_set = Counter(key.split("-")[0] for key in keys[epoch * steps : (epoch + 1) * steps])
        assert of_set == {"a": 28, "bb": 70, "ccc": 14}


@pytest.mark.parametrize("samples_per_shard", [(64,), (40, 1)])
@pytest.mark.parametrize("workers", [0, 2])
def test_with_fewer_shards_than_ranks_every_rank_has_work(tmp_path: Path, samples_per_shard: tuple[int, ...], workers: int) -> None:
    index = make_index(tmp_path / "few", samples_per_shard)
    batches = MicroBatches(index, Plan(index.samples_per_shard, 0, 16, 2))
    in_order = whole(batches)
    assert delivered(batches, start=0, stop=EPOCHS * batches.plan.steps_per_epoch, world_size=8, workers=workers) == in_order
    size, share = batches.plan.global_batch_size, 2
    for rank in range(8):
        own = [key for step in range(0, len(in_order), size) for key in in_order[step + rank * share : step + (rank + 1) * share]]
        assert len(own) == len(in_order) // 8
