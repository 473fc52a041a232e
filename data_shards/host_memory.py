"""Memory of the host: what a step frees is kept for the next one."""

import ctypes

# <malloc.h>: parameters of mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 2**30
_LARGEST_HEAP_BLOCK = 32 * 2**20
"""glibc's own limit on 64-bit machines (DEFAULT_MMAP_THRESHOLD_MAX)."""


def keep_freed_memory() -> None:
    """Let this process, and what it forks, each keep what it frees, up to 1 GiB, and not return it to the system and fault it in again.

    A training step on CPU cores allocates and frees the same activations every time: without this, glibc may map and unmap them, and
    the system clears 4 KiB at a time. Blocks of more than 32 MiB are returned as ever. Does nothing with another C library.
    Source: mallopt(3)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
