"""A bad number on one rank changes nothing on any; its samples are named, and the recipe's policy follows."""

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from data_shards import ranks
from data_shards.reading.sample import MicroBatch
from launch.run_dir import freeze
from launch.worker import _exit_code
from tests.distributed.grid import ENGINES, RECIPE, Grid
from tests.distributed.jobs import HANG_SECONDS
from tests.distributed.state import read_state
from trainer.config import RunConfig
from trainer.config_io import load_recipe
from trainer.engines.engine import Engine, NumericError, StepResult
from trainer.manifest import committed
from trainer.models.tiny_unet import Denoiser
from trainer.rng import seed_dropout
from trainer.stop import StopRequest
from trainer.tasks.build import build_task
from trainer.tasks.task import Task, Work
from trainer.train import build_engine, train
from trainer.training_data import TrainingData
from trainer.watch import Watch

pytestmark = pytest.mark.distributed

RANKS, MICRO_BATCHES, SIZE = 2, 4, 16
Bad = dict[str, float]
"""By "step/index" of a micro-batch what its losses are multiplied by; 0 stands for a finite loss whose gradient is not."""


# Jobs: what the ranks do.


def inject(recipe: str, *, steps: int, bad: Bad) -> dict[str, object]:
    """Steps of an engine, some of them bad, beside a twin that is spared those. Collective.

    Returns `outcomes` by step, the names of what a bad step `changed` on this rank, and of its `traces`: what the twin has other."""
    config = load_recipe(Path(recipe))
    twin = _build(config)
    engine = _build(config)
    outcomes, changed = [], []
    bad_steps = {int(place.split("/")[0]) for place in bad}
    for step in range(steps):
        before = _bits(engine)
        result = _step(engine, config, step, bad)
        outcomes.append(result.outcome)
        if step in bad_steps:
            changed += [f"{step}: {name}" for name in _different(_bits(engine), before)]
        else:
            _step(twin, config, step, {})
    traces = _different(_bits(engine), _bits(twin))
    return {"outcomes": outcomes, "changed": changed, "traces": traces, "compared": len(_bits(engine))}


def train_with_bad_losses(run_dir: str, *, bad: Bad) -> dict[str, object]:
    """The real loop, its objective's losses multiplied in some micro-batches; returns exit code and message. Collective."""
    path = Path(run_dir)

    def spoiled_task(config: RunConfig, folder: Path, image_size: int, *, data: TrainingData) -> Task:
        return _spoiled(build_task(config, folder, image_size, data=data), bad)

    watch = Watch(path, rank=ranks.rank(), world_size=ranks.world_size(), limit_seconds=HANG_SECONDS)
    try:
        with mock.patch("trainer.train.build_task", spoiled_task):
            return {"code": train(path, StopRequest(), watch), "message": ""}
    except NumericError as error:
        return {"code": _exit_code(error), "message": str(error)}
    finally:
        watch.close()


def _build(config: RunConfig) -> Engine:
    return build_engine(config, build_task(config, Path(), SIZE))


def _step(engine: Engine, config: RunConfig, step: int, bad: Bad) -> StepResult:
    losses = [_loss(config, step, index, bad.get(f"{step}/{index}", 1.0)) for index in ranks.share(MICRO_BATCHES)]
    return engine.step(step, losses, learning_rate=1e-3, votes=(0.0, 0.0), loss_limit=None)


def _loss(config: RunConfig, step: int, index: int, factor: float):
    def loss(model: Denoiser) -> Tensor:
        x = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(step * MICRO_BATCHES + index))
        seed_dropout(config.seed, step, index)
        error = (model(x, torch.tensor([5.0, 200.0, 500.0, 900.0])) - x).square().mean(dim=(1, 2, 3))
        return error * factor if factor else (error * 0.0).sqrt()  # the root's slope at 0 is infinite

    return loss


