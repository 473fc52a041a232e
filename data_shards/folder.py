"""A folder of images, with optional captions in .txt files beside them, as a source of samples."""

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import final

from PIL import Image, ImageOps, UnidentifiedImageError

from data_shards.colours import rgb
from data_shards.config import CAPTION_EXTENSION, DEFAULT_BACKGROUND, IMAGE_FORMATS, MAX_CAPTION_BYTES, MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from data_shards.images import IMAGE_ERRORS
from data_shards.source import SourceSample

LISTED_PROBLEMS = 20


@final
@dataclass(frozen=True)
class FolderSource:
    """Every image below a folder in the order of its path; names the licence as the user states it.

    Raises: ValueError that lists every file whose header, size or caption can't be used, and if there is no image at all.
    """

    folder: Path
    files: tuple[str, ...]
    sizes_bytes: tuple[int, ...]
    licence_name: str = "not stated"

    @classmethod
    def scan(cls, folder: str | Path, *, licence: str = "not stated") -> "FolderSource":
        """Lists the folder and reads every image's header, so that a bad file is known before hours of packing."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give --source folder DIR")
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_FORMATS and path.is_file())
        if not found:
            raise ValueError(f"{folder} holds no image; wanted files ending in {', '.join('.' + name for name in IMAGE_FORMATS)}")
        problems = [f"{path}: {problem}" for path in found if (problem := _problem(path)) is not None]
        if problems:
            more = f"\n... and {len(problems) - LISTED_PROBLEMS} more" if len(problems) > LISTED_PROBLEMS else ""
            raise ValueError(
                f"{len(problems)} of {len(found)} images can't be packed; mend or remove them:\n"
                + "\n".join(problems[:LISTED_PROBLEMS])
                + more
            )
        names = tuple(path.relative_to(folder).as_posix() for path in found)
        return cls(folder, names, tuple(path.stat().st_size for path in found), licence)

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.files)

    def describe(self) -> dict[str, object]:
        """The folder's last name, and a hash of its file names and sizes; where it lies is not told."""
        listing = "\n".join(f"{name}\t{size}" for name, size in zip(self.files, self.sizes_bytes, strict=True))
        digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
        return {"kind": "folder", "name": self.folder.resolve().name, "count": self.count, "listing_sha256": digest}

    def licence(self) -> dict[str, object]:
        """What the user stated."""
        return {"name": self.licence_name, "url": None, "creators": [], "attribution_required": None, "text": None}

    def sample(self, number: int, size: int) -> SourceSample:
        """Image `number`: upright, its central square, resized to `size` pixels.

        Raises: ValueError naming the file if it can't be decoded.
        """
        path = self.folder / self.files[number]
        try:
            image = square_image(path, size)
        except IMAGE_ERRORS as error:
            raise ValueError(f"{path}: can't be decoded ({error}); mend or remove it") from None
        caption = _caption(path)
        return SourceSample(key=f"{number:08d}", image=image, caption=caption, extra={"file": self.files[number]})


def square_image(path: Path, size: int) -> Image.Image:
    """The central square of an image file, upright, on white where it is transparent, as size x size RGB."""
    with _open(path) as image:
        # JPEG decodes at a fraction of its size; 3 x leaves Lanczos enough to work on
        image.draft("RGB", (3 * size, 3 * size))
        upright = ImageOps.exif_transpose(image)
        if upright.mode != "RGB":
            drawn = upright.convert("RGBA")
            upright = Image.new("RGB", drawn.size, rgb(DEFAULT_BACKGROUND))
            upright.paste(drawn, mask=drawn)
        side = min(upright.size)
        left, top = (upright.width - side) // 2, (upright.height - side) // 2
        square = upright.crop((left, top, left + side, top + side))
        return square.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)


def _open(path: Path) -> Image.Image:
    """Opens an image's header under our limits; Pillow's warning of a bomb is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(path, formats=_formats())
    if image.width * image.height > MAX_IMAGE_PIXELS:
        image.close()
        raise ValueError(f"{image.width} x {image.height} pixels, at most {MAX_IMAGE_PIXELS} are allowed")
    return image


def _formats() -> list[str]:
    return sorted(set(IMAGE_FORMATS.values()))


def _problem(path: Path) -> str | None:
    """Why a file can't be packed, from its size, header and caption alone."""
    size_bytes = path.stat().st_size
    if size_bytes > MAX_IMAGE_BYTES:
        return f"{size_bytes} bytes, at most {MAX_IMAGE_BYTES} are allowed"
    try:
        _open(path).close()
        _caption(path)
    except UnidentifiedImageError:
        return "not a JPEG, PNG or WebP image"
    except (Image.DecompressionBombWarning, *IMAGE_ERRORS) as error:
        return str(error)
    return None


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
