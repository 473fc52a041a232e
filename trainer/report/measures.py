"""The numbers of evaluation.json that the report shows: their names, their units, and which way is better."""

from dataclasses import dataclass
from typing import Literal, final


@final
@dataclass(frozen=True)
class Measure:
    """One number of a row."""

    key: str
    title: str
    better: Literal["lower", "higher"]
    about: str
    """What it tells, as a sentence for readers."""
    scale: float = 1.0
    """Shown as so many times the number."""
    style: str = ".3g"
    """How it is written, as a format."""

    def text(self, value: float) -> str:
        """The number for a table."""
        return format(value * self.scale, self.style)

    def is_better(self, value: float, other: float) -> bool:
        """Whether a value beats another."""
        return value < other if self.better == "lower" else value > other


QUALITY = (
    Measure(
        "frechet_distance",
        "Fréchet distance",
        "lower",
        "How far the drawn images, taken together, are from real ones that no model was trained on.",
        style=".2f",
    ),
    Measure("kid", "KID × 1000", "lower", "Kernel distance to the same images, without bias: at best about 0.", scale=1000, style=".1f"),
    Measure("cmmd", "CMMD", "lower", "Kernel distance to the same images in the space of CLIP.", style=".3f"),
    Measure("manifold_precision", "Precision", "higher", "Share of drawn images that lie among the real ones.", style=".1%"),
    Measure("manifold_recall", "Recall", "higher", "Share of real images that lie among the drawn ones.", style=".1%"),
    Measure(
        "teacher_feature_distance",
        "Distance to the teacher",
        "lower",
        "Mean distance of features to the teacher's image from the same noise.",
    ),
    Measure("teacher_pixel_rmse", "Pixels off the teacher", "lower", "Root mean square difference to the teacher's image.", style=".4f"),
    Measure(
        "training_distance",
        "Distance to training images",
        "higher",
        "Median distance to the nearest training image: far below that of images nobody trained on, the model has memorised.",
    ),
    Measure(
        "attribute_accuracy",
        "Attributes kept",
        "higher",
        "Share of attributes that read as on the teacher's image from the same noise.",
        style=".0%",
    ),
)
"""In the order of columns; the first one that a page has is the one in large."""

SECONDS = Measure("seconds_per_image", "Seconds an image", "lower", "Seconds of all processes together, over all images.")
IMAGES = Measure("images_per_second", "Images a second", "higher", "Images that all processes together draw in a second.")
SPEED = (SECONDS, IMAGES)

MODELS = {
    "student": ("student", "Student made for so many steps", "--student"),
    "teacher": ("teacher", "Teacher run in so many DDIM steps", "--teacher"),
    "previous": ("previous student", "Student of the stage before, run in so many", "--third"),
}
"""Of each model of a row: its name in a line, over a column, and its colour."""