def _bits(engine: Engine) -> dict[str, str]:
    """Hashes of all that this rank holds: its shards of the state, and what its module computes with."""
    held = {f"{part}/{name}": shard.values for part, shards in engine.state().items() for name, shard in shards.items()}
    module = engine.module  # type: ignore[attr-defined]  # every engine has one
    assert isinstance(module, nn.Module)
    for name, parameter in module.named_parameters():
        # ZeRO 3 keeps its part, filled up to equal parts, in ds_tensor, and small parameters whole in the parameter itself.
        own = getattr(parameter, "ds_tensor", None)
        count = 0 if own is None else max(0, parameter.ds_numel - ranks.rank() * own.numel())  # type: ignore[attr-defined]
        parts = {"ds_tensor": None if own is None else own[:count], "data": parameter}
        held |= {f"module {name} {kind}": part for kind, part in parts.items() if part is not None and part.numel()}
    return {name: hashlib.sha256(_row_major(tensor)).hexdigest() for name, tensor in held.items()}


def _different(bits: dict[str, str], others: dict[str, str]) -> list[str]:
    """Names of what both hold and hold differently: ZeRO 3 gives whole parameters back after some steps and gathers them anew."""
    return [name for name in bits.keys() & others.keys() if bits[name] != others[name]]


def _row_major(tensor: Tensor) -> bytes:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _spoiled(task: Task, bad: Bad) -> Task:
    """The task with losses multiplied in the micro-batches that these draws belong to."""

    def micro_batch(batches: Sequence[MicroBatch], step: int, index: int) -> Work:
        work = task.micro_batch(batches, step, index)
        factor = bad.get(f"{step}/{index}", 1.0)
        return dataclasses.replace(work, loss=lambda model: work.loss(model) * factor)

    return dataclasses.replace(task, micro_batch=micro_batch)


# Engines.


@pytest.mark.parametrize("engine", ["DDP", "FSDP2", "ZeRO-2", "ZeRO-3"])
@pytest.mark.parametrize(
    "count", [pytest.param(3, id="3_bad_steps", marks=pytest.mark.engines_sample), pytest.param(20, marks=pytest.mark.engines)]
)
def test_a_bad_number_on_one_rank_changes_nothing_on_any(grid: Grid, tmp_path: Path, engine: str, count: int) -> None:
    recipe = _frozen(grid, tmp_path / "run", *ENGINES[engine]) / "recipe.yaml"
    choose = random.Random(engine)
    chosen = sorted(choose.sample(range(2 * count), count))
    factors = [math.nan, math.inf, 0.0]
    bad = {f"{step}/{choose.randrange(MICRO_BATCHES)}": factors[number % 3] for number, step in enumerate(chosen)}
    arguments = {"recipe": str(recipe), "steps": 2 * count, "bad": bad}
    answers = grid.pools.of(RANKS).run("tests.distributed.test_bad_numbers:inject", arguments)
    for answer in answers:
        assert isinstance(answer, dict)
        assert answer["outcomes"] == ["bad" if step in chosen else "applied" for step in range(2 * count)]
        assert answer["changed"] == [] and answer["compared"] > 100
        assert answer["traces"] == [], "a bad step has left a trace in those after it"


# The loop.


def _frozen(grid: Grid, run_dir: Path, *overrides: str) -> Path:
    freeze(run_dir, load_recipe(RECIPE, [f"data.shards={grid.shards}", *overrides]), shards=grid.shards)
    return run_dir


def _train(grid: Grid, run_dir: Path, policy: str, bad: Bad, *overrides: str, steps: int = 12, every: int = 5) -> dict[str, object]:
    """What the ranks, all alike, say of a run with bad losses."""
    settings = (f"numeric.on_bad_step={policy}", f"train.steps={steps}", f"checkpoint.every_steps={every}", *overrides)
    _frozen(grid, run_dir, *settings)
    job = {"run_dir": str(run_dir), "bad": bad}
    first, second = grid.pools.of(RANKS).run("tests.distributed.test_bad_numbers:train_with_bad_losses", job)
    assert isinstance(first, dict) and first == second
    return first


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _steps(run_dir: Path) -> list[object]:
    return [line["step"] for line in _lines(run_dir / "metrics.jsonl")]


