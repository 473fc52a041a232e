"""The tiny twins of the shipped recipes of latent models: their bases, and runs of them on every engine, each made once."""

import random
import shutil
import signal
import time
from collections.abc import Callable
from os import kill
from pathlib import Path
from typing import final

from launch.data import pack_faces
from launch.run_dir import freeze
from tests.distributed.forked_ranks import ForkedRanks
from tests.distributed.grid import ENGINES as ALL_ENGINES
from tests.distributed.runs import curves
from trainer.config import FacesConfig, RunConfig, TinyUNetConfig
from trainer.config_io import load_recipe, recipe_path, shipped
from trainer.tiny_models.kinds import KINDS

SUFFIX = "-tiny"
_TINY = {file.stem: load_recipe(file) for file in shipped("recipes") if file.stem.endswith(SUFFIX)}
# Models with a base or an encoder; those of pixels from scratch, and chains of halvings, have tests of their own.
NAMES = tuple(name for name, config in _TINY.items() if not isinstance(config.model, TinyUNetConfig) and config.distill is None)
STEPS = 20
RANKS = 2
REFERENCE = "DDP"
ENGINES = {name: ALL_ENGINES[name] for name in (REFERENCE, "FSDP2", "ZeRO-2")}
TOLERANCE = 1e-5
"""Largest relative difference of two engines' losses within the steps of a run."""
MODULES = [
    "launch.worker",
    "trainer.train",
    "trainer.latents.drawing",
    "trainer.latents.export",
    "trainer.tasks.autoencoder",
    "trainer.engines.fsdp",
    "trainer.engines.deepspeed_zero",
    "trainer.distill",
    "trainer.draw_shards",
    "trainer.tiny_models.make",
    "trainer.visible",
]
"""What ranks import, once and for all of them."""
_BASES = "runs/tiny/"
"""Where the recipes' headers say that the bases are made."""
_MODEL_FIELDS = ("base", "autoencoder", "decoder", "prior")
_LIMIT_SECONDS = 240.0


@final
class Twins:
    """Bases, shards and runs in one folder, each made when it is first asked for."""

    def __init__(self, folder: Path, ranks: ForkedRanks) -> None:
        self.folder, self.ranks = folder, ranks

    def run(self, name: str, engine: str, *, ranks: int = RANKS, steps: int = STEPS) -> Path:
        """The RUN_DIR of a twin that was trained to its end without a disturbance."""
        done = self.folder / f"{name}_{engine}_{ranks}_{steps}"
        if not done.exists():
            # A folder takes its name when its run is done: a failed one is made again.
            unfinished = done.with_name(f"{done.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            self.freeze(unfinished / "run", name, *ENGINES[engine], f"train.steps={steps}")
            assert self.train(unfinished / "run", ranks=ranks) == [0] * ranks, self.said(unfinished / "run")
            unfinished.rename(done)
        return done / "run"

    def killed(self, name: str, engine: str) -> Path:
        """The RUN_DIR of a twin of which a rank was killed in a step that the names choose, and which was then trained to its end."""
        run_dir = self.folder / f"{name}_{engine}_killed" / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        self.freeze(run_dir, name, *ENGINES[engine])
        dice = random.Random(f"{name} {engine}")
        victim, after = dice.randrange(RANKS), dice.randrange(6, 18)
        pids = self.ranks.start("train", run_dir, ranks=RANKS)
        _wait_until(lambda: _begun(run_dir, victim) >= after, pids[victim])
        time.sleep(dice.random() * 0.05)
        kill(pids[victim], signal.SIGKILL)
        codes = self.ranks.wait()
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, -signal.SIGKILL), codes
        assert 5 <= after <= _begun(run_dir, victim) < STEPS
        assert self.train(run_dir, ranks=RANKS) == [0] * RANKS, self.said(run_dir)
        assert len((run_dir / "attempts.jsonl").read_text().splitlines()) == 2
        return run_dir

    def freeze(self, run_dir: Path, name: str, *overrides: str) -> None:
        """Freeze a twin in a new RUN_DIR, or in one that goes on; its faces and bases are made where they are not there."""
        config = load_recipe(recipe_path(name), overrides)
        assert config.data.faces is not None, f"{name}: a twin draws its own faces"
        shards = self.shards(config.data.faces)
        data = config.data.model_copy(update={"shards": str(shards)})
        freeze(run_dir, config.model_copy(update={"data": data, "model": self._on_bases(config)}), shards=shards)

    def train(self, run_dir: Path, *, ranks: int) -> list[int]:
        """Go on with a frozen RUN_DIR; returns the exit codes of the ranks."""
        self.ranks.start("train", run_dir, ranks=ranks)
        return self.ranks.wait()

    def sample(self, path: Path, out: Path, **options: object) -> Path:
        """What `halfstep sample` writes, into a new folder."""
        self.ranks.start("sample", path, ranks=1, options={"out": str(out), **options})
        assert self.ranks.wait() == [0]
        return out

    def base(self, kind: str) -> Path:
        """A tiny base."""
        folder = self.folder / "bases" / kind
        if not folder.exists():
            self.ranks.start("make-tiny", folder, ranks=1, options={"kind": kind, "vocabulary": "words"})
            assert self.ranks.wait() == [0]
        return folder

    def shards(self, faces: FacesConfig) -> Path:
        """The faces of a recipe, packed."""
        folder = self.folder / f"{faces.style}_{faces.size}_{faces.seed}"
        return folder if folder.exists() else pack_faces(faces, folder)

    def losses(self, run_dir: Path) -> list[float]:
        """A run's exact losses in step order."""
        return curves(run_dir)[run_dir.name].values

    def said(self, run_dir: Path) -> str:
        """The end of what rank 0 has said of a run."""
        logs = [path.read_text()[-3000:] for path in sorted((run_dir / "logs").glob("*rank_0*"))]
        return "\n".join(logs)

    def _on_bases(self, config: RunConfig) -> object:
        """The model section with bases where they are in the stead of where the recipe's header makes them."""
        update = {}
        for field in _MODEL_FIELDS:
            named = getattr(config.model, field, None)
            if named is not None:
                kind, *below = named.removeprefix(_BASES).split("/")
                assert named.startswith(_BASES) and kind in KINDS, f"model.{field}={named}: a twin's base is in {_BASES}"
                update[field] = str(self.base(kind).joinpath(*below))
        return config.model.model_copy(update=update)


def _begun(run_dir: Path, rank: int) -> int:
    """Steps of which a rank has delivered a micro-batch: the last of them may not be over."""
    ledger = run_dir / "ledger" / f"rank_{rank}.jsonl"
    lines = ledger.read_bytes().split(b"\n")[:-1] if ledger.exists() else []
    return len({line.partition(b",")[0] for line in lines})


def _wait_until(condition: Callable[[], bool], pid: int) -> None:
    deadline = time.monotonic() + _LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline and Path(f"/proc/{pid}").exists(), "the moment to kill at never came"
        time.sleep(0.0005)
