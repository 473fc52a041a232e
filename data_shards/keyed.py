"""Random numbers as a pure function of a seed and a path of names, the same under every numpy version."""

import hashlib

import numpy as np


def random_bits(count: int, seed: int, *path: str | int) -> np.ndarray:
    """`count` uint64 words of the Philox stream keyed by (seed, path).

    Only the bit generator is used: numpy promises its stream, but not that of `Generator.permutation`.
    """
    text = "/".join(str(part) for part in (seed, *path))
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    return np.random.Philox(key=key).random_raw(count)


def permutation(count: int, seed: int, *path: str | int) -> np.ndarray:
    """A uniform order of 0 .. count-1, int64."""
    return np.argsort(random_bits(count, seed, *path), kind="stable")
