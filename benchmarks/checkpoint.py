"""Saving and loading the state of a 53-million U-Net on 2 ranks: ours, torch.distributed.checkpoint's and DeepSpeed's, turn about.

The state is fp32 weights, one average and Adam's two moments: 848 MB. Ours and dcp's files are synced to the disk before a save has
ended, ours are hashed too; DeepSpeed's are neither, and hold no average. The pause is how long an asynchronous save of ours keeps the
training thread; the slow-down is how much longer all steps take while it writes. Both in steps."""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from measure import print_ratio, run_ranks
from torch import Tensor

from data_shards import ranks
from trainer.checkpoint import agree_on_pieces, agreed_checkpoint, load_state
from trainer.config import EmaConfig, OptimConfig, TinyUNetConfig
from trainer.engines.deepspeed_zero import DeepSpeedZero
from trainer.engines.engine import Engine, LossPerImage
from trainer.engines.replicated import Replicated
from trainer.manifest import Retention
from trainer.models.tiny_unet import Denoiser, build_tiny_unet
from trainer.save import Saver

RANKS, MICRO_BATCHES, IMAGES, SIDE = 2, 2, 4, 32
MODEL = TinyUNetConfig(
    channels=(128, 256, 256, 384), attention=(False, False, True, True), layers_per_block=2, attention_heads=6, norm_groups=32
)


