"""How a step is computed where the recipe says auto: candidates, their times, the choice among them, auto.json. Free of torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import final

from data_shards.files import json_text, read_json_object, replace_file
from trainer.config import RunConfig
from trainer.config_io import dump_yaml
from trainer.config_sections import MemoryFormat

AUTO_FILE = "auto.json"
SCHEMA_VERSION = 1
_LEAST_GAIN = 0.02
"""Share of the time of a micro-batch below which a difference is taken for noise, however steady it looks."""
_LEAST_SECONDS = 600.0
"""Of computing that a run must have before it for a compiler to be tried: that takes from half a minute to several minutes."""
_TRYING = 0.05
"""Share of the computing before a run that trying compilers may take; the one that goes beyond it is the last."""
_COMPILATIONS = 2
"""How often a compilation is paid for: what draws samples is compiled apart, and a resume compiles again."""


@final
@dataclass(frozen=True)
class Candidate:
    """A way to compute a step, by its values in the recipe's train section."""

    compile: bool
    memory_format: MemoryFormat

    def __str__(self) -> str:
        return f"{'compiled' if self.compile else 'eager'}, {self.memory_format}"


@final
@dataclass(frozen=True)
class Timing:
    """What a candidate took, after its warm-up."""

    candidate: Candidate
    seconds: tuple[float, ...]
    """Of a micro-batch, forward and backward, in each round; a round times every candidate once."""
    compile_seconds: float = 0.0
    """What its first call took longer than those after it."""


@final
@dataclass(frozen=True)
class Measurement:
    """Times of candidates, simplest first, and what they hold for."""

    timings: tuple[Timing, ...]
    conditions: Mapping[str, object]
    """Device, network, precision and shape of a micro-batch, as plain JSON values."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Candidates that cannot be here, and why."""

    def covers(self, candidates: Sequence[Candidate], *, micro_batches: int) -> bool:
        """Whether a choice among the candidates can be made of it: those that are not in it were not worth trying.

        candidates: simplest first."""
        timed = [timing.candidate for timing in self.timings]
        tries = candidates[0].compile or worth_compiling(self.timings, micro_batches=micro_batches, spent_seconds=0.0)
        return all(each in timed or str(each) in self.failed or (each.compile and not tries) for each in candidates)


@final
@dataclass(frozen=True)
class Choice:
    """A candidate and, a line for each that was compared, why it was chosen."""

    candidate: Candidate
    reasons: tuple[str, ...]


def candidates(config: RunConfig) -> tuple[Candidate, ...]:
    """What the recipe leaves open, simplest first; one candidate where it leaves nothing open."""
    train = config.train
    formats: tuple[MemoryFormat, ...] = ("contiguous", "channels_last") if train.memory_format == "auto" else (train.layout,)
    if config.model.kind == "kandinsky22_prior":
        formats = ("contiguous",)  # its latents have no height and width
    ways = (False, True) if train.compile == "auto" else (train.compiles,)
    return tuple(Candidate(way, memory_format) for way in ways for memory_format in formats)


def worth_compiling(timings: Sequence[Timing], *, micro_batches: int, spent_seconds: float) -> bool:
    """Whether to try a compiler at all, by the times of candidates without one; spent_seconds: on those that were tried already.

    micro_batches: that a rank has before it."""
    before = micro_batches * min((median(timing.seconds) for timing in timings if not timing.candidate.compile), default=0.0)
    return before >= _LEAST_SECONDS and spent_seconds <= _TRYING * before


