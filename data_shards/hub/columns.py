"""Which columns of a table hold the images, the captions and the labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

# image: as `datasets` marks it; record: a struct with `bytes`; texts: a list of strings; label: a number with names
Kind = Literal["image", "record", "binary", "text", "texts", "label", "other"]

IMAGE_NAMES = ("image", "img", "images", "png", "jpg", "jpeg", "webp", "picture", "image_bytes", "image_path", "file_name")
TEXT_NAMES = (
    "caption",
    "captions",
    "text",
    "texts",
    "txt",
    "prompt",
    "prompts",
    "description",
    "descriptions",
    "sentence",
    "sentences",
    "sentences_raw",
    "alt_text",
    "title",
)
NO_TEXT = ""


@final
@dataclass(frozen=True)
class Column:
    """A column as far as it matters here; label_names: of a label, by number."""

    kind: Kind
    label_names: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class Columns:
    """What is read of each row: an image, a caption where `text` is not None, and every label with its names."""

    image: str
    text: str | None
    labels: Mapping[str, tuple[str, ...]]

    @property
    def names(self) -> list[str]:
        """All of them, each once."""
        return list(dict.fromkeys([self.image, *([self.text] if self.text is not None else []), *self.labels]))


def choose_columns(found: Mapping[str, Column], *, image: str | None, text: str | None, where: str) -> Columns:
    """The columns that are named, or the only ones that fit; text="": none. where: names the table in errors.

    Raises: ValueError that lists the columns, if a named one is not there or unfit, if no image fits, or if several do.
    """
    listed = ", ".join(f"{name} ({_spoken(column)})" for name, column in found.items()) or "none"
    chosen_image = image or _only(_images(found), f"{where}: which column holds the images", "--image-column", listed)
    if chosen_image is None:
        raise ValueError(f"{where}: no column looks like images; name it with --image-column. Its columns: {listed}")
    _check(found, chosen_image, ("image", "record", "binary", "text"), f"{where}: --image-column", listed)
    named = [name for name, column in found.items() if column.kind in ("text", "texts") and name.lower() in TEXT_NAMES]
    candidates = [name for name in named if name != chosen_image]
    chosen_text = text if text is not None else _only(candidates, f"{where}: which column holds the captions", "--text-column", listed)
    if chosen_text is not None and chosen_text != NO_TEXT:
        _check(found, chosen_text, ("text", "texts"), f"{where}: --text-column", listed)
    labels = {name: column.label_names for name, column in found.items() if column.kind == "label"}
    return Columns(chosen_image, chosen_text or None, labels)


def _images(found: Mapping[str, Column]) -> Sequence[str]:
    """Candidates of the best sort that there is: marked as images, structs with bytes, or named like images."""
    for kind in ("image", "record"):
        names = [name for name, column in found.items() if column.kind == kind]
        if names:
            usual = [name for name in names if name.lower() in IMAGE_NAMES]
            return usual if len(usual) == 1 else names  # image beside mask: it is the image
    return [name for name, column in found.items() if column.kind in ("binary", "text") and name.lower() in IMAGE_NAMES]


def _only(candidates: Sequence[str], question: str, option: str, listed: str) -> str | None:
    if len(candidates) > 1:
        raise ValueError(f"{question}: {' or '.join(candidates)}? Name it with {option}. Its columns: {listed}")
    return candidates[0] if candidates else None


def _check(found: Mapping[str, Column], name: str, kinds: Sequence[Kind], option: str, listed: str) -> None:
    column = found.get(name)
    if column is None:
        raise ValueError(f"{option} {name}: there is no such column. Its columns: {listed}")
    if column.kind not in kinds:
        raise ValueError(f"{option} {name}: a column of {_spoken(column)} does not serve. Its columns: {listed}")


def _spoken(column: Column) -> str:
    if column.kind != "label":
        return {"record": "bytes", "binary": "bytes"}.get(column.kind, column.kind)
    shown = ", ".join(column.label_names[:3]) + (", ..." if len(column.label_names) > 3 else "")
    return f"label: {shown}"