def _check_samples(run_dir: Path, line: dict[str, object], indices: Sequence[int], *, delivered: bool = True) -> None:
    """The samples that a line of bad_steps.jsonl names are those that the ledgers say were delivered."""
    samples = line["samples"]
    assert isinstance(samples, dict) and sorted(samples) == sorted(map(str, indices))
    ledgers = [each for rank in range(RANKS) for each in _lines(run_dir / "ledger" / f"rank_{rank}.jsonl")]
    for index, keys in samples.items():
        hashes = [each["keys_sha256"] for each in ledgers if (each["step"], each["index"]) == (line["step"], int(index))]
        assert len(keys) == 4 and hashes == ([hashlib.sha256("\n".join(keys).encode()).hexdigest()] if delivered else [])


def test_stop_ends_with_66_and_names_the_samples(grid: Grid, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ended = _train(grid, run_dir, "stop", {"3/2": math.nan, "3/3": math.inf})
    [line] = _lines(run_dir / "bad_steps.jsonl")
    assert (ended["code"], line["step"], line["action"]) == (66, 3, "stop")
    _check_samples(run_dir, line, [2, 3])
    samples = line["samples"]
    assert isinstance(samples, dict)
    named = f"Samples by micro-batch: 2: {', '.join(samples['2'])}"
    assert f"step 3: the loss of micro-batches [2, 3] is not finite; no weight was changed. {named}" in str(ended["message"])
    assert _steps(run_dir) == [0, 1, 2] and committed(run_dir) == []


def test_skip_leaves_the_step_out_and_the_run_ends(grid: Grid, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert _train(grid, run_dir, "skip", {"2/3": math.nan, "7/1": math.nan}) == {"code": 0, "message": ""}
    assert _steps(run_dir) == [step for step in range(12) if step not in (2, 7)]
    for line, step, index in zip(_lines(run_dir / "bad_steps.jsonl"), (2, 7), (3, 1), strict=True):
        assert (line["step"], line["action"]) == (step, "skip")
        _check_samples(run_dir, line, [index])
    assert [step for step, _ in committed(run_dir)] == [10, 12]


def test_roll_back_goes_back_leaves_the_step_out_and_comes_to_the_same_weights_as_skip(grid: Grid, tmp_path: Path) -> None:
    bad = {"2/3": math.nan, "7/1": math.nan}
    skipped, run_dir = tmp_path / "skipped", tmp_path / "run"
    assert _train(grid, skipped, "skip", bad)["code"] == 0
    assert _train(grid, run_dir, "roll_back", bad) == {"code": 0, "message": ""}
    assert _steps(run_dir) == _steps(skipped)
    attempts = _lines(run_dir / "attempts.jsonl")
    assert [attempt["step"] for attempt in attempts] == [0, 0, 5]
    assert [str(attempt["previous_end"])[:21] for attempt in attempts] == ["None", "rolled back: step 2: ", "rolled back: step 7: "]
    for line, index in zip(_lines(run_dir / "bad_steps.jsonl"), (3, 1), strict=True):
        _check_samples(run_dir, line, [index], delivered=False)
    weights, wanted = read_state(run_dir), read_state(skipped)
    assert all(torch.equal(weights[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("policy", ["skip", pytest.param("roll_back", marks=pytest.mark.engines)])
def test_a_spent_budget_ends_with_66(grid: Grid, tmp_path: Path, policy: str) -> None:
    run_dir = tmp_path / "run"
    ended = _train(grid, run_dir, policy, {"1/0": math.nan, "3/2": math.nan}, "numeric.max_bad_steps=1")
    assert ended["code"] == 66 and "2 steps were bad, numeric.max_bad_steps allows 1" in str(ended["message"])
    assert [line["action"] for line in _lines(run_dir / "bad_steps.jsonl")] == [policy, "stop"]


@pytest.mark.engines
def test_a_spike_is_left_out_and_blamed_on_the_whole_batch(grid: Grid, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ended = _train(grid, run_dir, "skip", {"10/0": 100.0, "25/1": 100.0}, "numeric.spike_factor=3.0", steps=30, every=30)
    assert ended["code"] == 0
    [line] = _lines(run_dir / "bad_steps.jsonl")
    assert line["step"] == 25 and "numeric.spike_factor times its average" in str(line["reason"])
    _check_samples(run_dir, line, range(MICRO_BATCHES))
    assert 10 in _steps(run_dir), "of the first 20 steps there is no average yet"
