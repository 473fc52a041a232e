"""Ranks: what a single process can know of its device."""

import pytest
import torch
from torch import Tensor

from data_shards import ranks


def test_a_tensor_on_the_cpu_stays_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "device", lambda: torch.device("cpu"))
    tensor = torch.rand(3, generator=torch.Generator().manual_seed(0))
    assert ranks.to_device(tensor) is tensor


def test_a_copy_to_a_gpu_is_from_pinned_memory_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    class Recorded(Tensor):
        """Notes what is asked of it, of which a machine without a GPU can do nothing."""

        def pin_memory(self, device: object = None) -> Tensor:
            asked.append("pinned")
            return self

        def to(self, *args: object, **settings: object) -> Tensor:
            asked.append((args, settings))
            return self

    monkeypatch.setattr(ranks, "device", lambda: torch.device("cuda", 1))
    ranks.to_device(torch.zeros(2).as_subclass(Recorded))
    assert asked == ["pinned", ((torch.device("cuda", 1),), {"non_blocking": True})]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_numbers_on_a_gpu_are_those_on_the_cpu() -> None:
    tensor = torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for given in (tensor, tensor.T, tensor.pin_memory()):
        moved = ranks.to_device(given)
        assert moved.device == ranks.device() and torch.equal(moved.cpu(), given) and ranks.to_device(moved) is moved
