"""What a process frees stays with it: the next step does not fault it in again."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys
from data_shards.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def step():
    blocks = [libc.malloc(16 * 2**20) for _ in range(8)]
    for block in blocks:
        ctypes.memset(block, 1, 16 * 2**20)
    for block in reversed(blocks):
        libc.free(block)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str) -> int:
    """Of pages, in a second step that allocates, writes and frees 128 MiB."""
    return int(subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_second_step_finds_the_memory_of_the_first() -> None:
    assert faults("kept") < 100
    assert faults("as it is") > 10_000, "else the test cannot fail"
