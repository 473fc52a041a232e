"""Tars and images made to do harm: each is refused or left out by name, within 256 MiB and 5 s, and nothing is run or written."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from data_shards.tars.samples import MAX_MEMBERS
from data_shards.tars.tar import end_bytes, member_bytes, padded

SECONDS = 5.0
MEBIBYTES = 256


class Finding(NamedTuple):
    """What came of one hostile file: `what` is the refusal, or what was left out and ignored."""

    refused: bool
    what: str
    seconds: float
    peak_mib: float


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def png(size: tuple[int, int] = (8, 8), chunks: bytes = b"") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    whole = file.getvalue()
    return whole[:8] + chunk(b"IHDR", struct.pack(">II", *size) + whole[24:29]) + chunks + whole[33:]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def jpeg(**how: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "JPEG", **how)
    return file.getvalue()


def saved(image_format: str, frames: int = 1) -> bytes:
    file = io.BytesIO()
    pictures = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(frames)]
    pictures[0].save(file, image_format, **({"save_all": True, "append_images": pictures[1:]} if frames > 1 else {}))
    return file.getvalue()


def header(
    name: bytes = b"evil.png",
    *,
    size: bytes = b"00000000000\0",
    kind: bytes = b"0",
    link: bytes = b"",
    prefix: bytes = b"",
    magic: bytes = b"ustar\00000",
    checksum: int | None = None,
) -> bytes:
    """A header, with the right checksum by default, whatever stands in its fields."""
    fields = (name[:100].ljust(100, b"\0"), b"0000644\0", b"0000000\0" * 2, size.ljust(12, b"\0"), b"00000000000\0", b" " * 8, kind)
    block = b"".join((*fields, link.ljust(100, b"\0"), magic, bytes(80), prefix.ljust(155, b"\0"))).ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % (sum(block) if checksum is None else checksum) + block[156:]


def data(content: bytes) -> bytes:
    return content + bytes(padded(len(content)) - len(content))


def octal(size: int) -> bytes:
    return b"%011o\0" % size


def pax(content: bytes, kind: bytes = b"x", size: int | None = None) -> bytes:
    return header(b"PaxHeaders/evil", size=octal(len(content) if size is None else size), kind=kind) + data(content)


def record(keyword: bytes, value: bytes) -> bytes:
    rest = b" " + keyword + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(b"%d" % length) + len(rest) != length:
        length += 1
    return b"%d" % length + rest


def long_name(name: bytes) -> bytes:
    return header(b"././@LongLink", size=octal(len(name)), kind=b"L", magic=b"ustar  \0") + data(name)


GOOD = member_bytes("good.png", png()) + member_bytes("good.txt", b"fine")
MEMBER = header(size=octal(4)) + data(b"evil")


def closed(*parts: bytes) -> bytes:
    """A good sample, the hostile parts, and an end."""
    written = GOOD + b"".join(parts)
    return written + end_bytes(len(written))


def named(name: str, content: bytes = b"evil") -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return closed(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"), data(content))


def sample(extension: str, content: bytes) -> bytes:
    return closed(member_bytes(f"evil.{extension}", content), member_bytes("evil.txt", b"a caption"))


def objects(path: Path, *, packed: bool) -> bytes:
    file, array = io.BytesIO(), np.array([Bomb(path.parent / "executed")], dtype=object)
    if packed:
        np.savez(file, array)
    else:
        np.save(file, array)
    return file.getvalue()


def zipped(path: Path) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("good.png", png())
    return file.getvalue()


def sparse(size: int, start: bytes = b"") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(start)
        os.truncate(path, size)

    return write


def many_members(path: Path) -> None:
    block = header(b"a.png") * 1024
    with path.open("wb") as file:
        for _ in range(MAX_MEMBERS // 1024 + 1):
            file.write(block)
        file.write(bytes(10240))


Hostile = bytes | Callable[[Path], bytes | None]
TARS: dict[str, tuple[Hostile, str]] = {
    "hard_link": (closed(header(kind=b"1", link=b"good.png")), "'evil.png' is a hard link"),
    "link": (closed(header(kind=b"2", link=b"/etc/passwd")), "'evil.png' is a symbolic link"),
    "link_up": (closed(header(b"dir", kind=b"2", link=b"../..")), "'dir' is a symbolic link"),
    "character_device": (closed(header(kind=b"3")), "a character device"),
    "block_device": (closed(header(kind=b"4")), "a block device"),
    "fifo": (closed(header(kind=b"6")), "'evil.png' is a FIFO"),
    "contiguous": (closed(header(kind=b"7")), "a contiguous file"),
    "sparse": (closed(header(kind=b"S", size=octal(0), magic=b"ustar  \0")), "'evil.png' is a sparse file"),
    "sparse_pax": (closed(pax(record(b"GNU.sparse.realsize", b"1099511627776")), MEMBER), "a sparse file"),
    "label": (closed(header(kind=b"V")), "a volume's label"),
    "volume": (closed(header(kind=b"M")), "several volumes"),
    "unknown_type": (closed(header(kind=b"Z")), "of type b'Z'"),
    "folder_with_data": (closed(header(kind=b"5", size=octal(4)), data(b"evil")), "a folder with data"),
    "gzip": (gzip.compress(closed()), "it is gzip, not tar: unpack it with gzip -d"),
    "gzip_bomb": (gzip.compress(bytes(10**8)), "it is gzip"),
    "bzip2": (bz2.compress(closed()), "it is bzip2"),
    "xz": (lzma.compress(closed()), "it is xz"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(1020), "it is zstd"),
    "zip": (zipped, "it is zip"),
    "negative_binary_size": (closed(header(size=b"\xff" * 12)), "of member 'evil.png' is not an octal number"),
    "huge_binary_size": (closed(header(size=b"\x80" + b"\xff" * 11)), "is not an octal number"),
    "negative_octal_size": (closed(header(size=b"-0000000001\0")), "is not an octal number"),
    "no_size": (closed(header(size=b"")), "is not an octal number"),
    "hidden_size": (closed(header(size=b"\00000000777\0")), "is not an octal number"),
    "huge_size": (closed(header(size=b"77777777777\0")), "'evil.png' is cut: it has 8589934591 bytes"),
    "huge_image": (sparse(2**26 + 4096, header(size=octal(2**26 + 1))), "'evil.png': 67108865 bytes, at most 67108864"),
    "pax_size_less": (closed(pax(record(b"size", b"0")), MEMBER), "'evil.png' has 0 bytes by its PAX header, 4 by its own"),
    "pax_size_more": (closed(pax(record(b"size", b"1024")), MEMBER), "has 1024 bytes by its PAX header, 4 by its own"),
    "pax_size_huge": (closed(pax(record(b"size", b"999999999999999")), MEMBER), "'evil.png' is cut"),
    "pax_size_negative": (closed(pax(record(b"size", b"-512")), MEMBER), "a PAX size '-512'"),
    "pax_size_endless": (closed(pax(record(b"size", b"9" * 5000)), MEMBER), "a PAX size '9999"),
    "pax_nul_name": (closed(pax(record(b"path", b"evil.png\0.txt")), MEMBER), "a name with NUL in it: b'evil.png"),
    "nul_name": (closed(header(b"evil.png\0.exe", size=octal(4)), data(b"evil")), "'evil.png' has bytes after the NUL"),
    "pax_64_kib_name": (closed(pax(record(b"path", b"a" * 65536)), MEMBER), "a PAX header of 65548 bytes, at most 32768"),
    "pax_2_kib_name": (closed(pax(record(b"path", b"a" * 2048 + b".png")), MEMBER), "a name of 2052 bytes"),
    "gnu_64_kib_name": (closed(long_name(b"a" * 65536 + b"\0"), MEMBER), "a GNU long name of 65537 bytes"),
    "pax_gibibyte": (sparse(2**31, header(b"x", size=octal(2**30), kind=b"x")), "a PAX header of 1073741824 bytes"),
    "pax_record_too_long": (closed(pax(b"999 path=evil.png\n"), MEMBER), "a PAX record that is not"),
    "pax_record_too_short": (closed(pax(b"4 path=evil.png\n"), MEMBER), "a PAX record that is not"),
    "pax_record_endless": (closed(pax(b"0 path=evil.png\n"), MEMBER), "a PAX record that is not"),
    "pax_path_twice": (closed(pax(record(b"path", b"a.png") + record(b"path", b"b.png")), MEMBER), "'path' that comes twice"),
    "pax_after_pax": (closed(*[pax(record(b"path", b"a.png"))] * 3, MEMBER), "a PAX header where the member should come"),
    "pax_and_gnu": (closed(pax(record(b"path", b"a.png")), long_name(b"b.png\0"), MEMBER), "'a.png' and 'b.png'"),
    "pax_alone": (closed(pax(record(b"path", b"a.png"))), "names ('a.png') is missing"),
    "global_path": (closed(pax(record(b"path", b"a.png"), b"g"), MEMBER), "a global PAX header with 'path'"),
    "global_size": (closed(pax(record(b"size", b"512"), b"g"), MEMBER), "a global PAX header with 'size'"),
    "long_link": (closed(header(kind=b"K", size=octal(4)), data(b"evil")), "the long target of a link"),
    "up": (named("../evil.png"), "'../evil.png' leads out of the folder"),
    "up_inside": (named("a/../../evil.png"), "leads out of the folder"),
    "absolute": (named("/tmp/evil.png"), "'/tmp/evil.png' leads out of the folder"),
    "prefix_up": (closed(header(b"evil.png", prefix=b"..", size=octal(4)), data(b"evil")), "'../evil.png' leads out"),
    "windows_drive": (named("C:\\evil.png"), "'C:\\\\evil.png': an unsafe name"),
    "windows_up": (named("..\\evil.png"), "ignored '..\\\\evil.png'"),
    "windows_stream": (named("a.png:evil.exe"), "ignored 'a.png:evil.exe'"),
    "not_utf_8": (closed(header(b"\xff\xfe.png", size=octal(4)), data(b"evil")), "'\\\\xff\\\\xfe.png': an unsafe name"),
    "terminal": (named("\x1b[2Jevil.png"), "'\\x1b[2Jevil.png': an unsafe name"),
    "newline": (named("a\nb.png"), "'a\\nb.png': an unsafe name"),
    "right_to_left": (named("a\u202egnp.png"), "an unsafe name"),
    "twice": (closed(member_bytes("good.png", png((9, 9)))), "a second member 'good.png'"),
    "twice_by_case": (closed(member_bytes("good.PNG", png((9, 9)))), "a second member 'good.PNG'"),
    "pickle": (lambda path: sample("pkl", pickle.dumps(Bomb(path.parent / "executed"))), "ignored 'evil.pkl'"),
    "weights": (lambda path: sample("pth", pickle.dumps(Bomb(path.parent / "executed"))), "ignored 'evil.pth'"),
    "code": (lambda path: sample("pyd", pickle.dumps(Bomb(path.parent / "executed"))), "ignored 'evil.pyd'"),
    "objects_zipped": (lambda path: sample("npz", objects(path, packed=True)), "ignored 'evil.npz'"),
    "objects": (lambda path: sample("npy", objects(path, packed=False)), "'evil.npy': the .npy holds no plain numbers"),
    "npy_header": (sample("npy", b"\x93NUMPY\2\0" + struct.pack("<I", 2**20) + b" " * 2**20), "a header of 1048576 bytes"),
    "npy_code": (sample("npy", b"\x93NUMPY\1\0" + struct.pack("<H", 118) + b"(" * 117 + b"\n"), "the .npy holds no plain numbers"),
    "npy_shape": (
        sample("npy", b"\x93NUMPY\1\0v\0" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999, 9), }".ljust(117) + b"\n"),
        "has 0 bytes of data",
    ),
    "no_checksum": (closed(header(checksum=0)), "header checksum is 0"),
    "signed_checksum": (closed(header(b"\xff.png", checksum=sum(header(b"\xff.png")) - 256)), "header checksum is"),
    "not_ustar": (closed(header(magic=bytes(8))), "not a ustar header"),
    "gnu_times": (closed(header(magic=b"ustar  \0", prefix=b"14000000000")), "GNU's times of access"),
    "unterminated": (GOOD, "without an end marker: it is cut"),
    "half_terminated": (GOOD + bytes(512), "without an end marker: it is cut"),
    "cut": (closed(MEMBER)[: len(GOOD) + 514], "'evil.png' is cut"),
    "zeros_between": (GOOD + bytes(512) + closed(), "bytes that are not zero follow the end marker"),
    "two_tars": (closed() + closed(), "bytes that are not zero follow the end marker"),
    "endless_zeros": (sparse(2**36 - 1), "68719476735 bytes follow the last member"),
    "endless_end": (sparse(2**36 - 1, closed()), "bytes follow the last member"),
    "endless": (sparse(2**42), "4398046511104 bytes, at most"),
    "endless_member": (sparse(2**40, header(b"evil.bin", size=b"77777777777\0")), "1099511627776 bytes, at most"),
    "empty": (b"", "it is cut"),
    "no_member": (bytes(10240), "no member at all"),
    "many_members": (many_members, f"'a.png' is one of more than {MAX_MEMBERS}"),
}


def itxt(content: bytes) -> bytes:
    return chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(content, 9))


def huge_jpeg() -> bytes:
    content = jpeg()
    frame = content.index(b"\xff\xc0")
    return content[: frame + 5] + struct.pack(">HH", 20_000, 20_000) + content[frame + 9 :]


def scan_bomb() -> bytes:
    content = jpeg(progressive=True)
    frame, first = content.index(b"\xff\xc2"), content.index(b"\xff\xda")
    return content[: frame + 5] + struct.pack(">HH", 8000, 8000) + content[frame + 9 : first] + content[first:-2] * 20_000 + content[-2:]


def extended_webp(flags: int, side: int) -> bytes:
    body = b"VP8X" + struct.pack("<I", 10) + bytes([flags, 0, 0, 0]) + (side - 1).to_bytes(3, "little") * 2 + saved("WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


IMAGES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "png_20000": ("png", lambda: png((20_000, 20_000)), "is 20000 x 20000 pixels"),
    "png_endless": ("png", lambda: png((2**31 - 1, 2**31 - 1)), "is 2147483647 x 2147483647 pixels"),
    "webp_16384": ("webp", lambda: extended_webp(0, 16_384), "is 16384 x 16384 pixels"),
    "webp_16777216": ("webp", lambda: extended_webp(0, 2**24), "is 16777216 x 16777216 pixels"),
    "jpeg_20000": ("jpg", huge_jpeg, "is 20000 x 20000 pixels"),
    "jpeg_scans": ("jpg", scan_bomb, "scans, at most 100 are decoded"),
    "jpeg_segments": ("jpg", lambda: b"\xff\xd8" + b"\xff\xe0\0\2" * 10**6 + jpeg()[2:], "more than 1000 segments"),
    "jpeg_cut": ("jpg", lambda: jpeg()[:-40], "the JPEG is cut"),
    "gif_animated": ("png", lambda: saved("GIF", frames=500), "is GIF, wanted PNG"),
    "png_animated": ("png", lambda: saved("PNG", frames=50), "the PNG is animated"),
    "webp_animated": ("webp", lambda: saved("WEBP", frames=50), "the WEBP is animated"),
    "png_ztxt_bomb": ("png", lambda: png(chunks=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26), 9))), "zTXt unpacks to more"),
    "png_itxt_bomb": ("png", lambda: png(chunks=itxt(bytes(2**26))), "iTXt unpacks to more"),
    "png_many_texts": ("png", lambda: png(chunks=itxt(bytes(2**20)) * 100), "texts unpack to more"),
    "png_icc_bomb": ("png", lambda: png(chunks=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**26), 9))), "iCCP unpacks to more"),
    "png_chunks": ("png", lambda: png(chunks=chunk(b"tEXt", b"a\0") * 500_000), "more than 16384 chunks"),
    "png_and_zip": ("png", lambda: png() + zipped(Path()), "bytes follow the end of the PNG"),
    "png_cut": ("png", lambda: png()[:-20], "the PNG is cut"),
    "bmp": ("png", lambda: saved("BMP"), "is BMP, wanted PNG"),
    "tiff": ("png", lambda: saved("TIFF"), "is TIFF, wanted PNG"),
    "eps": ("png", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(touch executed) run\n", "is PostScript, wanted PNG"),
    "svg": ("png", lambda: b'<?xml version="1.0"?><svg><script href="file:///etc/passwd"/></svg>', "is SVG, wanted PNG"),
    "html": ("jpg", lambda: b"<!doctype html><script>evil()</script>", "is no image, wanted JPEG"),
    "nothing": ("webp", lambda: b"", "is no image, wanted WEBP"),
}

DRIVER = """
import json, resource, sys, time
from pathlib import Path
from data_shards.tars.index_tars import tar_entry
for path in map(Path, json.load(sys.stdin)):
    start, refused, what = time.monotonic(), False, ""
    try:
        entry = tar_entry(path, "shard.tar")
        what = "; ".join([*entry.named, *(f"ignored {name}" for name in entry.examples.values())]) + f"; keys {entry.shard.keys}"
    except ValueError as error:
        refused, what = True, str(error)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(json.dumps([path.stem, refused, what, time.monotonic() - start, peak]), flush=True)
