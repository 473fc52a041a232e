"""Updates a second of halfstep's halving step against Hramchenko's distiller and against a plain three-forward loop.

All three train the same U-Net from the same teacher on batches that are in memory, turn about in one process: two forwards of the
teacher, one forward and backward of the student, AdamW, an average of the weights. Ours is what `halfstep distill` runs from the
decoded bytes on: the task's micro-batches (noise and times drawn from (seed, step), flips, the ledger's digests) and the engine's
whole step, gradients clipped and checked. Hramchenko's is `DiffusionDistillation.train_student` of a checkout of
https://github.com/Hramchenko/diffusion_distiller (--hramchenko PATH), unchanged, its progress bar silenced; it clips nothing and
draws its times and noise without a record. The plain loop is what a tutorial would write.

`equal`: fp32, contiguous memory, all of them. `best`: each side's best documented settings: ours and the plain loop's in bf16 (and
channels_last where that is faster); Hramchenko's casts to fp32 by itself and documents no other precision.

--options: instead, what each option that changes the step costs, against ours in bf16; a ratio above 1 is faster than without it."""

import argparse
import importlib
import importlib.util
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch
from measure import print_ratio
from random_teacher import write_teacher
from torch import Tensor, nn

from data_shards.host_memory import keep_freed_memory
from data_shards.reading.sample import MicroBatch
from trainer.config import RunConfig, pixel_model
from trainer.config_io import load_recipe, recipe_path
from trainer.diffusion.schedule import build_alpha_bar
from trainer.models.tiny_unet import build_tiny_unet
from trainer.source import load_source
from trainer.tasks.build import build_task
from trainer.train import build_engine

WARM_UP_UPDATES = 3
TEACHER_STEPS = 1000
Turn = Callable[[int], list[float]]
"""(updates) -> seconds of each."""


@dataclass(frozen=True)
class Setting:
    """What both sides of a comparison compute in. changes: of ours, sections of the recipe besides. graph: of the plain loop, whether
    autograd keeps the teacher's forwards."""

    precision: str
    memory_format: str = "contiguous"
    changes: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    graph: bool = False


EQUAL = Setting("fp32")
OPTIONS = {
    "bf16": Setting("bf16"),
    "fp32": Setting("fp32"),
    "teacher_fp32": Setting("bf16", changes={"objective": {"teacher_precision": "fp32"}}),
    "channels_last": Setting("bf16", "channels_last"),
    "compiled": Setting("bf16", changes={"train": {"compile": True}}),
    "feature_weight": Setting("bf16", changes={"objective": {"feature_weight": 0.1}}),
    "target_clipped": Setting("bf16", changes={"objective": {"clip_target": True}}),
}
"""Of ours; the first is what the others are compared with."""


def main() -> None:
    """Print one JSON line for each opponent and setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hramchenko", type=Path, help="a checkout of his diffusion_distiller; without it only the plain loop is run")
    parser.add_argument("--options", action="store_true", help="what options of the step cost; compiling takes minutes")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter repeats, about two minutes in all")
    parser.add_argument("--repeats", type=int, help="turns that each side gets (3 with --quick, else 12)")
    parser.add_argument("--updates", type=int, help="updates of a turn (3 with --quick, else 8)")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as every rank of ours does; here all sides have it
    repeats, updates = options.repeats or (3 if options.quick else 12), options.updates or (3 if options.quick else 8)
    config = load_recipe(recipe_path(options.recipe), ["distill=null"])
    size = config.data.image_size or (config.data.faces.size if config.data.faces else 32)
    with tempfile.TemporaryDirectory() as folder:
        teacher = write_teacher(Path(folder) / "teacher", config, image_size=size)
        images = torch.randint(0, 256, (8, options.batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        # bf16 in both memory formats, so that the faster one can be named as each side's best.
        settings = {
            "equal": EQUAL,
            "bf16": Setting("bf16", "contiguous"),
            "bf16_channels_last": Setting("bf16", "channels_last"),
            "fp32_channels_last": Setting("fp32", "channels_last"),
        }
        turns: dict[str, Turn] = {}
        if options.options:
            turns |= {name: _ours(teacher, config, images, setting) for name, setting in OPTIONS.items()}
            turns |= {f"plain_{graph}": _plain(teacher, config, images, Setting("bf16", graph=graph)) for graph in (False, True)}
            _report_options(_take_turns(turns, repeats=repeats, updates=updates))
            return
        for name, setting in settings.items():
            turns[f"ours_{name}"] = _ours(teacher, config, images, setting)
            turns[f"plain_{name}"] = _plain(teacher, config, images, setting)
        if options.hramchenko:
            turns["hramchenko"] = _hramchenko(options.hramchenko, teacher, config, images)
        seconds = _take_turns(turns, repeats=repeats, updates=updates)
    _report(seconds, settings, batch=options.batch)


def _take_turns(turns: dict[str, Turn], *, repeats: int, updates: int) -> dict[str, list[float]]:
    """Median seconds an update of each side's turns; the order is reversed every other time."""
    for turn in turns.values():
        turn(WARM_UP_UPDATES)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for repeat in range(repeats):
        for name in list(turns) if repeat % 2 == 0 else list(turns)[::-1]:
            seconds[name].append(statistics.median(turns[name](updates)))
    return seconds


