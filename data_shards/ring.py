"""Memory that worker processes decode batches into and the reading process copies them out of; takes no room in /dev/shm."""

import mmap
import os
from multiprocessing.reduction import DupFd
from typing import TYPE_CHECKING, final

import torch
from jaxtyping import UInt8
from torch import Tensor

if TYPE_CHECKING:
    from multiprocessing.popen_spawn_posix import _DupFd


@final
class Ring:
    """Slots of `slot_bytes`, so many for each worker, mapped by all processes that got a copy, by fork or pickle.

    Whoever reads takes a batch out before its worker has filled the worker's other slots.
    """

    def __init__(self, *, workers: int, slots: int, slot_bytes: int) -> None:
        self._shape = workers, slots, slot_bytes
        self._file = os.memfd_create("halfstep-batches")
        os.ftruncate(self._file, max(1, workers * slots * slot_bytes))  # memory is taken when it is first written
        self._map()

    def slot(self, worker: int, turn: int) -> UInt8[Tensor, " n"]:
        """The slot of a worker's batch number `turn`, counted from 0 without end."""
        _, slots, slot_bytes = self._shape
        start = (worker * slots + turn % slots) * slot_bytes
        return self._bytes[start : start + slot_bytes]

    def _map(self) -> None:
        self._bytes = torch.frombuffer(mmap.mmap(self._file, 0), dtype=torch.uint8)

    def __getstate__(self) -> dict[str, object]:
        """What a started process finds the same memory by."""
        return {"_shape": self._shape, "_file": DupFd(self._file)}

    def __setstate__(self, state: "dict[str, tuple[int, int, int] | _DupFd]") -> None:
        shape, file = state["_shape"], state["_file"]
        assert isinstance(shape, tuple) and not isinstance(file, tuple), "as __getstate__ wrote it"
        self._shape, self._file = shape, file.detach()
        self._map()

    def __del__(self) -> None:
        """The memory goes with the last process that has it mapped."""
        os.close(self._file)
