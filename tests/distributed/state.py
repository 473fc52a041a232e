"""The state in a checkpoint as full tensors, whatever engine and number of ranks have written it."""

from pathlib import Path

from torch import Tensor

from trainer.checkpoint import read_tensors
from trainer.manifest import newest_checkpoint

PARTS = ("model", "ema", "ema_1", "optimizer")
KINDS = ("model", "ema", "ema_1", "optimizer.exp_avg", "optimizer.exp_avg_sq")
"""What the names of read_state begin with."""


def read_state(run_dir: Path) -> dict[str, Tensor]:
    """The newest checkpoint's tensors, named part.tensor."""
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None, f"{run_dir}: no checkpoint"
    return {f"{part}.{name}": tensor for part in PARTS for name, tensor in read_tensors(checkpoint, part).items()}
