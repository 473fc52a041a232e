"""Tensors that an encoder left in the shards: read as they were written, and nothing but numbers."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from data_shards.images import DecodeError
from data_shards.index import ShardIndex, index_text
from data_shards.packing.write import PackedSample, write_shard
from data_shards.reading.decode import tensor_of
from data_shards.reading.plan import Plan
from data_shards.reading.read import MicroBatches, loader


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=False)
    return file.getvalue()


def encoded(folder: Path, contents: list[bytes]) -> ShardIndex:
    with (folder / "s.tar").open("wb") as file:
        samples = [PackedSample(f"k{at}", (("latents.npy", content), ("txt", b"a face"))) for at, content in enumerate(contents)]
        shard = write_shard(file, "s.tar", samples)
    (folder / "index.json").write_text(index_text(image_size=None, licence={}, source={}, pack={}, shards=[shard]))
    return ShardIndex.load(folder)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "int64", "uint8"])
@pytest.mark.parametrize("shape", [(8, 4, 4), (3,), (), (0, 2)])
def test_numbers_come_as_they_were_written(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    tensor = tensor_of(npy(np.asarray(array)))
    assert tensor.dtype == getattr(torch, dtype) and np.array_equal(tensor.numpy(), array)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_micro_batch_holds_tensors_without_images(tmp_path: Path, workers: int) -> None:
    arrays = np.random.default_rng(0).normal(size=(8, 8, 4, 4)).astype(np.float16)
    index = encoded(tmp_path, [npy(array) for array in arrays])
    batches = MicroBatches(index, Plan(index.samples_per_shard, 0, 4, 2), fields=("latents.npy", "caption"))
    for batch in loader(batches, start_step=0, stop_step=2, indices=range(2), workers=workers):
        wanted = np.stack([arrays[int(key[1:])] for key in batch.keys])
        assert np.array_equal(batch.tensors["latents.npy"].numpy(), wanted)
        assert batch.images.shape == (2, 3, 0, 0) and batch.captions == ("a face", "a face")


def test_a_tensor_that_the_shards_do_not_hold_is_asked_for_in_vain(tmp_path: Path) -> None:
    index = encoded(tmp_path, [npy(np.zeros(3))])
    with pytest.raises(ValueError, match=r"holds no text.npy; make it with `halfstep shards encode`"):
        MicroBatches(index, Plan((1,), 0, 1, 1), fields=("text.npy",))


def test_tensors_of_several_shapes_make_no_batch(tmp_path: Path) -> None:
    index = encoded(tmp_path, [npy(np.zeros(3)), npy(np.zeros(4))])
    with pytest.raises(ValueError, match=r"its latents.npy is of shape \((3|4),\), that of others"):
        MicroBatches(index, Plan((2,), 0, 2, 2), fields=("latents.npy",))[0, 0]


def test_objects_are_no_numbers() -> None:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DecodeError, match="no plain numbers"):
        tensor_of(file.getvalue())
