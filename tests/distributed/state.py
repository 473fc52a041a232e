"""The state in a checkpoint as full tensors, whatever engine and number of ranks have written it."""

from pathlib import Path

from torch import Tensor

from trainer.checkpoint import read_tensors
from trainer.manifest import newest_checkpoint

PARTS = ("model", "ema", "ema_1", "optimizer")
KINDS = ("model", "ema", "ema_1", "optimizer.exp_avg", "optimizer.exp_avg_sq")
"""What the names of read_state begin with."""
STATE_TOLERANCE = 5e-6
"""Of a tensor's numbers, relative to the largest of their kind: the losses' tolerance, and the 20 steps that it has grown in."""


def read_state(run_dir: Path) -> dict[str, Tensor]:
    """The newest checkpoint's tensors, named part.tensor."""
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None, f"{run_dir}: no checkpoint"
    return {f"{part}.{name}": tensor for part in PARTS for name, tensor in read_tensors(checkpoint, part).items()}


def largest_state_difference(run_dir: Path, reference: Path) -> float:
    """Of weights, averages and moments, each relative to the largest number of its kind."""
    got, wanted = read_state(run_dir), read_state(reference)
    assert got.keys() == wanted.keys()
    differences = []
    for kind in KINDS:
        names = [name for name in wanted if name.startswith(f"{kind}.")]
        largest = max(wanted[name].abs().max().item() for name in names)
        differences.append(max((got[name] - wanted[name]).abs().max().item() for name in names) / largest)
    return max(differences)
