"""The descriptor of a model: what its weights mean, in every manifest and export, asserted on every load."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar, final

from trainer.config_sections import Prediction, Sampler
from trainer.diffusion.sampler import Variance
from trainer.pixel_base import PixelBase, pixel_base

SCHEMA_VERSION = 1

Allowed = TypeVar("Allowed")

_PREDICTIONS: tuple[Prediction, ...] = ("v", "eps", "x_0")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# A descriptor without them says nothing of them: it is compared by the others.
_OPTIONAL = ("text_2_sha256",)


@final
@dataclass(frozen=True, kw_only=True)
class Descriptor:
    """How a network's output is read, and on which noise levels it is meant to be sampled."""

    prediction_type: Prediction
    """What the network predicts."""
    alpha_bar_sha256: str
    """Of the full table of T noise levels, as fp64 little-endian bytes."""
    timesteps: tuple[int, ...]
    """Original times of the model's own levels, ascending; all T of them for a teacher."""
    clip: bool
    """Whether x_0 is clipped to [-1, 1] at every sampling step."""
    sampler: Sampler
    """The sampler that the model was made for."""
    variance: Variance
    """Of the ancestral sampler's noise."""
    step_count: int
    """In how many steps the model samples: the number of its timesteps."""
    teacher_sha256: str | None
    """Of the teacher's EMA weights; None for a teacher."""
    image_size: int
    """Pixels a side."""
    channels: int
    """Of an image."""
    start_sha256: str | None = None
    """Of the EMA weights that fine-tuning began with; None for a student, and for a model that began with random ones."""
    base: PixelBase | None = None
    """The stock model that it was made from, directly or through its teachers; None for one from scratch."""
    heads: tuple[Prediction, ...] = ()
    """What the models before this one predicted, first teacher first, and at last prediction_type; empty where all predict the same."""

    def to_json(self) -> dict[str, object]:
        """The fields as descriptor.json and checkpoint manifests hold them."""
        base = {} if self.base is None else {"base": self.base.to_json()}
        return {
            "schema_version": SCHEMA_VERSION,
            "prediction_type": self.prediction_type,
            "alpha_bar_sha256": self.alpha_bar_sha256,
            "timesteps": list(self.timesteps),
            "clip": self.clip,
            "sampler": self.sampler,
            "variance": self.variance,
            "step_count": self.step_count,
            "teacher_sha256": self.teacher_sha256,
            "image_size": self.image_size,
            "channels": self.channels,
            **({} if self.start_sha256 is None else {"start_sha256": self.start_sha256}),
            **base,
            **({"heads": list(self.heads)} if self.heads else {}),
        }

    @staticmethod
    def from_json(value: object, *, where: str = "descriptor") -> "Descriptor":
        """The descriptor in a JSON value that was read from the file `where`.

        Raises: ValueError naming file, field, the value got and what is wanted."""
        if not isinstance(value, dict):
            raise ValueError(f"{where}: the descriptor is {value!r:.60}, wanted an object; {_MEND}")
        fields = _Fields(value, where)
        fields.one_of("schema_version", (SCHEMA_VERSION,))
        timesteps = fields.ascending_integers("timesteps")
        return Descriptor(
            prediction_type=fields.one_of("prediction_type", _PREDICTIONS),
            alpha_bar_sha256=fields.sha256("alpha_bar_sha256"),
            timesteps=timesteps,
            clip=fields.one_of("clip", (False, True)),
            sampler=fields.one_of("sampler", ("ddim", "ancestral")),
            variance=fields.one_of("variance", ("fixed_small", "fixed_large")),
            step_count=fields.one_of("step_count", (len(timesteps),)),
            teacher_sha256=None if fields.get("teacher_sha256") is None else fields.sha256("teacher_sha256"),
            image_size=fields.positive_integer("image_size"),
            channels=fields.positive_integer("channels"),
            start_sha256=None if value.get("start_sha256") is None else fields.sha256("start_sha256"),
            base=pixel_base(value["base"], where=where) if "base" in value else None,
            heads=fields.predictions("heads") if "heads" in value else (),
        )


def difference(mine: Mapping[str, object], others: Mapping[str, object]) -> str:
    """The fields in which two descriptors as JSON differ, as "field: mine != other's", empty where none does.

    What one of them lacks is different, too, but for XL's text_2_sha256, which not every checkpoint has."""
    unsaid = {field for field in _OPTIONAL if field not in mine or field not in others}
    fields = [field for field in dict.fromkeys((*mine, *others)) if field not in unsaid and mine.get(field) != others.get(field)]
    return ", ".join(f"{field}: {_short(mine.get(field))} != {_short(others.get(field))}" for field in fields)


_MEND = "it was not written by this halfstep: train or export again"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 70 else f"{text[:40]} ... {text[-20:]}"


@final
class _Fields:
    """Typed access to a JSON object whose complaints name the file."""

    def __init__(self, fields: dict[str, object], where: str) -> None:
        self.fields = fields
        self.where = where

    def get(self, name: str) -> object:
        if name not in self.fields:
            raise ValueError(f"{self.where}: the descriptor has no {name}; {_MEND}")
        return self.fields[name]

    def one_of(self, name: str, allowed: Sequence[Allowed]) -> Allowed:
        got = self.get(name)
        for choice in allowed:
            if type(got) is type(choice) and got == choice:
                return choice
        raise self.wrong(name, " or ".join(map(repr, allowed)))

    def sha256(self, name: str) -> str:
        got = self.get(name)
        if not isinstance(got, str) or not _SHA256.fullmatch(got):
            raise self.wrong(name, "64 hexadecimal digits")
        return got

    def positive_integer(self, name: str) -> int:
        got = self.get(name)
        if not isinstance(got, int) or isinstance(got, bool) or got < 1:
            raise self.wrong(name, "an integer above 0")
        return got

    def predictions(self, name: str) -> tuple[Prediction, ...]:
        got = self.get(name)
        listed = got if isinstance(got, list) else []
        chosen: tuple[Prediction, ...] = tuple(choice for entry in listed for choice in _PREDICTIONS if entry == choice)
        if not chosen or len(chosen) != len(listed):
            raise self.wrong(name, "a list of v, eps and x_0")
        return chosen

    def ascending_integers(self, name: str) -> tuple[int, ...]:
        got = self.get(name)
        if not isinstance(got, list) or not got or not all(type(entry) is int for entry in got):
            raise self.wrong(name, "a list of integers")
        if got[0] < 0 or any(later <= earlier for earlier, later in pairwise(got)):
            raise self.wrong(name, "integers from 0 upward, each above the one before")
        return tuple(got)

    def wrong(self, name: str, wanted: str) -> ValueError:
        return ValueError(f"{self.where}: the descriptor's {name} is {_short(self.get(name))}, wanted {wanted}; {_MEND}")
