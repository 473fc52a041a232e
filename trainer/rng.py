"""All randomness of a run: generators derived from (seed, path), never from a process's state."""

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor


def derive_seed(seed: int, *path: str | int) -> int:
    """A 63-bit seed for one purpose, a pure function of `seed` and the purpose's path, e.g. ("noise", step, index)."""
    text = "/".join([str(seed), *map(str, path)])
    return int.from_bytes(hashlib.sha256(text.encode("ascii")).digest()[:8], "little") >> 1


def generator(seed: int, *path: str | int) -> torch.Generator:
    """A CPU generator at the start of its stream: the same draws on every device, rank and attempt."""
    return torch.Generator("cpu").manual_seed(derive_seed(seed, *path))


def seed_weights(seed: int) -> None:
    """Put the default generators, from which fresh weights are drawn, at the start of the run."""
    torch.manual_seed(derive_seed(seed, "weights"))


def seed_dropout(seed: int, step: int, index: int) -> None:
    """Put the default generators, from which dropout draws, at the start of micro-batch (step, index)."""
    value = derive_seed(seed, "dropout", step, index)
    # torch.manual_seed would also format a stack trace for each kind of device that is not there.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(value)


def stratified_uniforms(stream: torch.Generator, count: int, *, stratum: int, strata: int) -> Float[Tensor, " b"]:
    """Draws in [0, 1), one in each of `count` strata of a global batch of count * strata images.

    stratum: which of the `strata` interleaved sets of strata this micro-batch takes; over one step every micro-batch takes
    another, so that the global batch covers [0, 1) evenly (low-discrepancy times, Kingma et al. 2021, arXiv:2107.00630, I.1)."""
    jitter = torch.rand(count, generator=stream, dtype=torch.float64)
    first = torch.arange(count, dtype=torch.float64) * strata + stratum
    # A jitter next to 1 may round up to the next stratum's edge, and the last stratum's edge is 1.0.
    return ((first + jitter) / (count * strata)).clamp_(max=1 - 2**-53)
