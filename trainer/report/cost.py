"""What a chain's halvings cost against the training of its teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import final

from trainer.config import DenoisingConfig, ProgressiveDistillationConfig, RunConfig
from trainer.report.html import duration, heads, table
from trainer.report.subject import Stage, Subject
from trainer.stages import halvings


@final
@dataclass(frozen=True)
class Cost:
    """Of one or several stages."""

    updates: int
    """Optimizer steps."""
    evaluations: int
    """Image evaluations: images that a network was run on, forwards; a halving's two teacher steps and its student's are three."""
    seconds: float
    """In optimizer steps, of all ranks at the same time."""

    @classmethod
    def of(cls, stages: Sequence[Stage]) -> "Cost":
        """All stages together."""
        return cls(
            sum(stage.done for stage in stages),
            sum(stage.done * stage.evaluations_per_update for stage in stages),
            sum(stage.seconds for stage in stages),
        )


def evaluations_per_update(recipe: RunConfig) -> int:
    """Images that a network is run on, forwards, in an optimizer step of a pixel model; 0 where nothing is known of that."""
    match recipe.objective:
        case DenoisingConfig():
            forwards = 1
        case ProgressiveDistillationConfig(teacher_steps=teacher, student_steps=student):
            forwards = 1 + 2 ** halvings(teacher, student)
        case _:
            forwards = 0
    return forwards * recipe.data.global_batch_size


def cost_section(subject: Subject) -> str:
    """Teacher, halvings and their ratio; empty unless a chain has trained both."""
    teacher = [stage for stage in subject.stages if stage.title == "Teacher" and stage.steps]
    students = [stage for stage in subject.stages if stage.title.startswith("Student") and stage.steps]
    if not teacher or not students or not all(stage.evaluations_per_update for stage in (*teacher, *students)):
        return ""
    whole, halved = Cost.of(teacher), Cost.of(students)
    ratios = (halved.updates / whole.updates, halved.evaluations / whole.evaluations, halved.seconds / whole.seconds)
    lines = [
        _line("Training the teacher", f"{whole.updates:,}", f"{whole.evaluations:,}", duration(whole.seconds)),
        _line(f"{len(students)} stages of halving", f"{halved.updates:,}", f"{halved.evaluations:,}", duration(halved.seconds)),
        _line("Halving / training", *(f"{ratio:.2f}" for ratio in ratios)),
    ]
    text = "Image evaluations: images that a network was run on, forwards; a halving runs its teacher twice and its student once."
    columns = heads(("", "Optimizer steps", "Image evaluations", "Time"))
    return f'<h2>What the halvings cost</h2><p class="soft">{text}</p>{table(columns, lines)}'


def _line(*cells: str) -> str:
    return "".join(f"<td>{escape(cell)}</td>" for cell in cells)
