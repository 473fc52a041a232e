"""Memory that worker processes decode batches into and the reading process uses them in; takes no room in /dev/shm."""

import mmap
import os
import weakref
from collections.abc import Mapping
from multiprocessing.reduction import DupFd
from typing import Any, final

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor


@final
class Ring:
    """`slots` pieces of `slot_bytes`, mapped by all processes that got a copy, by fork or pickle; none of no bytes.

    Who hands out the work takes a slot for a batch and lends it on; it is free again when nothing refers to the batch any more.
    """

    def __init__(self, *, slots: int, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self._file = os.memfd_create("halfstep-batches")
        os.ftruncate(self._file, max(1, slots * slot_bytes))  # memory is taken when it is first written
        self._free = list(range(slots)) if slot_bytes else []
        self._map()

    def take(self) -> int | None:
        """A slot that nobody else gets, None if all are in use."""
        return self._free.pop() if self._free else None

    def memory(self, slot: int) -> UInt8[Tensor, " n"]:
        """A taken slot, for the worker that fills it."""
        return torch.frombuffer(self._bytes(slot, self._slot_bytes), dtype=torch.uint8)

    def lend(self, slot: int, size_bytes: int) -> UInt8[Tensor, " n"]:
        """The first bytes of a taken slot, which is free again when this tensor and all its views are gone."""
        piece = self._bytes(slot, size_bytes)
        weakref.finalize(piece, self._free.append, slot).atexit = False  # the tensor's storage keeps the piece
        return torch.frombuffer(piece, dtype=torch.uint8)

    def _bytes(self, slot: int, size_bytes: int) -> np.ndarray:
        return np.frombuffer(self._memory, dtype=np.uint8, count=size_bytes, offset=slot * self._slot_bytes)

    def _map(self) -> None:
        self._memory = mmap.mmap(self._file, 0)

    def __getstate__(self) -> dict[str, object]:
        """What a started process finds the same memory by; it takes no slots."""
        return {"slot_bytes": self._slot_bytes, "file": DupFd(self._file)}

    def __setstate__(self, state: Mapping[str, Any]) -> None:  # a descriptor on its way has a type of its own for each way
        self._slot_bytes, self._file, self._free = state["slot_bytes"], state["file"].detach(), []
        self._map()

    def __del__(self) -> None:
        """The memory itself goes with the last process that has it mapped."""
        os.close(self._file)
