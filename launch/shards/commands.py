"""The command line of `halfstep shards`. As in __main__, each command imports what it needs when it runs."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from launch.arguments import end, existing
from launch.shards.derive_commands import shards_caption, shards_draw, shards_encode
from launch.shards.pack_command import shards_pack

shards = typer.Typer(name="shards", help="Make, check and describe shards: plain WebDataset tars with an index.", no_args_is_help=True)
shards.command("pack")(shards_pack)
shards.command("caption")(shards_caption)
shards.command("encode")(shards_encode)
shards.command("draw")(shards_draw)


@shards.command("verify")
def shards_verify(directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory of shards.")]) -> None:
    """Read every byte of shards and name what is damaged; exit code 2 if anything is.

    Example:  halfstep shards verify shards/faces"""
    from launch.shards.actions import verify_shards

    end(verify_shards(existing(directory)))


@shards.command("info")
def shards_info(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory of shards.")],
    sheet: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Write a contact sheet too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """What shards hold: counts, sizes, licence, how they were made.

    Example:  halfstep shards info shards/faces --sheet faces.png"""
    from launch.shards.actions import describe_shards

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
    from launch.shards.index import index_shards

    line = index_shards(tars, out, licence=licence, workers=workers or os.cpu_count() or 1)
    sys.stdout.write(f"{line}\nuse it:  halfstep train RECIPE data.shards={out}\n")


@shards.command("bench")
def shards_bench(
    directory: Annotated[Path, typer.Argument(metavar="SHARDS", help="A directory of shards; remote ones are fetched for a try.")],
    image_size: Annotated[
        int | None, typer.Option(min=1, max=8192, metavar="N", help="Scale to so many pixels, as data.image_size does.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, metavar="B", help="Images a micro-batch. Default: 16.")] = None,
    workers: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of reading processes to try.")] = "0,1,2,4",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Find in about 15 seconds what bounds reading on this machine, and how many data.workers pay.

    Example:  halfstep shards bench shards/faces --batch-size 32"""
    from launch.shards.bench import bench_shards, worker_counts

    counts = worker_counts(workers)
    bench_shards(existing(directory), image_size=image_size, batch_size=batch_size, workers=counts, as_json=as_json)
