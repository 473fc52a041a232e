"""The command line of `halfstep shards`. As in __main__, each command imports what it needs when it runs."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.arguments import end, existing

shards = typer.Typer(name="shards", help="Make, check and describe shards: plain WebDataset tars with an index.", no_args_is_help=True)


@shards.command("pack")
def shards_pack(
    source: Annotated[Literal["faces", "folder"], typer.Option(help="faces: drawn here; folder: your own images.")],
    out: Annotated[Path, typer.Option(metavar="OUT", help="The new directory of shards.")],
    directory: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="With --source folder: the images, captions as .txt.")] = None,
    style: Annotated[str, typer.Option(metavar="NAME", help="Style of the faces.")] = "open-peeps",
    count: Annotated[int, typer.Option(min=1, metavar="N", help="Number of faces.")] = 6000,
    start: Annotated[int, typer.Option(min=0, metavar="I", help="First face; another start gives other faces, held out of these.")] = 0,
    size: Annotated[int, typer.Option(min=1, metavar="PIXELS", help="Width and height; images are cropped to a square.")] = 32,
    seed: Annotated[int, typer.Option(min=0, metavar="S", help="Seed of the faces and of their order.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help="Processes. Default: one per core.")] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, metavar="N", help="Images per tar.")] = 1000,
    licence: Annotated[str, typer.Option(metavar="TEXT", help="With --source folder: the licence of your images.")] = "not stated",
    allow_attribution: Annotated[
        bool, typer.Option("--allow-attribution", help="Permit styles whose artist must be named (CC BY 4.0).")
    ] = False,
) -> None:
    """Pack images into shuffled tars with an index; the same input and seed give the same bytes.

    Example:  halfstep shards pack --source faces --style open-peeps --count 6000 --size 32 --out shards/faces

    Example:  halfstep shards pack --source folder my-images --size 64 --out shards/mine"""
    from launch.shards import pack_source

    if source == "folder":
        if directory is None:
            raise ValueError("--source folder wants the folder of images: halfstep shards pack --source folder DIR --out OUT")
        from data_shards.folder import FolderSource

        images = FolderSource.scan(directory, licence=licence)
    else:
        if directory is not None:
            raise ValueError(f"--source faces draws its images and reads no folder, got {directory}; did you mean --source folder?")
        from data_shards.faces import FacesSource

        images = FacesSource(style=style, count=count, seed=seed, start=start, allow_attribution=allow_attribution)
    line = pack_source(images, out, size=size, seed=seed, workers=workers or os.cpu_count() or 1, samples_per_shard=samples_per_shard)
    sys.stdout.write(f"{line}\nuse it:  halfstep train RECIPE data.shards={out}\n")


@shards.command("verify")
def shards_verify(directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory of shards.")]) -> None:
    """Read every byte of shards and name what is damaged; exit code 2 if anything is.

    Example:  halfstep shards verify shards/faces"""
    from launch.shards import verify_shards

    end(verify_shards(existing(directory)))


@shards.command("info")
def shards_info(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory of shards.")],
    sheet: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Write a contact sheet too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """What shards hold: counts, sizes, licence, how they were made.

    Example:  halfstep shards info shards/faces --sheet faces.png"""
    from launch.shards import describe_shards

    describe_shards(existing(directory), sheet=sheet, as_json=as_json)


@shards.command("index")
def shards_index(
    tars: Annotated[
        list[str], typer.Argument(metavar="TAR...", help="Tars, folders of them, URLs (http, hf, s3, gs, az), or patterns with {000..099}.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where index.json is written; the tars stay where they are.")],
    licence: Annotated[str, typer.Option(metavar="TEXT", help="The licence of the images.")] = "not stated",
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help="Tars read at a time. Default: one per core.")] = None,
) -> None:
    """Index WebDataset tars that others wrote, so that runs can use them where they lie; each is read once and none is changed.

    Tars that are damaged or hold links, devices or paths out of their folder are refused by name. The same command again goes on.

    Example:  halfstep shards index "data/shard-{000000..000099}.tar" --out shards/mine --licence CC-BY-4.0"""
    from launch.shards_index import index_shards

    line = index_shards(tars, out, licence=licence, workers=workers or os.cpu_count() or 1)
    sys.stdout.write(f"{line}\nuse it:  halfstep train RECIPE data.shards={out}\n")
