"""What the report knows of one directory: plain values, gathered once, which the other modules only show."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from trainer.pictures import PictureRow


@final
@dataclass(frozen=True)
class Stage:
    """A run's metrics.jsonl, a value a logged step."""

    name: str
    title: str
    """What it trains, such as `Student of 8 steps`; stages of one title share a plot."""
    updates: int
    """Optimizer steps that the recipe asks for."""
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    images_per_second: tuple[float, ...]
    step_seconds: tuple[float, ...]
    data_wait_seconds: tuple[float, ...]
    evaluations_per_update: int = 0
    """Images that a network is run on, forwards, in an optimizer step; 0: not known."""

    @property
    def done(self) -> int:
        """Optimizer steps taken."""
        return self.steps[-1] + 1 if self.steps else 0

    @property
    def seconds(self) -> float:
        """Time in optimizer steps, those between two logged ones included."""
        return sum(self.step_seconds) / len(self.step_seconds) * self.done if self.steps else 0.0


@final
@dataclass(frozen=True)
class Measured:
    """A row of evaluation.json, whatever halfstep wrote it: the numbers that the report has names for."""

    model: str
    """student, teacher, or previous: the student of the stage before."""
    steps: int
    """Network calls an image."""
    values: Mapping[str, float]
    """By the keys of trainer.report.measures; what was not measured is not there."""
    yardstick: tuple[tuple[str, str], ...] = ()
    """What it was measured with, as name and value: only rows that share it are shown together."""
    notes: Mapping[str, object] = field(default_factory=dict)
    """The row's other fields."""


@final
@dataclass(frozen=True)
class Sheet:
    """A grid that was drawn while a run trained, as a PNG file."""

    caption: str
    png: bytes


@final
@dataclass(frozen=True)
class Subject:
    """One directory that the page reports on."""

    name: str
    kind: str
    """What it is, in a sentence's words."""
    facts: tuple[tuple[str, str], ...] = ()
    stages: tuple[Stage, ...] = ()
    pictures: tuple[PictureRow, ...] = ()
    measured: tuple[Measured, ...] = ()
    progress: tuple[Sheet, ...] = ()
    """Samples drawn while it was trained, small, first to last."""
    latest: Sheet | None = None
    """The last of them as large as a page shows it."""
    neighbours: tuple[Sheet, ...] = ()
    """Drawn images beside the training images nearest to them."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """The recipe as dotted keys and short texts, without what changes no result."""
    recipe: str = ""
    credits: tuple[tuple[str, str], ...] = ()
    """The training data's licence, as label and text."""
    notices: tuple[str, ...] = ()
    """What could not be read, and why."""
    is_latent: bool = False

    @property
    def is_done(self) -> bool:
        """Whether every stage has taken all its optimizer steps."""
        return bool(self.stages) and all(stage.done >= stage.updates for stage in self.stages)
