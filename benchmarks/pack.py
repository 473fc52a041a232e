"""Images a second of our pack against a plain loop over webdataset's ShardWriter with the same Pillow work; one JSON object a line."""

import argparse
import io
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from measure import print_ratio
from PIL import Image, ImageOps

from data_shards.images import encode_image
from data_shards.packing.pack import pack
from data_shards.sources.folder import FolderSource

SIZE = 256
SAMPLES_PER_SHARD = 500
DRAFT_FACTOR = 3


def main() -> None:
    """Draws photographs, then packs them both ways by turns, with one process and with two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer images and repeats, under a minute")
    parser.add_argument("--repeats", type=int, help="repeats to take (3 with --quick, else 9)")
    options = parser.parse_args()
    images, repeats = (160, 3) if options.quick else (800, 9)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw(root / "photos", images)
        for workers in (1, 2):
            compare(root, workers=workers, repeats=options.repeats or repeats, images=images)


def draw(folder: Path, images: int) -> None:
    """JPEGs of 1024 x 768 with captions, as smooth and as rough as photographs: about 120 kB each."""
    folder.mkdir()
    drawn = random.Random(0)
    for number in range(images):
        coarse = Image.frombytes("RGB", (32, 24), drawn.randbytes(32 * 24 * 3)).resize((1024, 768), Image.Resampling.BICUBIC)
        fine = Image.frombytes("RGB", (512, 384), drawn.randbytes(512 * 384 * 3)).resize((1024, 768), Image.Resampling.BICUBIC)
        Image.blend(coarse, fine, 0.12).save(folder / f"{number:06d}.jpg", quality=85)
        (folder / f"{number:06d}.txt").write_text(f"photograph {number}", encoding="utf-8")


def compare(root: Path, *, workers: int, repeats: int, images: int) -> None:
    """Print a line; each repeat packs both ways, which goes first alternates."""
    ways: dict[str, Callable[[Path], None]] = {
        "ours": lambda out: our_pack(root / "photos", out, workers),
        "webdataset": lambda out: their_pack(root / "photos", out, workers),
    }
    taken: list[dict[str, float]] = []
    for repeat in range(repeats + 1):
        seconds: dict[str, float] = {}
        for name in sorted(ways, reverse=repeat % 2 == 1):
            with tempfile.TemporaryDirectory(dir=root) as out:
                start = time.perf_counter()
                ways[name](Path(out) / "shards")
                seconds[name] = time.perf_counter() - start
        taken.append(seconds)
    taken = taken[1:]  # the first one warms caches
    ratios = [seconds["webdataset"] / seconds["ours"] for seconds in taken]
    ours, theirs = (images / statistics.median(seconds[name] for seconds in taken) for name in ("ours", "webdataset"))
    against = f"webdataset {version('webdataset')} ShardWriter, same Pillow work, no shuffle, no index"
    print_ratio(f"pack_{workers}_workers", ratios, against=against, images_per_second=ours, images_per_second_against=theirs)


def our_pack(photos: Path, out: Path, workers: int) -> None:
    """Header checks, pieces, shuffled shards with hashes, index."""
    pack(FolderSource.scan(photos), out, size=SIZE, image_format="jpg", samples_per_shard=SAMPLES_PER_SHARD, workers=workers, part_rows=64)


def their_pack(photos: Path, out: Path, workers: int) -> None:
    """A loop that writes as it reads; with more workers each takes every n-th file and writes shards of its own."""
    out.mkdir()
    files = sorted(photos.glob("*.jpg"))
    if workers == 1:
        write(files, str(out / "shard-%06d.tar"))
        return
    context = multiprocessing.get_context("spawn")
    tasks = [context.Process(target=write, args=(files[rank::workers], str(out / f"shard-{rank}-%06d.tar"))) for rank in range(workers)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
        assert task.exitcode == 0, "a process of the baseline failed"


def write(files: list[Path], pattern: str) -> None:
    """The usual script."""
    from webdataset.writer import ShardWriter

    with ShardWriter(pattern, maxcount=SAMPLES_PER_SHARD, verbose=0) as writer:
        for path in files:
            caption = path.with_suffix(".txt").read_text(encoding="utf-8")
            writer.write({"__key__": path.stem, "jpg": squared(path.read_bytes()), "txt": caption, "json": {"caption": caption}})


def squared(content: bytes) -> bytes:
    """The central square of an image as a JPEG, by the calls that we make too."""
    with Image.open(io.BytesIO(content)) as image:
        image.draft("RGB", (DRAFT_FACTOR * SIZE, DRAFT_FACTOR * SIZE))
        upright = ImageOps.exif_transpose(image)
        side = min(upright.size)
        left, top = (upright.width - side) // 2, (upright.height - side) // 2
        square = upright.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return encode_image(square, "jpg")


if __name__ == "__main__":
    main()
