"""The command line of `halfstep shards pack`."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

_HUB, _FACES, _CHOICE, _IMAGES = "Data sets of the Hub, and Parquet", "Faces", "Which rows", "Images"


def shards_pack(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="[DIR | FILE... | OWNER/NAME | RECIPE]", help="What to pack, by --source; or a recipe.")
    ] = None,
    source: Annotated[
        Literal["faces", "folder", "parquet", "tar", "hub"] | None,
        typer.Option(help="faces: drawn here; folder: your images; tar: WebDataset tars; hub: the Hugging Face Hub."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(metavar="NAME", help="A data set's recipe, shipped (cifar10) or a YAML file.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="OUT", help="The new directory of shards. Of a recipe: shards/NAME.")] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="PIXELS|own", help="Width and height of squares; own: each its own size and shape.", rich_help_panel=_IMAGES),
    ] = None,
    max_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="PIXELS", help="With --size own: at most so many on the shorter side.", rich_help_panel=_IMAGES),
    ] = None,
    crop: Annotated[Literal["centre", "none"] | None, typer.Option(help="To the central square, or not.", rich_help_panel=_IMAGES)] = None,
    image_format: Annotated[
        Literal["png", "webp", "jpg", "keep"] | None,
        typer.Option(help="png, webp: without loss; jpg: quality 95; keep: files as they are. Default: png.", rich_help_panel=_IMAGES),
    ] = None,
    repo_split: Annotated[str | None, typer.Option("--split", metavar="NAME", help="Default: train.", rich_help_panel=_HUB)] = None,
    config: Annotated[str | None, typer.Option(metavar="NAME", help="One of the data set's configs.", rich_help_panel=_HUB)] = None,
    revision: Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit.", rich_help_panel=_HUB)] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read over the network, store no copy.", rich_help_panel=_HUB)] = False,
    image_column: Annotated[str | None, typer.Option(metavar="NAME", help="Column of the images.", rich_help_panel=_HUB)] = None,
    text_column: Annotated[
        str | None, typer.Option(metavar="NAME", help='Column of the captions; "" for none.', rich_help_panel=_HUB)
    ] = None,
    min_size: Annotated[int | None, typer.Option(min=1, metavar="PIXELS", help="Shorter side, at least.", rich_help_panel=_CHOICE)] = None,
    max_aspect_ratio: Annotated[
        float | None, typer.Option(min=1, metavar="X", help="Longer side over shorter, at most.", rich_help_panel=_CHOICE)
    ] = None,
    min_caption: Annotated[int | None, typer.Option(min=1, metavar="N", help="Characters, at least.", rich_help_panel=_CHOICE)] = None,
    max_caption: Annotated[int | None, typer.Option(min=1, metavar="N", help="Characters, at most.", rich_help_panel=_CHOICE)] = None,
    require_caption: Annotated[
        bool, typer.Option("--require-caption", help="Leave out images without one.", rich_help_panel=_CHOICE)
    ] = False,
    dedupe: Annotated[
        Literal["off", "bytes", "pixels"] | None,
        typer.Option(help="Leave out images met before: the same file, or the same pixels as packed.", rich_help_panel=_CHOICE),
    ] = None,
    first_rows: Annotated[int | None, typer.Option(min=1, metavar="N", help="Read only so many.", rich_help_panel=_CHOICE)] = None,
    on_bad_row: Annotated[
        Literal["stop", "skip"] | None, typer.Option(help="Name rows that can't be packed, or leave them out.", rich_help_panel=_CHOICE)
    ] = None,
    style: Annotated[str | None, typer.Option(metavar="NAME", help="Default: open-peeps.", rich_help_panel=_FACES)] = None,
    count: Annotated[int | None, typer.Option(min=1, metavar="N", help="Number of faces. Default: 6000.", rich_help_panel=_FACES)] = None,
    start: Annotated[
        int | None, typer.Option(min=0, metavar="I", help="First face; another start gives others, held out.", rich_help_panel=_FACES)
    ] = None,
    allow_attribution: Annotated[
        bool, typer.Option("--allow-attribution", help="Permit styles whose artist must be named (CC BY 4.0).", rich_help_panel=_FACES)
    ] = False,
    licence: Annotated[str | None, typer.Option(metavar="TEXT", help="Of your own images, for the index.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="S", help="Seed of the order, and of faces. Default: 0.")] = None,
    samples_per_shard: Annotated[int | None, typer.Option(min=1, metavar="N", help="Images per tar. Default: 1000.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help="Processes. Default: one per core.")] = None,
) -> None:
    """Pack images into shuffled tars with an index; the same input and seed give the same bytes. Started again, it goes on.

    Example:  halfstep shards pack --source faces --style open-peeps --count 6000 --size 32 --out shards/faces

    Example:  halfstep shards pack --source folder my-images --size 64 --out shards/mine

    Example:  halfstep shards pack --source hub Norod78/cartoon-blip-captions --size 512 --image-format jpg --out shards/cartoons

    Example:  halfstep shards pack --source tar "data/{000..099}.tar" --size own --max-size 512 --image-format keep --out shards/web

    Example:  halfstep shards pack cifar10"""
    from launch.shards.actions import pack_rows
    from launch.shards.pack_recipe import is_recipe, pack_recipe
    from launch.shards.pack_source import open_source

    words = list(files or [])
    if source is None and recipe is None and len(words) == 1 and is_recipe(words[0]):
        recipe = words.pop()
    if source is None and recipe is None:
        raise ValueError("wanted --source faces, folder, parquet, tar or hub, or a data set's recipe: halfstep shards pack cifar10")
    if size is not None and size != "own" and not (size.isascii() and size.isdigit()):
        raise ValueError(f"--size {size}: wanted pixels such as 256, or own")
    given: dict[str, object] = {
        "source": source,
        "repo": words.pop(0) if source == "hub" and words else None,
        "split": repo_split,
        "config": config,
        "revision": revision,
        "streaming": streaming or None,
        "image_column": image_column,
        "text_column": text_column,
        "style": style,
        "count": count,
        "start": start,
        "allow_attribution": allow_attribution or None,
        "licence": licence,
        "size": size if size is None or size == "own" else int(size),
        "max_size": max_size,
        "crop": crop,
        "image_format": image_format,
        "min_size": min_size,
        "max_aspect_ratio": max_aspect_ratio,
        "min_caption": min_caption,
        "max_caption": max_caption,
        "require_caption": require_caption or None,
        "dedupe": dedupe,
        "first_rows": first_rows,
        "on_bad_row": on_bad_row,
        "seed": seed,
        "samples_per_shard": samples_per_shard,
    }
    wanted = pack_recipe(recipe, {name: value for name, value in given.items() if value is not None})
    if out is None and recipe is None:
        raise ValueError("--out OUT is missing: the new directory of shards")
    out = out or Path("shards") / Path(recipe or "").stem
    line = pack_rows(open_source(wanted, words), out, wanted, workers=workers or os.cpu_count() or 1)
    sys.stdout.write(f"{line}\nuse it:  halfstep train RECIPE data.shards={out}\n")