def _report(seconds: dict[str, list[float]], settings: dict[str, Setting], *, batch: int) -> None:
    def line(name: str, ours: str, theirs: str, against: str) -> None:
        ratios = [other / own for own, other in zip(seconds[ours], seconds[theirs], strict=True)]
        own = statistics.median(seconds[ours])
        print_ratio(
            name, ratios, against=against, updates_per_second=1 / own, theirs=1 / statistics.median(seconds[theirs]), images=batch / own
        )

    def best(side: str) -> str:
        return min((f"{side}_{name}" for name in settings), key=lambda name: statistics.median(seconds[name]))

    line("halving_plain_equal", "ours_equal", "plain_equal", "a plain three-forward loop, fp32 both")
    line("halving_plain_best", best("ours"), best("plain"), f"a plain three-forward loop, {best('plain')}, ours {best('ours')}")
    if "hramchenko" in seconds:
        line("halving_hramchenko_equal", "ours_equal", "hramchenko", "Hramchenko's train_student, fp32 both")
        line("halving_hramchenko_best", best("ours"), "hramchenko", f"Hramchenko's train_student (fp32), {best('ours')}")


def _report_options(seconds: dict[str, list[float]]) -> None:
    first, *others = OPTIONS
    pairs = [(name, name, first, f"ours in {first}") for name in others]
    pairs.append(
        ("teachers_graph_left_out", "plain_False", "plain_True", "the plain loop in bf16 whose autograd keeps the teacher's forwards")
    )
    for name, ours, theirs, against in pairs:
        ratios = [other / own for own, other in zip(seconds[ours], seconds[theirs], strict=True)]
        print_ratio(f"halving_option_{name}", ratios, against=against, updates_per_second=1 / statistics.median(seconds[ours]))


