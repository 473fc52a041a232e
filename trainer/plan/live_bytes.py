"""Bytes of tensors that are alive, counted as operators run: the same on fake tensors and on real ones."""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

Kinds = Callable[["LiveBytes", torch._ops.OpOverload, tuple, object], None]
"""Called after each operator with its arguments and its result, to label tensors."""


@final
@dataclass
class Tally:
    """Live bytes by kind, now and at the moment when their sum was largest."""

    now: dict[str, int] = field(default_factory=dict)
    total: int = 0
    peak: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, count_bytes: int) -> None:
        """Count bytes in, or out where they are negative."""
        self.now[kind] = self.now.get(kind, 0) + count_bytes
        self.total += count_bytes
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.now)


class LiveBytes(TorchDispatchMode):
    """While it is entered, every storage that an operator takes or makes is counted once, until nothing holds it any more.

    What kernels allocate for themselves and what the allocator rounds up is not seen. Each rank counts its own. Tensors are of
    kind `other` until they are labelled; memory that is given back and taken again by resizing, as FSDP2's gathered weights are, is
    of kind `gathered`."""

    def __init__(self, *, counted: Callable[[Tensor], bool] = lambda _: True, kinds: Kinds | None = None) -> None:
        """counted: which tensors count; by default all. kinds: labels what an operator has taken or made."""
        super().__init__()
        self.tally = Tally()
        self.counted, self.kinds = counted, kinds
        self._held: dict[int, _Held] = {}
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> "LiveBytes":
        self._patches.enter_context(_resizes_seen(self._resized))
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._patches.close()

    def label(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Count these as `kind` from now on; they need not have been seen by an operator yet."""
        for tensor in tensors:
            for plain in _plain(tensor):
                if not self.counted(plain):
                    continue
                held = self._see(plain)
                self.tally.add(held.kind, -held.size_bytes)
                held.kind = kind
                self.tally.add(kind, held.size_bytes)

    def kind_of(self, tensor: Tensor) -> str:
        """The kind that a tensor's storage counts as."""
        held = self._held.get(tensor.untyped_storage()._cdata)
        return held.kind if held else "other"

    def restart_peak(self) -> None:
        """Look for the largest sum from now on."""
        self.tally.peak, self.tally.at_peak = self.tally.total, dict(self.tally.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # torch's own signature
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operators on local tensors come here one by one
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and self.counted(leaf):
                self._see(leaf)
        if self.kinds:
            self.kinds(self, func, args, result)
        return result

    def _see(self, tensor: Tensor) -> "_Held":
        storage = tensor.untyped_storage()
        key, size_bytes = storage._cdata, storage.nbytes()
        held = self._held.get(key)
        if held is None:
            held = self._held[key] = _Held("other", 0, weakref.ref(storage, lambda _: self._gone(key)))
        if held.size_bytes != size_bytes:
            self.tally.add(held.kind, size_bytes - held.size_bytes)
            held.size_bytes = size_bytes
        return held

    def _resized(self, storage: torch.UntypedStorage) -> None:
        held = self._held.get(storage._cdata)
        if held is not None:
            self.tally.add(held.kind, -held.size_bytes)
            held.kind, held.size_bytes = "gathered", storage.nbytes()
            self.tally.add(held.kind, held.size_bytes)

    def _gone(self, key: int) -> None:
        held = self._held.pop(key)
        self.tally.add(held.kind, -held.size_bytes)


@final
@dataclass
class _Held:
    kind: str
    size_bytes: int
    reference: weakref.ref


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the elements of a wrapper such as a DTensor."""
    if isinstance(tensor, DTensor):
        yield tensor._local_tensor
    elif is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor


@contextlib.contextmanager
def _resizes_seen(tell: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Storages are resized behind the operators' back: FSDP2 frees and takes the memory of gathered weights so."""
    original = torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, size_bytes: int) -> torch.UntypedStorage:
        result = original(storage, size_bytes)
        tell(storage)
        return result

    torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]
