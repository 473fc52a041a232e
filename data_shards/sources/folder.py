"""A folder of images as a source of rows; beside them captions in .txt files or a metadata.jsonl, and masks in .mask.png files."""

import hashlib
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from data_shards.config import CAPTION_EXTENSION, IMAGE_FORMATS, MASK_EXTENSION, MAX_CAPTION_BYTES, MAX_IMAGE_BYTES
from data_shards.packing.fit import header_fault
from data_shards.sources.rows import Part, Row, UnreadableRow, even_parts

LISTED_PROBLEMS = 20
METADATA_NAME = "metadata.jsonl"  # as `datasets.load_dataset("imagefolder")` reads it
METADATA_FILE, METADATA_TEXTS = "file_name", ("text", "caption")


@final
@dataclass(frozen=True)
class FolderSource:
    """Every image below a folder in the order of its path; names the licence as the user states it.

    texts: captions by file, from the folder's metadata.jsonl; a .txt beside an image goes before. masks: by image file, what stands
    beside it as NAME.mask.png, with its size in bytes; one beside no image is an image.
    """

    folder: Path
    files: tuple[str, ...]
    sizes_bytes: tuple[int, ...]
    licence_name: str = "not stated"
    texts: Mapping[str, str] = field(default_factory=dict)
    masks: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    @classmethod
    def scan(cls, folder: str | Path, *, licence: str = "not stated", skip_bad: bool = False) -> "FolderSource":
        """Lists the folder and reads every image's header, so that a bad file is known before hours of packing.

        skip_bad: bad files become unreadable rows. Raises: ValueError that lists every file whose header, size or caption can't be
        used, and if there is no image at all.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give --source folder DIR")
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_FORMATS and path.is_file())
        if not found:
            raise ValueError(f"{folder} holds no image; wanted files ending in {', '.join('.' + name for name in IMAGE_FORMATS)}")
        problems = [] if skip_bad else [f"{path}: {problem}" for path in found if (problem := _problem(path)) is not None]
        if problems:
            more = f"\n... and {len(problems) - LISTED_PROBLEMS} more" if len(problems) > LISTED_PROBLEMS else ""
            raise ValueError(
                f"{len(problems)} of {len(found)} images can't be packed; mend or remove them, or go on without such (--on-bad-row skip):\n"
                + "\n".join(problems[:LISTED_PROBLEMS])
                + more
            )
        masks = _masks(found)
        images = [path for path in found if path not in set(masks.values())]
        names = {path: path.relative_to(folder).as_posix() for path in found}
        sizes = {path: path.stat().st_size for path in found}
        texts = {file: text for metadata in sorted(folder.rglob(METADATA_NAME)) for file, text in _metadata(metadata, folder)}
        return cls(
            folder,
            tuple(names[path] for path in images),
            tuple(sizes[path] for path in images),
            licence,
            texts,
            {names[image]: (names[mask], sizes[mask]) for image, mask in masks.items()},
        )

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.files)

    def describe(self) -> dict[str, object]:
        """The folder's last name, and a hash of its file names and sizes; where it lies is not told."""
        listing = "\n".join(f"{name}\t{size}" for name, size in zip(self.files, self.sizes_bytes, strict=True))
        digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
        texts = hashlib.sha256(json.dumps(self.texts, sort_keys=True).encode()).hexdigest()
        stated = {"kind": "folder", "name": self.folder.resolve().name, "count": self.count, "listing_sha256": digest}
        if self.masks:
            stated["masks_sha256"] = hashlib.sha256(json.dumps(self.masks, sort_keys=True).encode()).hexdigest()
        return {**stated, "metadata_sha256": texts} if self.texts else stated

    def licence(self) -> dict[str, object]:
        """What the user stated."""
        return stated_licence(self.licence_name)

    def parts(self, rows: int) -> Sequence[Part]:
        """All images, in order, as parts of `rows` images."""
        return even_parts(self.count, rows)

    def read(self, part: Part, size: int | None) -> Iterator[Row | UnreadableRow]:
        """The files of a part and their captions, without surrounding white space."""
        del size
        assert part.count is not None, "parts() says how many files a part has"
        for number in range(part.first, part.first + part.count):
            path, key = self.folder / self.files[number], f"{number:08d}"
            try:
                content = _content(path)
                caption = _caption(path)
                mask = _content(self.folder / self.masks[self.files[number]][0]) if self.files[number] in self.masks else None
            except (OSError, ValueError) as error:
                yield UnreadableRow(key, str(error), str(path))
                continue
            if caption is None:
                caption = self.texts.get(self.files[number])
            yield Row(key, content, caption, extra={"file": self.files[number]}, where=str(path), mask=mask)


def stated_licence(name: str) -> dict[str, object]:
    """The licence entry of an index where all that is known is what the user says."""
    return {"name": name, "url": None, "creators": [], "attribution_required": None, "text": None}


def _masks(found: Sequence[Path]) -> dict[Path, Path]:
    """The mask of each image that has one: `cat.mask.png` beside `cat.jpg`."""
    ending = f".{MASK_EXTENSION}"
    masks = {path.with_name(path.name[: -len(ending)]): path for path in found if path.name.lower().endswith(ending)}
    return {path: masks[path.with_suffix("")] for path in found if path.with_suffix("") in masks}


def _content(path: Path) -> bytes:
    size_bytes = path.stat().st_size
    if size_bytes > MAX_IMAGE_BYTES:
        raise ValueError(f"{size_bytes} bytes, at most {MAX_IMAGE_BYTES} are allowed")
    return path.read_bytes()


def _problem(path: Path) -> str | None:
    """Why a file can't be packed, from its size, header and caption alone."""
    try:
        _caption(path)
        return header_fault(path)
    except (OSError, ValueError) as error:
        return str(error)


def _caption(image_path: Path) -> str | None:
    """Text of the .txt file beside an image, without surrounding white space; None if there is none."""
    path = image_path.with_suffix(f".{CAPTION_EXTENSION}")
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_CAPTION_BYTES:
        raise ValueError(f"its caption {path.name} is longer than {MAX_CAPTION_BYTES} bytes")
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"its caption {path.name} is not UTF-8 ({error.reason} at byte {error.start})") from None


def _metadata(path: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """File, relative to the source's folder, and caption of each line of a metadata.jsonl.

    Raises: ValueError naming the line that is not an object with a file name and a text.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}; mend the line") from None
            name = entry.get(METADATA_FILE) if isinstance(entry, dict) else None
            if not isinstance(name, str):
                raise ValueError(f'{path}:{number}: no {METADATA_FILE}; wanted {{"{METADATA_FILE}": "a.png", "text": "..."}}')
            text = next((entry[key] for key in METADATA_TEXTS if isinstance(entry.get(key), str)), None)
            if text is not None:
                yield posixpath.normpath(posixpath.join(path.parent.relative_to(folder).as_posix(), name)), text.strip()