def choose(timings: Sequence[Timing], *, micro_batches: int) -> Choice:
    """The candidate that pays, of one or more in order of simplicity; micro_batches: that a rank has before it.

    Each is compared with the best of those before it, round by round. It takes that one's place where the median of the rounds'
    differences is above 2% of a micro-batch and above twice their interquartile range over the root of their number, about two
    standard errors of a median (else they differ by noise), and where that gain, over all micro-batches to come, is more than
    twice the time that it takes longer to compile: what draws samples is compiled apart, and each resume compiles again."""
    best, *others = timings
    reasons = [f"{best.candidate}: {_milliseconds(median(best.seconds))} a micro-batch"]
    for other in others:
        gains = [before - after for before, after in zip(best.seconds, other.seconds, strict=True)]
        gain, before = median(gains), median(best.seconds)
        noise = max(_LEAST_GAIN * before, 2 * _spread(gains) / len(gains) ** 0.5)
        saved, cost = gain * micro_batches, _COMPILATIONS * (other.compile_seconds - best.compile_seconds)
        share = f"{100 * abs(gain) / before:.1f}% {'faster' if gain > 0 else 'slower'} than {best.candidate}"
        text = f"{other.candidate}: {_milliseconds(median(other.seconds))}, {share}"
        if gain <= noise:
            reasons.append(f"{text}: left" + (f", that is within noise ({100 * noise / before:.1f}%)" if gain > 0 else ""))
        elif saved <= cost:
            reasons.append(f"{text}: left, it would save {saved:.0f} s in {micro_batches} micro-batches, compiling takes {cost:.0f} s")
        else:
            reasons.append(f"{text}: taken" + (f", saves {saved:.0f} s for {cost:.0f} s of compiling" if cost > 0 else ""))
            best = other
    return Choice(best.candidate, tuple(reasons))


def with_choice(config: RunConfig, candidate: Candidate) -> RunConfig:
    """The recipe with the candidate's values where it said auto."""
    return config.model_copy(update={"train": config.train.model_copy(update=_values(config, candidate))})


def freeze_choice(run_dir: Path, config: RunConfig, choice: Choice, measurement: Measurement, *, measured_in: str) -> RunConfig:
    """Write a choice into a RUN_DIR: the figures, the run's identity and, last, its recipe, which is returned.

    measured_in: the folder of the run that measured, as seen from there."""
    values = {f"train.{name}": value for name, value in _values(config, choice.candidate).items()}
    figures = {
        "schema_version": SCHEMA_VERSION,
        "choice": values,
        "reasons": list(choice.reasons),
        "measured_in": measured_in,
        "failed": dict(measurement.failed),
        "timings": [asdict(timing) for timing in measurement.timings],
        "conditions": dict(measurement.conditions),
    }
    replace_file(run_dir / AUTO_FILE, json_text(figures))
    record = run_dir / "identity.json"
    if record.exists():
        replace_file(record, json_text({**read_json_object(record), **values}))
    frozen = with_choice(config, choice.candidate)
    replace_file(run_dir / "recipe.yaml", dump_yaml(frozen))
    return frozen


def read_measurement(run_dir: Path) -> Measurement | None:
    """What auto.json holds; None where there is none. Raises: ValueError naming the file if it is not of this schema."""
    file = run_dir / AUTO_FILE
    if not file.exists():
        return None
    match read_json_object(file):
        case {"schema_version": 1, "timings": list(timings), "conditions": dict(conditions), "failed": dict(failed)}:
            return Measurement(tuple(_timing(file, timing) for timing in timings), conditions, failed)
    raise ValueError(
        f"{file}: wanted schema_version {SCHEMA_VERSION} with timings, conditions and failed; remove the file to measure again"
    )


def _timing(file: Path, entry: object) -> Timing:
    match entry:
        case {
            "candidate": {"compile": bool(way), "memory_format": "contiguous" | "channels_last" as memory_format},
            "seconds": [float(), *_] as seconds,
            "compile_seconds": float(compile_seconds),
        }:
            return Timing(Candidate(way, memory_format), tuple(seconds), compile_seconds)
    raise ValueError(f"{file}: a timing is {entry!r}, wanted candidate, seconds and compile_seconds; remove the file to measure again")


def _values(config: RunConfig, candidate: Candidate) -> dict[str, bool | str]:
    return {name: getattr(candidate, name) for name in config.train.to_measure}


def _spread(values: Sequence[float]) -> float:
    """Interquartile range; 0 of one value."""
    if len(values) < 2:
        return 0.0
    lower, _, upper = quantiles(values, n=4, method="inclusive")
    return upper - lower


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
