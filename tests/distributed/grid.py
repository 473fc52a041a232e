"""One small recipe on every objective, engine and number of ranks, and how far its losses lie from those of one process."""

import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import final

from launch.data import pack_faces
from launch.run_dir import freeze
from tests.distributed.pool import Pools
from tests.distributed.runs import curves
from trainer.config import FacesConfig
from trainer.config_io import load_recipe

RECIPE = Path(__file__).with_name("grid.yaml")
STEPS = 20
TOLERANCE = 1e-6
"""Largest relative difference of a loss: what another order of fp32 sums makes of it in the steps of a run."""
RANKS = (1, 2, 4)
REFERENCE = "DDP"
"""On 1 rank this engine is plain PyTorch in one process."""
ENGINES = {
    "DDP": ("engine.kind=replicated",),
    "FSDP2": ("engine.kind=fsdp",),
    "ZeRO-1": ("engine.kind=deepspeed", "engine.zero_stage=1"),
    "ZeRO-2": ("engine.kind=deepspeed", "engine.zero_stage=2"),
    "ZeRO-3": ("engine.kind=deepspeed", "engine.zero_stage=3"),
}
OBJECTIVES = ("denoising", "halving")
Case = tuple[str, str, int]
"""Objective, engine, ranks."""
CASES: list[Case] = [
    (objective, engine, ranks) for objective in OBJECTIVES for engine in ENGINES for ranks in RANKS if (engine, ranks) != (REFERENCE, 1)
]
_HALVING = ("objective.kind=progressive_distillation", "objective.teacher_steps=8", "objective.student_steps=4")


@final
class Grid:
    """Runs of the grid in one folder, each made when it is first asked for."""

    def __init__(self, folder: Path, pools: Pools) -> None:
        self.folder, self.pools = folder, pools

    def run(self, objective: str, engine: str, ranks: int, *, steps: int = STEPS) -> Path:
        """The finished RUN_DIR of a case, with a checkpoint each STEPS steps."""
        run_dir = self.folder / f"{objective}_{engine}_{ranks}_{steps}"
        if not run_dir.exists():
            # A folder takes its name when its run is done: a failed one is made again.
            unfinished = run_dir.with_name(f"{run_dir.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            self.freeze(unfinished, objective, engine, steps=steps)
            self.train(unfinished, ranks)
            unfinished.rename(run_dir)
        return run_dir

    def freeze(self, run_dir: Path, objective: str, engine: str, *, steps: int) -> None:
        """Freeze a case's recipe in a new RUN_DIR, or in one that goes on with this engine."""
        overrides = [f"data.shards={self.shards}", f"train.steps={steps}", *ENGINES[engine]]
        if objective == "halving":
            overrides += [*_HALVING, f"objective.teacher={self.run('denoising', REFERENCE, 1)}"]
        config = load_recipe(RECIPE, overrides)
        freeze(run_dir, config, shards=self.shards)

    def train(self, run_dir: Path, ranks: int) -> None:
        """Run the real loop on a frozen RUN_DIR to its end."""
        codes = self.pools.of(ranks).run("tests.distributed.jobs:train_run", {"run_dir": str(run_dir)})
        assert codes == [0] * ranks, f"{run_dir}: the ranks ended with {codes}"

    def losses(self, run_dir: Path) -> list[float]:
        """A run's exact losses in step order."""
        return curves(run_dir)[run_dir.name].values

    def difference(self, objective: str, engine: str, ranks: int) -> float:
        """Largest relative difference of a case's losses from the one-process reference's."""
        reference = self.losses(self.run(objective, REFERENCE, 1))
        return largest_difference(self.losses(self.run(objective, engine, ranks)), reference)

    @cached_property
    def shards(self) -> Path:
        """The images of all runs."""
        return pack_faces(FacesConfig(count=96, size=16), self.folder / "shards")


def largest_difference(losses: Sequence[float], wanted: Sequence[float]) -> float:
    """Largest relative difference of two curves' losses."""
    assert len(losses) == len(wanted), f"{len(losses)} losses, wanted {len(wanted)}"
    return max(abs(loss - expected) / abs(expected) for loss, expected in zip(losses, wanted, strict=True))
