"""Tars that others wrote are indexed where they lie: what WebDataset reads of them is what a run gets, or it is reported."""

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from webdataset.compat import WebDataset

from data_shards.config import INDEX_NAME
from data_shards.index import ShardIndex, index_text
from data_shards.packing.write import PackedSample, write_shard
from data_shards.reading.sample_reader import SampleReader
from data_shards.tars import index_tars as module
from data_shards.tars.confined import ConfinedError, Limits, confined_lines
from data_shards.tars.index_tars import PARTIAL_NAME, IndexedTars, TarsError, index_tars
from data_shards.tars.places import find_tars
from data_shards.tars.verify import verify

Contents = Sequence[tuple[str, bytes]]


def image(image_format: str = "JPEG", size: tuple[int, int] = (8, 8), colour: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (colour, 0, 0)).save(file, image_format)
    return file.getvalue()


def write_tar(path: Path, contents: Contents, *, tar_format: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in contents:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(count: int, *, start: int = 0, folder: str = "", extension: str = "jpg") -> list[tuple[str, bytes]]:
    rows = [(f"{folder}{start + i:05d}", image(colour=start + i), f"caption {start + i}".encode()) for i in range(count)]
    return [
        member
        for key, picture, caption in rows
        for member in ((f"{key}.{extension}", picture), (f"{key}.txt", caption), (f"{key}.cls", b"1"))
    ]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Three tars of four samples, of which a class label is not read."""
    for number in range(3):
        write_tar(tmp_path / "tars" / f"part-{number:03d}.tar", samples(4, start=4 * number))
    return tmp_path / "tars"


def delivered(index: ShardIndex) -> dict[str, tuple[str | None, bytes]]:
    """Caption and first pixel of every sample, by key."""
    reader = SampleReader(index)
    places = [(shard, position) for shard, count in enumerate(index.samples_per_shard) for position in range(count)]
    return {index.shards[s].keys[p]: (reader.caption(s, p), bytes(reader.images([(s, p)])[0, :, 0, 0].tolist())) for s, p in places}


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("folder", ["", "./", "a folder/" + "b" * 60 + "/" + "c" * 60 + "/"])
def test_keys_and_bytes_are_those_that_webdataset_reads(tar_format: int, folder: str, tmp_path: Path) -> None:
    contents = samples(5, folder=folder)
    path = write_tar(tmp_path / "tars" / "a.tar", contents, tar_format=tar_format)
    index = index_tars([str(path)], tmp_path / "out").index
    theirs = list(WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert index.shards[0].keys == tuple(sample["__key__"] for sample in theirs)
    written = path.read_bytes()
    for position, sample in enumerate(theirs):
        for extension, rows in index.shards[0].members.items():
            assert written[rows.offsets[position] :][: rows.sizes[position]] == sample[extension]
    assert verify(tmp_path / "out") == []
    assert list(delivered(index).values()) == [(f"caption {i}", image_pixel(contents[3 * i][1])) for i in range(5)]


def image_pixel(content: bytes) -> bytes:
    return Image.open(io.BytesIO(content)).tobytes()[:3]


def test_names_that_only_pax_can_hold_are_understood(tmp_path: Path) -> None:
    key = "ü" * 100 + "/" + "键" * 50
    path = write_tar(tmp_path / "tars" / "a.tar", [(f"{key}.JPG", image()), (f"{key}.Txt", b"x")], tar_format=tarfile.PAX_FORMAT)
    index = index_tars([str(path)], tmp_path / "out").index
    assert index.shards[0].keys == (key,) and sorted(index.shards[0].members) == ["jpg", "txt"]
    assert delivered(index) == {key: ("x", image_pixel(image()))} and verify(tmp_path / "out") == []


def test_the_index_says_what_it_is_made_of(tars: Path, tmp_path: Path) -> None:
    found = index_tars([str(tars)], tmp_path / "out", licence="CC0-1.0")
    index = found.index
    assert (index.samples, index.image_size, index.location) == (12, 8, str(tars))
    assert index.licence["name"] == "CC0-1.0" and index.source == {"kind": "tars", "name": "tars", "count": 12}
    assert index.pack == {"indexed": True, "ignored": {"cls": 12}, "left_out": {}}
    assert found.examples == {"cls": "part-000.tar: '00000.cls'"}
    assert index.shards[0].widths is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == [INDEX_NAME]
    assert sorted(path.name for path in tars.iterdir()) == ["part-000.tar", "part-001.tar", "part-002.tar"]


def test_an_index_beside_its_tars_names_no_place_and_may_be_moved(tars: Path, tmp_path: Path) -> None:
    assert index_tars([str(tars)], tars).index.location is None
    moved = tars.rename(tmp_path / "elsewhere")
    assert verify(moved) == [] and len(delivered(ShardIndex.load(moved))) == 12


def test_images_of_several_sizes_are_listed_with_each_sample(tmp_path: Path) -> None:
    pictures = {"a.jpg": (8, 4), "b.jpg": (5, 7), "c.png": (3, 3), "d.webp": (9, 2)}
    formats = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
    contents = [(name, image(formats[name[2:]], size)) for name, size in pictures.items()]
    index = index_tars([str(write_tar(tmp_path / "tars" / "a.tar", contents))], tmp_path / "out").index
    assert index.image_size is None
    assert [index.size_at(index.shards[0], position) for position in range(4)] == list(pictures.values())
    assert verify(tmp_path / "out") == []


def test_squares_of_one_shard_that_differ_from_another_are_no_one_size(tmp_path: Path) -> None:
    for name, side in (("a", 8), ("b", 9)):
        write_tar(tmp_path / "tars" / f"{name}.tar", [(f"{name}.png", image("PNG", (side, side)))])
    assert index_tars([str(tmp_path / "tars")], tmp_path / "out").index.image_size is None


def test_members_of_one_key_belong_together_wherever_they_lie(tmp_path: Path) -> None:
    contents = samples(4)
    apart = [member for extension in ("txt", "jpg", "cls") for member in contents if member[0].endswith(extension)]
    index = index_tars([str(write_tar(tmp_path / "tars" / "a.tar", apart))], tmp_path / "out").index
    assert [caption for caption, _ in delivered(index).values()] == [f"caption {i}" for i in range(4)]


def left_out(found: IndexedTars) -> Mapping[str, int]:
    assert len(found.named) == sum(found.left_out.values())
    return found.left_out


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ([("a.jpg", image()), ("a.txt", b"1"), ("a.txt", b"2")], "its key comes twice"),
        ([("a.jpg", image()), ("a.jpg", image(colour=9))], "its key comes twice"),
        ([("a.jpg", image()), ("a.JPG", image(colour=9))], "its key comes twice"),
        ([("a.txt", b"alone")], "no image"),
        ([("a.jpg", b"no image at all")], "an unusable image"),
        ([("a.jpg", image("PNG"))], "an unusable image"),
        ([("a.jpg", image()), ("a.txt", b"\xff\xfe")], "a caption that is not UTF-8"),
        ([("a?.jpg", image())], "an unsafe name"),
        ([("a.jpg", image()), ("a.txt", b"x"), ("a.png", image("PNG"))], "a second image of its sample"),
        ([("a.jpg", image()), ("a.txt", b"x" * 70_000)], "too large"),
        ([("a.jpg", image()), ("a.latents.npy", b"no array")], "an unusable array"),
    ],
)
def test_what_can_not_be_used_is_left_out_and_named(contents: Contents, reason: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "tars" / "x.tar", [*contents, *samples(1)])
    found = index_tars([str(path)], tmp_path / "out")
    assert left_out(found) == {reason: 1} and found.named[0].startswith("x.tar: 'a")
    whole = reason in ("a second image of its sample", "too large", "an unusable array")
    assert found.index.shards[0].keys == (("a", "00000") if whole else ("00000",))
    assert found.index.pack["left_out"] == {reason: 1}
    assert verify(tmp_path / "out") == []


def test_arrays_of_plain_numbers_are_kept(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, np.zeros((4, 2, 2), np.float16))
    path = write_tar(tmp_path / "tars" / "x.tar", [("a.jpg", image()), ("a.latents.npy", file.getvalue())])
    index = index_tars([str(path)], tmp_path / "out").index
    assert sorted(index.shards[0].members) == ["jpg", "latents.npy"] and verify(tmp_path / "out") == []


def test_folders_and_harmless_pax_headers_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "of all"}) as tar:
        folder = tarfile.TarInfo("dir")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        info = tarfile.TarInfo("dir/a.jpg")
        info.size, info.mtime, info.pax_headers = len(image()), 0.5, {"SCHILY.xattr.user.a": "b\nc=d"}
        tar.addfile(info, io.BytesIO(image()))
    assert index_tars([str(path)], tmp_path / "out").index.shards[0].keys == ("dir/a",)


def test_every_refused_tar_is_named_and_the_others_are_not_read_again(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(tars / "part-001.tar", 700)
    (tars / "part-002.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    with pytest.raises(TarsError) as error:
        index_tars([str(tars)], tmp_path / "out")
    assert "part-001.tar: at byte" in str(error.value) and "is cut" in str(error.value)
    assert "part-002.tar: at byte 0: it is gzip, not tar: unpack it with gzip -d" in str(error.value)
    assert "2 of 3 tars can't be indexed" in str(error.value)
    assert not (tmp_path / "out" / INDEX_NAME).exists()
    read: list[str] = []
    original = module.tar_entry
    monkeypatch.setattr(module, "tar_entry", lambda path, name: read.append(name) or original(path, name))
    for number in (1, 2):
        write_tar(tars / f"part-{number:03d}.tar", samples(4, start=4 * number))
    assert index_tars([str(tars)], tmp_path / "out").index.samples == 12
    assert sorted(read) == ["part-001.tar", "part-002.tar"]


def test_a_tar_that_changed_since_the_first_try_is_read_again(tars: Path, tmp_path: Path) -> None:
    broken = tars / "part-002.tar"
    broken.write_bytes(b"")
    with pytest.raises(TarsError):
        index_tars([str(tars)], tmp_path / "out")
    write_tar(tars / "part-000.tar", samples(9, start=100))
    broken.unlink()
    assert index_tars([str(tars)], tmp_path / "out").index.shards[0].keys[0] == "00100"
    assert not (tmp_path / "out" / PARTIAL_NAME).exists()


def test_the_same_command_again_changes_nothing_and_another_is_refused(tars: Path, tmp_path: Path) -> None:
    first = index_tars([str(tars)], tmp_path / "out").index
    assert index_tars([str(tars)], tmp_path / "out", workers=2).index == first
    with pytest.raises(ValueError, match="is the index of other shards"):
        index_tars([str(tars / "part-000.tar")], tmp_path / "out")
    assert ShardIndex.load(tmp_path / "out") == first


def test_verify_names_a_foreign_tar_that_changed(tars: Path, tmp_path: Path) -> None:
    index = index_tars([str(tars)], tmp_path / "out").index
    rows = index.shards[1].members["jpg"]
    content = bytearray((tars / "part-001.tar").read_bytes())
    content[rows.offsets[2] + 9] ^= 1
    (tars / "part-001.tar").write_bytes(content)
    problems = verify(tmp_path / "out")
    assert [problem.key for problem in problems if problem.key] == ["00006"]
    assert any("'00004.cls' has a forbidden extension" in problem.what for problem in problems)
    assert {problem.shard for problem in problems} == {"part-001.tar"}


def test_verify_names_an_array_of_objects_that_an_index_lists(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, np.array([print], dtype=object))
    with (tmp_path / "x.tar").open("wb") as tar:
        shard = write_shard(tar, "x.tar", [PackedSample("a", (("jpg", image()), ("latents.npy", file.getvalue())))])
    (tmp_path / INDEX_NAME).write_text(index_text(image_size=8, licence={}, source={}, pack={}, shards=[shard]))
    (problem,) = verify(tmp_path)
    assert problem.key == "a" and "a.latents.npy: the .npy holds no plain numbers" in problem.what


# What arguments stand for


def test_patterns_are_expanded_like_a_shell_does(tars: Path) -> None:
    names = ["part-000.tar", "part-001.tar", "part-002.tar"]
    for arguments in (
        [f"{tars}/part-{{000..002}}.tar"],
        [f"{tars}/part-00{{0,1,2}}.tar"],
        [str(tars)],
        [str(tars / name) for name in names],
    ):
        assert [tar.name for tar in find_tars(arguments).tars] == names
    found = find_tars(["https://host.org/a/x-{08..10}.tar"])
    assert str(found.parent) == "https://host.org/a" and [tar.name for tar in found.tars] == ["x-08.tar", "x-09.tar", "x-10.tar"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x-{0..999999999}.tar"], "stands for 1000000000 tars, at most 100000"),
        (["x-{0..999}{0..999}.tar"], "stands for 1000000 tars"),
        (["x-{a,{b,c}}.tar"], "braces in braces"),
        (["x-{0..9.tar"], "braces in braces, or one without its other"),
        (["x-{}.tar"], "neither a range nor a choice"),
        (["nowhere.tar"], "nowhere.tar: no such file or folder"),
        (["pipe:cat x.tar"], "pipe: is not a scheme"),
        (["file:///etc/x.tar"], "file: is not a scheme"),
        (["http://h/a/x.tar", "http://h/b/y.tar"], "several places"),
        (["http://h/a/x.tar", "http://h/a/x.tar"], "is named twice"),
        (["http://h/a/x.tar.gz"], "ends in .tar"),
        (["http://h/a/x.tar?signature=1"], "a password, a signature or a query"),
        (["http://user:open-sesame@h/a/x.tar"], "a password, a signature or a query"),
    ],
)
def test_arguments_that_name_no_tars_of_one_place_are_refused(arguments: list[str], message: str) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        find_tars(arguments)
    assert time.monotonic() - started < 1 and "sesame" not in str(error.value)


def test_a_folder_without_a_plain_tar_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no .tar, but x.tar.gz: unpack that"):
        find_tars([str(tmp_path)])


# Tars that lie afar


@pytest.fixture
def server(tars: Path) -> Iterator[str]:
    """The tars' folder on loopback."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tars)))
    thread = Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def test_tars_of_a_web_server_are_indexed_and_not_kept(server: str, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFSTEP_CACHE", str(tmp_path / "cache"))
    index = index_tars([server + "/part-{000..002}.tar"], tmp_path / "out", workers=2).index
    assert index.location == server and [path.name for path in (tmp_path / "out").iterdir()] == [INDEX_NAME]
    local = index_tars([str(tars)], tmp_path / "local").index
    assert index.shards == local.shards
    assert verify(tmp_path / "out") == []  # through the cache


# The process that reads


def test_the_reading_process_starts_at_once_and_imports_no_torch() -> None:
    code = "import data_shards.tars.index_tars, data_shards.tars.samples, data_shards.tars.verify, sys; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
    code = "import data_shards.tars.samples, sys; print(sorted({'torch', 'numpy', 'PIL', 'pickle', 'socket'} & set(sys.modules)))"
    started = time.process_time()
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]" and time.process_time() - started < 0.3


PROBE = """
import os, socket, sys
from data_shards.tars.confined import arguments, confine, write_line
confine(arguments())
def attempt(what):
    try:
        what()
        return "done"
    except (OSError, MemoryError) as error:
        return type(error).__name__
write_line({
    "done": attempt(lambda: open("/etc/hostname")),
    "write": attempt(lambda: open("CANARY", "w")),
    "connect": attempt(lambda: socket.socket()),
    "memory": attempt(lambda: bytes(2**29)),
    "secret": os.environ.get("HF_TOKEN"),
})
"""
SPIN = "from data_shards.tars.confined import arguments, confine\nconfine(arguments())\nwhile True: pass\n"
SLEEP = "import time\nfrom data_shards.tars.confined import arguments, confine\nconfine(arguments())\ntime.sleep(60)\n"
STUCK = "import time\ntime.sleep(60)\n"  # before it has bound itself
SHOUT = "from data_shards.tars.confined import write_line\nwhile True: write_line({'a': 'b' * 1000})\n"
SILENT = "pass\n"


@pytest.fixture
def confined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose modules can be run confined, beside the real ones."""
    monkeypatch.setattr("data_shards.tars.confined._ROOT", f"{tmp_path}{os.pathsep}{Path(module.__file__).parents[2]}")
    yield tmp_path


def test_a_confined_process_can_open_write_and_connect_nothing(confined: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a secret")
    (confined / "probe.py").write_text(PROBE.replace("CANARY", str(confined / "canary")))
    with (confined / "probe.py").open("rb") as file:
        (said,) = confined_lines("probe", file, Limits(2**28, 5, 5, 2**20))
    assert [said[what] for what in ("done", "write", "connect", "memory", "secret")] == [
        "OSError",
        "OSError",
        "OSError",
        "MemoryError",
        None,
    ]
    assert not (confined / "canary").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (SPIN, "more than 1 s of processor time"),
        (SLEEP, "more than 2 s"),
        (STUCK, "more than 2 s"),
        (SHOUT, "more to tell than 4096 bytes"),
        (SILENT, "without an answer"),
    ],
)
def test_a_confined_process_beyond_a_limit_is_ended_and_named(code: str, message: str, confined: Path) -> None:
    (confined / "work.py").write_text(code)
    started = time.monotonic()
    with (confined / "work.py").open("rb") as file, pytest.raises(ConfinedError, match=message):
        list(confined_lines("work", file, Limits(2**28, 1, 2 if code != SPIN else 9, 4096)))
    assert time.monotonic() - started < 5


# The command


def test_the_command_says_what_is_used_and_what_not(tars: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch", "shards", "index", str(tars), "--out", str(tmp_path / "out"), "--licence", "CC0-1.0"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "12 images of 8 x 8 pixels in 3 tars" in run.stdout
    assert "ignored: 12 members of extension 'cls', such as part-000.tar: '00000.cls'" in run.stderr
    (tars / "part-000.tar").write_bytes(b"BZh9" + bytes(600))
    run = subprocess.run([*command[:-3], str(tmp_path / "other")], capture_output=True, text=True)
    assert run.returncode == 2 and "it is bzip2, not tar" in run.stderr and "Traceback" not in run.stderr
    assert json.loads((tmp_path / "out" / INDEX_NAME).read_text())["samples"] == 12


def test_a_folder_of_other_things_is_not_written_into(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match=r"is not empty \(it holds photo.jpg\); give a new --out"):
        index_tars([str(packed / ShardIndex.load(packed).shards[0].name)], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]
