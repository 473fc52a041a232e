"""A slot is lent to one batch at a time, for as long as anything refers to it."""

import gc
import subprocess
import sys
from multiprocessing.context import ForkContext, ForkServerContext, SpawnContext
from pathlib import Path

import pytest
import torch

from data_shards.index import ShardIndex
from data_shards.reading.plan import Plan
from data_shards.reading.read import AHEAD, HELD, MicroBatches, loader
from data_shards.reading.ring import Ring


def test_a_slot_is_free_again_when_the_last_view_of_it_is_gone() -> None:
    ring = Ring(slots=1, slot_bytes=10)
    slot = ring.take()
    assert slot is not None and ring.take() is None
    images = ring.lend(slot, 6)
    view = images.view(2, 3).permute(1, 0)[:2]
    del images
    gc.collect()
    assert ring.take() is None and view.shape == (2, 2)
    del view
    assert ring.take() == slot


def test_there_are_no_slots_of_no_bytes() -> None:
    assert Ring(slots=3, slot_bytes=0).take() is None


def fill(ring: Ring, slot: int, value: int) -> None:
    ring.memory(slot).fill_(value)


@pytest.mark.parametrize("context", [ForkContext(), ForkServerContext(), SpawnContext()], ids=["fork", "forkserver", "spawn"])
def test_processes_see_the_same_slots_however_they_are_started(context: ForkContext | ForkServerContext | SpawnContext) -> None:
    ring = Ring(slots=3, slot_bytes=5)
    process = context.Process(target=fill, args=(ring, 1, 7))
    process.start()
    process.join()
    assert [ring.memory(slot).tolist() for slot in range(3)] == [[0] * 5, [7] * 5, [0] * 5]


def test_batches_that_are_held_keep_their_images(packed: Path) -> None:
    index = ShardIndex.load(packed)
    plan = Plan(index.samples_per_shard, seed=0, global_batch_size=2, micro_batch_size=1)
    steps = 40
    alone = list(loader(MicroBatches(index, plan), start_step=0, stop_step=steps, indices=range(2)))
    held = []
    for number, batch in enumerate(loader(MicroBatches(index, plan), start_step=0, stop_step=steps, indices=range(2), workers=2)):
        assert torch.equal(batch.images, alone[number].images) and batch.keys == alone[number].keys
        if number % 3 == 0 or number > 2 * steps - 4:
            held.append((number, batch.images[:, :1]))
    assert len(held) > 2 * AHEAD + HELD  # more than there are slots
    assert all(torch.equal(images, alone[number].images[:, :1]) for number, images in held)


def test_a_process_ends_while_its_workers_still_read(packed: Path) -> None:
    program = """
import sys
from data_shards.index import ShardIndex
from data_shards.reading.plan import Plan
from data_shards.reading.read import MicroBatches, loader
index = ShardIndex.load(sys.argv[1])
batches = loader(MicroBatches(index, Plan(index.samples_per_shard, 0, 2, 2)), start_step=0, stop_step=10**6, indices=range(1), workers=2)
print(next(batches).images.shape)
"""
    done = subprocess.run([sys.executable, "-c", program, str(packed)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "torch.Size([2, 3, 16, 16])\n", "")
