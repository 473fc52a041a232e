"""`halfstep shards`: packs, checks and describes shards, with progress and in plain words."""

import json
import sys
from pathlib import Path

from data_shards.index import ShardIndex
from data_shards.sources.rows import RowSource
from launch.progress import pack_progress, pass_progress
from launch.shards.pack_recipe import PackRecipe

_SHOWN_PROBLEMS = 50
_SHOWN_VALUES = 6
DAMAGED = 2


def pack_source(source: RowSource, out: Path, *, size: int, seed: int, workers: int, samples_per_shard: int) -> str:
    """Pack a source's images into OUT, shards that are there already being kept; returns a line that says what is there now.

    Raises: ValueError if an image cannot be read, or OUT holds another pack."""
    from data_shards.packing.pack import READING, WRITING, pack

    with pass_progress(_titles(source, READING, WRITING)) as progress:
        index = pack(source, out, size=size, samples_per_shard=samples_per_shard, seed=seed, workers=workers, progress=progress)
    return _headline(index)


def pack_rows(source: RowSource, out: Path, recipe: PackRecipe, *, workers: int) -> str:
    """The same with all that a recipe may ask for; the line also says what was left out, and why.

    Raises: ValueError as data_shards.packing.pack.pack."""
    from data_shards.packing.filters import DROP_WORDS, Filters
    from data_shards.packing.pack import READING, WRITING, pack

    with pass_progress(_titles(source, READING, WRITING)) as progress:
        index = pack(
            source,
            out,
            size=recipe.pixels,
            samples_per_shard=recipe.samples_per_shard,
            seed=recipe.seed,
            image_format=recipe.image_format,
            crop=recipe.crop,
            max_size=recipe.max_size,
            filters=Filters(recipe.min_size, recipe.max_aspect_ratio, recipe.min_caption, recipe.max_caption, recipe.require_caption),
            dedupe=recipe.dedupe,
            first_rows=recipe.first_rows,
            skip_bad_rows=recipe.on_bad_row == "skip",
            workers=workers,
            progress=progress,
        )
    dropped = index.pack.get("dropped")
    counts = dropped if isinstance(dropped, dict) else {}
    left_out = f"; left out {', '.join(f'{count} {DROP_WORDS.get(reason, reason)}' for reason, count in counts.items())}" if counts else ""
    return _headline(index) + left_out


def _titles(source: RowSource, reading: str, writing: str) -> dict[str, str]:
    counted = "rows" if source.count is None else f"{source.count} images"
    return {reading: f"packing {counted}", writing: "writing the shards"}


def verify_shards(directory: Path) -> int:
    """Check every byte of shards and write each problem on a line; the exit code says whether there is one."""
    from data_shards.tars.verify import verify

    with pack_progress("verifying shards") as progress:
        problems = verify(directory, progress=progress)
    for problem in problems[:_SHOWN_PROBLEMS]:
        sys.stderr.write(f"{problem}\n")
    if len(problems) > _SHOWN_PROBLEMS:
        sys.stderr.write(f"... and {len(problems) - _SHOWN_PROBLEMS} more\n")
    if problems:
        sys.stderr.write(f"{directory}: {len(problems)} problem{'s' if len(problems) > 1 else ''}\n")
        return DAMAGED
    sys.stdout.write(f"{_headline(ShardIndex.load(directory))}: every byte is as it was packed\n")
    return 0


def describe_shards(directory: Path, *, sheet: Path | None, as_json: bool) -> None:
    """Write what shards hold, and their contact sheet where asked to.

    Raises: ValueError if there is no valid index, or an image of the sheet is damaged."""
    from data_shards.info import attribute_counts, summary, write_contact_sheet

    index = ShardIndex.load(directory)
    if as_json:
        sys.stdout.write(json.dumps(summary(index), indent=2) + "\n")
    else:
        sys.stdout.write(f"{_headline(index)}\n")
        for name, value in (("source", index.source), ("licence", index.licence), ("pack", index.pack)):
            facts = ", ".join(f"{key} {fact}" for key, fact in value.items() if isinstance(fact, str | int | list) and fact != [])
            sys.stdout.write(f"  {name:8} {facts}\n")
        sys.stdout.write(f"  sha256   {index.sha256}\n")
        for name, counts in attribute_counts(index, limit=1000).items():
            more = f", and {len(counts) - _SHOWN_VALUES} more" if len(counts) > _SHOWN_VALUES else ""
            sys.stdout.write(f"  {name}: {', '.join(list(counts)[:_SHOWN_VALUES])}{more}\n")
    if sheet is not None:
        write_contact_sheet(index, sheet)
        sys.stderr.write(f"contact sheet: {sheet}\n")


def _headline(index: ShardIndex) -> str:
    megabytes = sum(shard.size_bytes for shard in index.shards) / 1e6
    licence = index.licence.get("name", "licence not stated")
    tars = f"{len(index.shards)} shard{'s' if len(index.shards) > 1 else ''}"
    size = "their own sizes" if index.image_size is None else f"{index.image_size} pixels"
    return f"{index.root}: {index.samples} images of {size} in {tars}, {megabytes:.1f} MB, {licence}"
