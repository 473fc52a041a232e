"""Hashes that tell whether two runs are the same: of the weights, and of the samples and noise really delivered."""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor

from data_shards import ranks
from trainer.chain import read_chain
from trainer.checkpoint import read_tensors
from trainer.manifest import newest_checkpoint
from trainer.options import Options


@final
@dataclass(frozen=True)
class RunHashes:
    """sha256, as hex, of a run's newest checkpoint and of what its ledgers say was delivered up to there."""

    weights: str
    ema: str
    samples: str


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the tensors in name order, each as its full fp32 little-endian bytes in row-major order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().to(device="cpu", dtype=torch.float32).contiguous().numpy()
        digest.update(values.astype(np.dtype("<f4"), copy=False).tobytes())
    return digest.hexdigest()


def samples_sha256(run_dir: Path, *, before_step: int) -> str:
    """sha256 of the ledgers' micro-batches in (step, index) order, whichever ranks delivered them.

    before_step: later micro-batches are not counted, as a checkpoint of this step knows nothing of them.
    Raises: ValueError if a ledger line is damaged or a micro-batch was delivered twice."""
    delivered: dict[tuple[int, int], str] = {}
    for path in sorted((run_dir / "ledger").glob("rank_*.jsonl")):
        for step, index, content in _ledger_lines(path):
            if step >= before_step:
                continue
            if (step, index) in delivered:
                raise ValueError(
                    f"{path}: step {step}, micro-batch {index} was delivered twice: ledgers of two runs; start in an empty --run-dir"
                )
            delivered[step, index] = content
    digest = hashlib.sha256()
    for (step, index), content in sorted(delivered.items()):
        digest.update(f"{step} {index} {content}\n".encode("ascii"))
    return digest.hexdigest()


def hash_run(path: Path) -> RunHashes:
    """Hashes of a run's newest checkpoint, or of a chain: its stages' hashes folded in stage order.

    Stages without a checkpoint, and a teacher that the chain did not train, do not count.
    Raises: ValueError if there is no run with a checkpoint at `path`."""
    if not (path / "chain.json").exists():
        return _hash_stage(path)
    started = [stage for stage in read_chain(path) if stage.trained_here and newest_checkpoint(stage.run_dir) is not None]
    if not started:
        raise ValueError(f"{path}: no stage of this chain has a checkpoint yet; run `halfstep distill` with --run-dir {path} first")
    hashes = [(stage.name, _hash_stage(stage.run_dir)) for stage in started]
    return RunHashes(
        weights=_fold((name, each.weights) for name, each in hashes),
        ema=_fold((name, each.ema) for name, each in hashes),
        samples=_fold((name, each.samples) for name, each in hashes),
    )


def hash_job(path: Path, _: Options) -> int:
    """Write the three lines of `halfstep hash RUN_DIR` to stdout: weights, ema, samples. Returns the exit code.

    Raises: ValueError if there is no run with a checkpoint at `path`."""
    if ranks.is_rank_0():
        hashes = hash_run(path)
        sys.stdout.write(f"weights {hashes.weights}\nema {hashes.ema}\nsamples {hashes.samples}\n")
        sys.stdout.flush()
    return 0


def _fold(named: Iterable[tuple[str, str]]) -> str:
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in named).encode()).hexdigest()


def _hash_stage(run_dir: Path) -> RunHashes:
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is None:
        raise ValueError(
            f"{run_dir}: no checkpoint to hash; wanted a RUN_DIR or a chain's directory that `halfstep train` or `distill` wrote"
        )
    return RunHashes(
        weights=tensors_sha256(read_tensors(checkpoint, "model")),
        ema=tensors_sha256(read_tensors(checkpoint, "ema")),
        samples=samples_sha256(run_dir, before_step=checkpoint.step),
    )


def _ledger_lines(path: Path) -> Iterator[tuple[int, int, str]]:
    """Step, micro-batch index and "keys noise" hashes of each whole line; a rank killed in mid-write leaves half a last one."""
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            return
        try:
            entry = json.loads(line)
            yield int(entry["step"]), int(entry["index"]), f"{entry['keys_sha256']} {entry['noise_sha256']}"
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: wanted an object with step, index, keys_sha256 and noise_sha256 ({error!r}); resume the run"
            ) from error