def main() -> None:
    """Print a JSON line for saving, loading and the pause of an asynchronous save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repeat of a small model, under a minute")
    parser.add_argument("--repeats", type=int, help="repeats to take (1 with --quick, else 5)")
    parser.add_argument("--folder", type=Path, help="where to save (default: the temporary directory's disk)")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        _rank(options.rank_of, quick=options.quick, repeats=options.repeats)
        return
    repeats = options.repeats or (1 if options.quick else 5)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        words = [__file__, "--rank-of", folder, "--repeats", str(repeats), *(["--quick"] if options.quick else [])]
        run_ranks(words, ranks=RANKS)
        rows = [json.loads(line) for line in (Path(folder) / "rows.jsonl").read_text().splitlines()]
    for verb in ("save", "load"):
        for other in ("dcp", "deepspeed"):
            ratios = [row[f"{other}_{verb}"] / row[f"ours_{verb}"] for row in rows]
            seconds = {f"seconds_{name}": statistics.median(row[f"{name}_{verb}"] for row in rows) for name in ("ours", other)}
            print_ratio(f"checkpoint_{verb}_against_{other}", ratios, against=f"{other}.{verb}", **seconds)
    for name in ("pause", "slowdown"):
        steps = [row[f"{name}_steps"] for row in rows]
        median = {"step_seconds": statistics.median(row["step_seconds"] for row in rows)}
        print_ratio(f"checkpoint_async_{name}_steps", steps, against="the seconds of a step without a save", **median)


def _rank(folder: Path, *, quick: bool, repeats: int) -> None:
    """One rank; rank 0 writes a row a repeat to rows.jsonl."""
    ranks.init_process_group(timeout_seconds=300)
    engine, peer = _engine(quick=quick), _deepspeed(quick=quick)
    for step in range(2):  # moments and buffers are there
        _step(engine, step)
        _step(peer, step)
    pieces = agree_on_pieces(engine.state())
    keep = Retention(keep_last=2, keep_every_steps=None, keep_best=0)
    savers = [
        Saver(folder / name, engine.state(), pieces, retention=keep, asynchronous=name == "async", timeout_seconds=300)
        for name in ("async", "sync")
        if _made(folder / name)
    ]
    step = 2
    for repeat in range(repeats + 1):
        row: dict[str, float] = {}
        step, row = _asynchronous(engine, savers[0], step, steps=3)
        row["ours_save"] = _timed(lambda step=step: savers[1].start(step, {}))
        row["ours_load"] = _timed(lambda: _load(folder / "sync", engine, pieces))
        row |= _dcp(folder / f"dcp_{repeat}", engine)
        row |= _deepspeed_files(folder / f"deepspeed_{repeat}", peer)
        if repeat and ranks.is_rank_0():  # the first one warms caches and takes memory
            with open(folder / "rows.jsonl", "a", encoding="ascii") as rows:
                rows.write(json.dumps(row) + "\n")
    ranks.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort while the interpreter tears down


def _asynchronous(engine: Engine, saver: Saver, step: int, *, steps: int) -> tuple[int, dict[str, float]]:
    """Steps without a save, then one saved in the background: how long the start takes, and how much longer the steps do."""
    plain = []
    for _ in range(steps):
        plain.append(_timed(lambda step=step: _step(engine, step)))
        step += 1
    usual = statistics.median(plain)
    pause = _timed(lambda: saver.start(step, {}))
    slower, ended = 0.0, False
    while not ended:
        slower += _timed(lambda step=step: _step(engine, step)) - usual
        step += 1
        ended = not ranks.any_rank(not saver.ended)
    saver.finish()
    return step, {"step_seconds": usual, "pause_steps": pause / usual, "slowdown_steps": (pause + slower) / usual}


def _load(run_dir: Path, engine: Engine, pieces: list) -> None:
    checkpoint = agreed_checkpoint(run_dir)
    assert checkpoint is not None, f"no checkpoint in {run_dir}"
    load_state(checkpoint, engine.state(), pieces)


def _dcp(folder: Path, engine: Engine) -> dict[str, float]:
    """The same tensors by torch.distributed.checkpoint, which spreads what all ranks hold by itself."""
    tensors = {f"{part}/{name}": shard.values for part, shards in engine.state().items() for name, shard in shards.items()}
    copies: dict[str, Tensor] = {name: tensor.clone() for name, tensor in tensors.items()}
    saving = _timed(lambda: dcp.save(tensors, checkpoint_id=folder))
    loading = _timed(lambda: dcp.load(copies, checkpoint_id=folder))
    _forget(folder)
    return {"dcp_save": saving, "dcp_load": loading}


def _deepspeed_files(folder: Path, peer: DeepSpeedZero) -> dict[str, float]:
    saving = _timed(lambda: peer.deepspeed.save_checkpoint(str(folder)))
    loading = _timed(lambda: peer.deepspeed.load_checkpoint(str(folder)))
    _forget(folder)
    return {"deepspeed_save": saving, "deepspeed_load": loading}


def _timed(act: Callable[[], object]) -> float:
    """Seconds until all ranks have acted."""
    ranks.barrier()
    started = time.perf_counter()
    act()
    ranks.barrier()
    return time.perf_counter() - started


def _step(engine: Engine, step: int) -> None:
    engine.step(step, _losses(step), learning_rate=1e-4, votes=[0.0], loss_limit=None)


def _losses(step: int) -> Iterator[LossPerImage]:
    for index in ranks.share(MICRO_BATCHES):
        x = torch.randn(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(MICRO_BATCHES * step + index))

        def loss(model: Denoiser, x: Tensor = x) -> Tensor:
            return (model(x, torch.full((IMAGES,), 500.0)) - x).square().mean(dim=(1, 2, 3))

        yield loss


def _engine(*, quick: bool) -> Replicated:
    return Replicated(_model(quick), optim=OptimConfig(), ema=EmaConfig(), precision="fp32", memory_format="contiguous", micro_batches=2)


def _deepspeed(*, quick: bool) -> DeepSpeedZero:
    return DeepSpeedZero(
        _model(quick),
        stage=2,
        optim=OptimConfig(),
        ema=EmaConfig(),
        precision="fp32",
        memory_format="contiguous",
        micro_batches=MICRO_BATCHES,
        micro_batch_size=IMAGES,
    )


def _model(quick: bool):
    torch.manual_seed(0)
    return build_tiny_unet(TinyUNetConfig(channels=(32, 64)) if quick else MODEL, SIDE)


def _made(folder: Path) -> bool:
    folder.mkdir(exist_ok=True)
    return True


def _forget(folder: Path) -> None:
    ranks.barrier()
    if ranks.is_rank_0():
        shutil.rmtree(folder)
    ranks.barrier()


if __name__ == "__main__":
    main()