def _timed(updates: Iterator[None], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        next(updates)
        seconds.append(time.perf_counter() - started)
    return seconds


def _ours(teacher: Path, config: RunConfig, images: Tensor, setting: Setting) -> Turn:
    """halfstep's task and engine; one micro-batch an update."""
    batch = images.shape[1]
    objective = {
        "kind": "progressive_distillation",
        "teacher": str(teacher),
        "teacher_steps": TEACHER_STEPS,
        "student_steps": TEACHER_STEPS // 2,
        "prediction": load_source(teacher).descriptor.prediction_type,
    }
    values = config.model_dump(mode="json") | {"objective": objective}
    values["data"] |= {"global_batch_size": batch, "micro_batch_size": batch}
    values["engine"] |= {"precision": setting.precision}
    values["train"] |= {"memory_format": setting.memory_format, "steps": 1_000_000}
    for section, changed in setting.changes.items():
        values[section] |= changed
    recipe = RunConfig.model_validate(values)
    task = build_task(recipe, teacher.parent, images.shape[-1])
    engine = build_engine(recipe, task)
    batches = [MicroBatch(images=part, keys=("",) * batch, captions=(None,) * batch) for part in images]

    def updates() -> Iterator[None]:
        step = 0
        while True:
            work = task.micro_batch([batches[step % len(batches)]], step, 0)
            engine.step(step, [work.loss], learning_rate=1e-5, votes=(0.0, 0.0), loss_limit=None)
            step += 1
            yield

    running = updates()
    return lambda count: _timed(running, count)


class _Output(nn.Module):
    """A U-Net that returns its prediction alone, as both other loops call it."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        return self.unet(x_t, timestep.float()).sample


def _networks(teacher: Path, config: RunConfig, memory_format: str, *, graph: bool = False) -> tuple[_Output, _Output, _Output]:
    """Teacher, student and a third copy for the average."""
    source = load_source(teacher)
    copies = []
    for _ in range(3):
        unet = build_tiny_unet(pixel_model(config), source.descriptor.image_size)
        unet.load_state_dict(source.model.state_dict())
        copies.append(_Output(unet.to(memory_format=torch.channels_last) if memory_format == "channels_last" else unet))  # pyright: ignore[reportCallIssue] (a keyword-only overload)
    frozen, student, average = copies
    return frozen.requires_grad_(graph).eval(), student.train(), average.requires_grad_(False)


def _plain(teacher: Path, config: RunConfig, images: Tensor, setting: Setting) -> Turn:
    """Three forwards, a backward, clipping, fused AdamW and an average by foreach operations."""
    frozen, student, average = _networks(teacher, config, setting.memory_format, graph=setting.graph)
    alpha_bar = build_alpha_bar(config.noise_schedule)
    alpha, sigma = alpha_bar.sqrt().float().view(-1, 1, 1, 1), (1 - alpha_bar).sqrt().float().view(-1, 1, 1, 1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    layout = torch.channels_last if setting.memory_format == "channels_last" else torch.contiguous_format
    weights: list[Tensor] = list(student.parameters())
    averaged: list[Tensor] = list(average.parameters())

    def updates() -> Iterator[None]:
        for step in range(1_000_000):
            x_0 = images[step % len(images)].to(torch.float32, memory_format=layout) / 127.5 - 1
            t = 2 * torch.randint(1, TEACHER_STEPS // 2, (len(x_0),)) + 1
            a, s, a_mid, s_mid, a_end, s_end = (scale[t - back] for back in (0, 1, 2) for scale in (alpha, sigma))
            x_t = a * x_0 + s * torch.randn_like(x_0)
            with torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bf16"):
                with nullcontext() if setting.graph else torch.no_grad():
                    x_1 = a * x_t - s * frozen(x_t, t).float()
                    x_mid = a_mid * x_1 + s_mid * (x_t - a * x_1) / s
                    x_2 = a_mid * x_mid - s_mid * frozen(x_mid, t - 1).float()
                    x_end = a_end * x_2 + s_end * (x_mid - a_mid * x_2) / s_mid
                    target = (x_end - s_end / s * x_t) / (a_end - s_end / s * a)
                    v = (a * x_t - target) / s
                loss = nn.functional.mse_loss(student(x_t, t).float(), v.detach())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averaged, weights, 0.02)
            loss.item()
            yield

    running = updates()
    return lambda count: _timed(running, count)


class _Distillation(Protocol):
    """Hramchenko's loop."""

    def train_student(
        self, loader: object, teacher: object, student: object, average: nn.Module, lr: float, device: str, **more: object
    ) -> None:
        """Train for as long as the loader gives batches."""
        ...


def _hramchenko(path: Path, teacher: Path, config: RunConfig, images: Tensor) -> Turn:
    """His loop with his diffusion, optimizer and average; a turn is a call of train_student with its own loader."""
    modules = _his_modules(path)
    frozen, student, average = _networks(teacher, config, "contiguous")
    diffusion = modules["v_diffusion"]

    def process(net: nn.Module, steps: int, time_scale: int) -> object:
        made = diffusion.GaussianDiffusionDefault(net, diffusion.make_beta_schedule("cosine", n_timestep=steps), time_scale=time_scale)
        made.gamma = 0  # his script's default
        return made

    pair = process(frozen, TEACHER_STEPS, 1), process(student, TEACHER_STEPS // 2, 2)

    def turn(count: int) -> list[float]:
        """The first update of a call makes the optimizer's state, and is not counted."""
        marks = []
        loop: _Distillation = modules["train_utils"].DiffusionDistillation(modules["strategies"].StrategyLinearLR())
        loader = [(images[k % len(images)].float() / 127.5 - 1, None) for k in range(count + 1)]
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            loop.train_student(
                loader, *pair, average, 1e-5, "cpu", on_iter=lambda number, loss, last=False: marks.append(time.perf_counter())
            )
        return [after - before for before, after in pairwise(marks[:-1])]  # the last mark is of the end

    return turn


def _his_modules(path: Path) -> dict[str, ModuleType]:
    """His files under their own names; what they import for pictures alone is not wanted here, and stands there empty if not installed."""
    missing = [name for name in ("cv2", "matplotlib") if name not in sys.modules and importlib.util.find_spec(name) is None]
    sys.modules |= {name: ModuleType(name) for root in missing for name in (root, f"{root}.pyplot")}
    sys.path.insert(0, str(path))
    return {name: importlib.import_module(name) for name in ("v_diffusion", "strategies", "train_utils")}


if __name__ == "__main__":
    main()
