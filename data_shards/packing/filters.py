"""Which rows of a source are packed: by the size and shape of the image, and by the caption."""

from dataclasses import asdict, dataclass
from typing import Literal, final

DropReason = Literal["no_caption", "caption_too_short", "caption_too_long", "too_small", "too_long_a_shape", "duplicate", "unreadable"]

# as a line for people says it: "12 too small"
DROP_WORDS: dict[str, str] = {
    "no_caption": "without a caption",
    "caption_too_short": "with too short a caption",
    "caption_too_long": "with too long a caption",
    "too_small": "too small",
    "too_long_a_shape": "too long a shape",
    "duplicate": "met before",
    "unreadable": "unreadable",
}


@final
@dataclass(frozen=True)
class Filters:
    """Rows to leave out; None and False leave out nothing.

    min_size: pixels of the shorter side as the source has it; max_aspect_ratio: longer side over shorter, at least 1;
    min_caption, max_caption: characters; a row without a caption has 0. Raises: ValueError for values that nothing can meet.
    """

    min_size: int | None = None
    max_aspect_ratio: float | None = None
    min_caption: int | None = None
    max_caption: int | None = None
    require_caption: bool = False

    def __post_init__(self) -> None:
        for name in ("min_size", "max_aspect_ratio"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.min_caption is not None and self.max_caption is not None and self.min_caption > self.max_caption:
            raise ValueError(f"min_caption={self.min_caption} is more than max_caption={self.max_caption}; no caption can have both")

    def caption_reason(self, caption: str | None) -> DropReason | None:
        """Why a row with this caption is left out, None where it is not."""
        length = len(caption or "")
        if self.require_caption and not (caption or "").strip():
            return "no_caption"
        if self.min_caption is not None and length < self.min_caption:
            return "caption_too_short"
        if self.max_caption is not None and length > self.max_caption:
            return "caption_too_long"
        return None

    def size_reason(self, width: int, height: int) -> DropReason | None:
        """Why a row with an image of so many pixels is left out, None where it is not."""
        shorter, longer = sorted((width, height))
        if self.min_size is not None and shorter < self.min_size:
            return "too_small"
        if self.max_aspect_ratio is not None and longer > self.max_aspect_ratio * shorter:
            return "too_long_a_shape"
        return None

    def to_json(self) -> dict[str, object]:
        """Those that leave out something."""
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False}
