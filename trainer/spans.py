"""The parts of an optimizer step by name, for torch.profiler and NVTX; next to nothing where nobody profiles."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

PREFIX = "halfstep/"
"""Before the names, in traces."""
_NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[None]:
    """A context whose time a profile shows under this name. Without a profiler it costs under a microsecond and starts nothing."""
    return _named(PREFIX + name) if torch.autograd._profiler_enabled() else _NOTHING


@contextmanager
def _named(name: str) -> Iterator[None]:
    marked = torch.cuda.nvtx.range(name) if torch.cuda.is_available() else _NOTHING
    with torch.profiler.record_function(name), marked:
        yield