"""
# Decodes what the index would hand to a run, bound as an index's process is; the size is the one that the image itself claims.
DECODER = """
import json, resource, sys, time
from pathlib import Path
from data_shards.tars.confined import Limits, confine
from data_shards.images import DecodeError, image_pixels
path, width, height = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
content = path.read_bytes()
confine(Limits(2**28, 5, 5, 0))
try:
    image_pixels(content, path.suffix[1:], size=(width, height))
except DecodeError as error:
    print(error)
"""


def built(folder: Path) -> None:
    """Writes every hostile tar; an image lies in a tar beside a good sample."""
    for name, (hostile, _) in TARS.items():
        path = folder / f"{name}.tar"
        content = hostile if isinstance(hostile, bytes) else hostile(path)
        if content is not None:
            path.write_bytes(content)
    for name, (extension, content, _) in IMAGES.items():
        (folder / f"image_{name}.tar").write_bytes(sample(extension, content()))


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Finding]]:
    """What indexing says of each, after making sure that it changed no file and ran nothing."""
    folder = tmp_path_factory.mktemp("hostile")
    built(folder)
    (folder / "good.txt").write_text("mine")  # what a member of that name would write over
    before = {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}
    paths = json.dumps([str(path) for path in sorted(folder.glob("*.tar"))])
    run = subprocess.run([sys.executable, "-c", DRIVER], input=paths, capture_output=True, text=True, cwd=folder, timeout=300, check=True)
    assert {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")} == before
    yield {name: Finding(*rest) for name, *rest in map(json.loads, run.stdout.splitlines())}


@pytest.mark.parametrize("name", TARS)
def test_a_hostile_tar_is_refused_by_name(name: str, findings: dict[str, Finding]) -> None:
    found = findings[name]
    assert TARS[name][1] in found.what
    assert found.refused or "keys ('good'" in found.what or found.what.endswith("keys ('evil',)") or name.startswith("twice")
    assert "bug of halfstep" not in found.what
    assert found.seconds < SECONDS


@pytest.mark.parametrize("name", IMAGES)
def test_a_hostile_image_is_left_out_by_name(name: str, findings: dict[str, Finding]) -> None:
    found = findings[f"image_{name}"]
    assert not found.refused and found.what.endswith("keys ('good',)")
    assert IMAGES[name][2] in found.what and f"'evil.{IMAGES[name][0]}': " in found.what
    assert found.seconds < SECONDS


def test_indexing_stays_within_its_memory(findings: dict[str, Finding]) -> None:
    assert len(findings) == len(TARS) + len(IMAGES)
    assert max(found.peak_mib for found in findings.values()) < MEBIBYTES


HARMLESS = {"png_cut", "png_and_zip", "png_animated"}
"""What Pillow decodes at no cost: an index leaves it out, an index that lists it all the same may have it."""


@pytest.mark.parametrize("name", sorted(set(IMAGES) - HARMLESS))
def test_an_index_that_lists_a_hostile_image_gets_no_pixels_of_it(name: str, tmp_path: Path) -> None:
    extension, content, what = IMAGES[name]
    path = tmp_path / f"evil.{extension}"
    path.write_bytes(content())
    found = [word for word in what.split() if word.isdigit()]
    width, height = (found[0], found[0]) if "pixels" in what else ("8000", "8000") if "scans" in what else ("8", "8")
    run = subprocess.run(
        [sys.executable, "-c", DECODER, str(path), width, height], capture_output=True, text=True, cwd=tmp_path, timeout=30
    )
    assert run.returncode == 0 and run.stdout.strip(), run.stderr
    assert [path.name for path in tmp_path.iterdir()] == [f"evil.{extension}"]
