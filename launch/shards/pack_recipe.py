"""What a pack is asked for: one checked set of options, from a recipe of a data set, from the command line, or both."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from trainer.config_io import config_path, load_config, shipped
from trainer.config_sections import Count, CountOrZero, Problem, Section

FOLDER = "data"  # of configs/, where the shipped recipes lie
SourceKind = Literal["faces", "folder", "parquet", "tar", "hub"]
Ratio = Annotated[float, Field(ge=1)]
# options that only some sources have
_OWN_OPTIONS: Mapping[str, tuple[SourceKind, ...]] = {
    "style": ("faces",),
    "count": ("faces",),
    "start": ("faces",),
    "allow_attribution": ("faces",),
    "repo": ("hub",),
    "split": ("hub",),
    "config": ("hub",),
    "revision": ("hub",),
    "streaming": ("hub",),
    "image_column": ("hub", "parquet"),
    "text_column": ("hub", "parquet"),
    "licence": ("folder", "parquet", "tar"),
}


class PackRecipe(Section):
    """How a data set becomes shards."""

    source: SourceKind
    """faces, folder, parquet, tar or hub; the files of a folder, parquet or tar stand on the command line."""
    repo: str | None = None
    """hub: OWNER/NAME of the data set."""
    split: str | None = None
    """hub: train unless it says otherwise."""
    config: str | None = None
    """hub: one of the data set's configs, where it has several."""
    revision: str | None = None
    """hub: a branch, tag or commit; the commit that it stands for is written into the index."""
    streaming: bool = False
    """hub: read rows over the network while packing, and store no copy of the data set."""
    image_column: str | None = None
    """hub, parquet: the column of the images; chosen where only one fits."""
    text_column: str | None = None
    """hub, parquet: the column of the captions; chosen where only one fits, none if ""."""
    style: str | None = None
    """faces: DiceBear style; open-peeps unless it says otherwise."""
    count: Count | None = None
    """faces: how many; 6000 unless it says otherwise."""
    start: CountOrZero | None = None
    """faces: number of the first one."""
    allow_attribution: bool = False
    """faces: permit a style whose artist must be named."""
    licence: str | None = None
    """folder, parquet, tar: the licence of the images; of a Hub data set its card says it."""
    size: Count | Literal["own"] | None = None
    """Width and height in pixels; own keeps each image's. Of faces and folders 32 unless it says otherwise."""
    max_size: Count | None = None
    """With size own: pixels that the shorter side has at most; larger images are scaled down."""
    crop: Literal["centre", "none"] | None = None
    """centre (to the central square) or none; centre where there is a size."""
    image_format: Literal["png", "webp", "jpg", "keep"] = "png"
    """png and webp without loss, jpg at quality 95, or keep: the files as they are, metadata too, where size and crop allow it."""
    min_size: Count | None = None
    """Leave out images whose shorter side has fewer pixels."""
    max_aspect_ratio: Ratio | None = None
    """Leave out images whose longer side is more than this times the shorter."""
    min_caption: Count | None = None
    """Leave out rows whose caption has fewer characters."""
    max_caption: Count | None = None
    """Leave out rows whose caption has more characters."""
    require_caption: bool = False
    """Leave out rows without a caption."""
    dedupe: Literal["off", "bytes", "pixels"] = "off"
    """Leave out rows that an earlier one equals: in the file's bytes, or in the pixels as they are packed."""
    first_rows: Count | None = None
    """Read only so many rows."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What a row that can't be packed does: stop names up to 20 of them, skip counts them."""
    seed: CountOrZero = 0
    """Seed of the order, and of faces."""
    samples_per_shard: Count = 1000
    """Images per tar."""

    def problems(self) -> Iterator[Problem]:
        for name, sources in _OWN_OPTIONS.items():
            if getattr(self, name) not in (None, False) and self.source not in sources:
                yield Problem((name,), f"{name} is an option of the source {' or '.join(sources)}, not of {self.source}; leave it out")
        if self.source == "hub" and not self.repo:
            yield Problem(("repo",), "the source hub wants a data set: --source hub OWNER/NAME, or repo: OWNER/NAME in the recipe")
        if self.size is None and self.source not in ("faces", "folder"):
            yield Problem(("size",), f"the source {self.source} wants a size: pixels of a square such as 256, or own for each image's own")
        if self.source == "faces" and self.size == "own":
            yield Problem(("size",), "faces are drawn at the wanted size and have none of their own; give pixels such as 64")
        if self.size != "own" and self.max_size is not None:
            yield Problem(("max_size",), "max_size is for images of their own size; set size to own, or leave it out")
        if self.size != "own" and self.crop == "none":
            yield Problem(
                ("crop",), "crop none keeps the shape of images, but a size makes them square; set size to own, or crop to centre"
            )
        if self.size != "own" and self.image_format == "keep":
            yield Problem(("image_format",), "keep leaves files as they are, but a size changes them; set size to own, or png, webp or jpg")
        if self.min_caption is not None and self.max_caption is not None and self.min_caption > self.max_caption:
            yield Problem(
                ("min_caption", "max_caption"), f"no caption has {self.min_caption} characters or more and {self.max_caption} or fewer"
            )

    @property
    def pixels(self) -> int | None:
        """Side of the packed images, None for each its own."""
        return None if self.size == "own" else self.size or 32


def pack_recipe(name_or_path: str | None, given: Mapping[str, object]) -> PackRecipe:
    """A recipe with what the command line says instead of it, or the command line alone.

    Raises: ValueError naming every mistake; RecipeErrors, with lines, for those of the file."""
    try:
        if name_or_path is None:
            return PackRecipe.model_validate(given)
        recipe = load_config(PackRecipe, config_path(name_or_path, folder=FOLDER))
        return PackRecipe.model_validate({**recipe.model_dump(), **given})
    except ValidationError as error:
        raise ValueError("; ".join(_spoken(item["loc"], item["msg"]) for item in error.errors(include_url=False))) from None


def is_recipe(word: str) -> bool:
    """Whether a word of the command line means a recipe: a shipped one's name, or a YAML file."""
    return word in {file.stem for file in shipped(FOLDER)} or Path(word).suffix in (".yaml", ".yml")


def _spoken(location: tuple[int | str, ...], message: str) -> str:
    return f"--{str(location[0]).replace('_', '-')}: {message}" if location else message
