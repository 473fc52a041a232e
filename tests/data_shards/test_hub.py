"""Data sets of the Hub, read by the real clients from the Hub's stand-in: the same rows every way, pinned, and clear errors."""

import hashlib
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast
from zipfile import ZipFile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_shards.hub.access import hub_errors, need_datasets, resolve_hub_location
from data_shards.hub.columns import Column, choose_columns
from data_shards.index import ShardIndex
from data_shards.reading.read import read_all
from tests.data_shards.hub_cases import Result, run_cases
from tests.hub_double import HubDouble

ROWS, ROWS_PER_FILE = 60, 20
TOKEN, WRONG_TOKEN = "hf_right", "hf_wrong_but_secret"
NAMES = ("cat", "dog", "bird")
IMAGE, TEXT = {"_type": "Image"}, {"dtype": "string", "_type": "Value"}


def image_bytes(number: int) -> bytes:
    """A PNG of one colour, another for each number."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (4 * number, 255 - number, 7)).save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, columns: Mapping[str, Sequence[object]], features: Mapping[str, object] | None = None) -> None:
    """A table as `datasets` writes it: its own types stand in the metadata; without features plain Arrow types."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: list(values) for name, values in columns.items()})
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=6)


def write_card(folder: Path, header: str, text: str = "") -> None:
    """README.md with a YAML header."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{header}\n---\n{text}\n", encoding="utf-8")


def write_animals(folder: Path) -> None:
    """60 images with captions and labels in 3 files."""
    label = {"names": list(NAMES), "_type": "ClassLabel"}
    for file in range(ROWS // ROWS_PER_FILE):
        numbers = range(file * ROWS_PER_FILE, (file + 1) * ROWS_PER_FILE)
        columns = {
            "image": [{"bytes": image_bytes(number), "path": f"{number}.png"} for number in numbers],
            "label": [number % 4 - 1 for number in numbers],  # -1: no label
            "caption": [f" animal {number}\n" for number in numbers],
        }
        write_parquet(folder / f"data/train-{file:05d}-of-00003.parquet", columns, {"image": IMAGE, "label": label, "caption": TEXT})
    write_card(folder, "license: cc-by-4.0\ntags: [animals]")


def write_folders(data: Path) -> None:
    """Three images as files with their captions beside them, and in a zip."""
    (data / "folder/train").mkdir(parents=True)
    (data / "zip").mkdir()
    texts: list[str] = []
    with ZipFile(data / "zip/train.zip", "w") as archive:
        for number in range(3):
            (data / f"folder/train/{number}.png").write_bytes(image_bytes(number))
            texts.append(json.dumps({"file_name": f"{number}.png", "text": f"text {number}"}))
            archive.writestr(f"{number}.png", image_bytes(number))
    (data / "folder/train/metadata.jsonl").write_text("\n".join(texts))


def write_shelf(root: Path) -> None:
    """Data sets of every sort that matters."""
    data = root / "datasets" / "zoo"
    write_animals(data / "animals")
    write_animals(data / "secret")
    write_animals(data / "gated")
    images = [{"bytes": image_bytes(number), "path": f"{number}.png"} for number in range(3)]
    write_parquet(data / "stereo/train.parquet", {"left": images, "right": images}, {"left": IMAGE, "right": IMAGE})
    captions = [["", f"first {number}", "second"] for number in range(3)]
    write_parquet(data / "plain/train.parquet", {"IMG": [image_bytes(number) for number in range(3)], "captions": captions})
    (data / "plain/images").mkdir()
    (data / "plain/images/1.png").write_bytes(image_bytes(1))
    (root / "private.png").write_bytes(image_bytes(5))
    theirs = "hf://datasets/zoo/secret@main/a.png"
    paths = ["images/1.png", "images/none.png", str(root / "private.png"), "../private.png", "https://example.org/a.png", theirs, None]
    write_parquet(data / "paths/train.parquet", {"image": paths, "text": [f"{number}" for number in range(len(paths))]})
    (data / "paths/images").mkdir()
    (data / "paths/images/1.png").write_bytes(image_bytes(1))
    for name in ("small", "large"):
        write_parquet(data / f"sizes/{name}/train.parquet", {"image": images[:1]}, {"image": IMAGE})
    configs = "".join(f"\n- config_name: {name}\n  data_files: {name}/*.parquet" for name in ("small", "large"))
    write_card(data / "sizes", f"license: other\nlicense_name: our-own\nlicense_link: https://example.org/terms\nconfigs:{configs}")
    write_folders(data)
    write_animals(data / "flaky")
    for name in ("broken", "ragged"):
        write_parquet(data / f"{name}/train-0.parquet", {"image": images}, {"image": IMAGE})
    (data / "broken/train-0.parquet").write_bytes(b"PAR1 and nothing else")
    write_parquet(data / "ragged/train-1.parquet", {"picture": images}, {"picture": IMAGE})
    write_card(data / "card", "configs:\n- config_name: default\n  data_files: 7")
    write_card(data / "script", "license: mit")
    (data / "script/script.py").write_text("raise SystemExit('was run')")
    write_card(data / "empty", "license: mit")


def fault(root: Path, path: str) -> int | None:
    """The Hub is down for some names: 503, no answer at all, or an answer to the first questions only, once flaky has moved on."""
    if "/zoo/flaky" in path and path != "/api/datasets/zoo/flaky" and (root / "datasets/zoo/flaky/NEW.md").exists():
        return 400
    return 503 if "/zoo/down" in path else 0 if "/zoo/silent" in path else None


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubDouble]:
    """The stand-in, with one valid token."""
    root = tmp_path_factory.mktemp("hub")
    write_shelf(root)
    with HubDouble(root, token=TOKEN) as double:
        double.private.add("datasets/zoo/secret")
        double.gated.add("datasets/zoo/gated")
        double.intercept = lambda _method, path: fault(root, path)
        yield double


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of the clients, and what they pack."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def first_commit(hub: HubDouble) -> str:
    """What main is before it moves on."""
    return hub.head("datasets/zoo/animals")


@pytest.fixture(scope="module")
def online(hub: HubDouble, work: Path, first_commit: str) -> dict[str, Result]:
    """All calls of one client process with the network; `main` of animals moves on after the first ones."""
    animals = "zoo/animals"
    moved = {"do": "write", "path": str(hub.folder("datasets/zoo/animals") / "NEW.md"), "text": "main has moved"}
    calls: dict[str, Mapping[str, object]] = {
        "tables": {"repo": animals, "rows": 25},
        "stream": {"repo": animals, "streaming": True},
        "tables in a fork": {"repo": animals, "rows": 25, "fork": True},
        "stream in a fork, from row 7": {"repo": animals, "streaming": True, "fork": True, "first": 7},
        "pack tables": {"do": "pack", "repo": animals, "out": str(work / "tables")},
        "pack stream": {"do": "pack", "repo": animals, "streaming": True, "workers": 2, "out": str(work / "stream")},
        "resolve": {"do": "resolve", "location": f"hf://datasets/{animals}/data/train.tar"},
        "main moves on": moved,
        "tables, pinned": {"repo": animals, "revision": first_commit},
        "stream, pinned": {"repo": animals, "revision": first_commit, "streaming": True},
        "tables, moved": {"repo": animals},
        "resolve, moved": {"do": "resolve", "location": f"hf://datasets/{animals}@main"},
        "resolve, pinned": {"do": "resolve", "location": f"hf://datasets/{animals}@{first_commit}/a"},
        "resolve, absent": {"do": "resolve", "location": "hf://datasets/zoo/none/a"},
        "plain": {"repo": "zoo/plain"},
        "no captions wanted": {"repo": "zoo/plain", "text_column": ""},
        "paths": {"repo": "zoo/paths"},
        "folder": {"repo": "zoo/folder"},
        "folder stream": {"repo": "zoo/folder", "streaming": True},
        "zip": {"repo": "zoo/zip"},
        "zip stream": {"repo": "zoo/zip", "streaming": True},
        "stereo": {"repo": "zoo/stereo"},
        "stereo, left": {"repo": "zoo/stereo", "image_column": "left"},
        "one of two configs": {"repo": "zoo/sizes", "config": "small"},
        "two configs": {"repo": "zoo/sizes"},
        "no such config": {"repo": "zoo/sizes", "config": "medium"},
        "no such split": {"repo": animals, "split": "test"},
        "no such column": {"repo": animals, "image_column": "photo"},
        "no such revision": {"repo": animals, "revision": "v9"},
        "script": {"repo": "zoo/script"},
        "empty": {"repo": "zoo/empty"},
        "bad name": {"repo": "zoo/a/b"},
        "absent": {"repo": "zoo/none"},
        "private": {"repo": "zoo/secret"},
        "private, right token": {"repo": "zoo/secret", "token": TOKEN},
        "absent, right token": {"repo": "zoo/none", "token": TOKEN},
        "wrong token": {"repo": animals, "token": WRONG_TOKEN},
        "gated": {"repo": "zoo/gated"},
        "gated, right token": {"repo": "zoo/gated", "token": TOKEN},
        "flaky, once": {"repo": "zoo/flaky"},
        "flaky moves on": {"do": "write", "path": str(hub.folder("datasets/zoo/flaky") / "NEW.md"), "text": "moved"},
        "flaky": {"repo": "zoo/flaky"},
        "broken": {"repo": "zoo/broken"},
        "broken stream": {"repo": "zoo/broken", "streaming": True},
        "card": {"repo": "zoo/card"},
        "ragged": {"repo": "zoo/ragged"},
        "down": {"repo": "zoo/down"},
        "silent": {"repo": "zoo/silent"},
    }
    return run_cases(calls, hub.environment(work / "home"))


@pytest.fixture(scope="module")
def offline(hub: HubDouble, work: Path, online: dict[str, Result], first_commit: str) -> dict[str, Result]:
    """All calls of a client process that may not use the network, after `online` filled the cache; the stand-in is unplugged."""
    assert online["tables"], "the cache is full"
    asked = len(hub.requests)
    calls: dict[str, Mapping[str, object]] = {
        "last": {"repo": "zoo/animals"},
        "pinned": {"repo": "zoo/animals", "revision": first_commit},
        "another revision": {"repo": "zoo/animals", "revision": "0" * 40},
        "absent": {"repo": "zoo/empty"},
        "no such split": {"repo": "zoo/animals", "split": "test"},
        "streaming": {"repo": "zoo/animals", "streaming": True},
        "resolve": {"do": "resolve", "location": "hf://datasets/zoo/animals/a"},
    }
    hub.unplugged = True
    results = run_cases(calls, hub.environment(work / "home", offline=True))
    hub.unplugged = False
    assert hub.requests[asked:] == []
    return results


def rows_of(result: Result) -> list[dict[str, object]]:
    """The rows of a call that must not have failed."""
    assert "error" not in result, result
    return cast("list[dict[str, object]]", result["rows"])


def error_of(result: Result) -> tuple[str, str]:
    """Type and text of what a call raised."""
    assert "error" in result, result
    kind, text = cast("list[str]", result["error"])
    return kind, text


def without_names(rows: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Rows but for what tells them apart when they are streamed."""
    return [{name: value for name, value in row.items() if name not in ("key", "where")} for row in rows]


def test_all_rows_come_in_order_with_their_bytes_captions_and_labels(online: dict[str, Result]) -> None:
    rows = rows_of(online["tables"])
    assert [row["key"] for row in rows] == [f"{number:08d}" for number in range(ROWS)]
    assert [row["image"] for row in rows] == [hashlib.sha256(image_bytes(number)).hexdigest() for number in range(ROWS)]
    assert [row["caption"] for row in rows] == [f"animal {number}" for number in range(ROWS)]
    assert [row["attributes"] for row in rows[:4]] == [{}, {"label": "cat"}, {"label": "dog"}, {"label": "bird"}]
    assert rows[21]["extra"] == {"file": "21.png"} and rows[21]["where"] == "zoo/animals (train) row 21"
    assert online["tables"]["parts"] == 3


def test_streaming_gives_the_same_rows_file_by_file(online: dict[str, Result]) -> None:
    rows = rows_of(online["stream"])
    assert without_names(rows) == without_names(rows_of(online["tables"]))
    assert (rows[21]["key"], rows[21]["where"]) == ("00001-00000001", "zoo/animals (train) row 1 of file 1")
    assert online["stream"]["parts"] == 3 and len({str(row["key"]) for row in rows}) == ROWS


def test_a_forked_worker_reads_the_same_and_a_part_can_begin_anywhere(online: dict[str, Result]) -> None:
    assert rows_of(online["tables in a fork"]) == rows_of(online["tables"])
    rows = rows_of(online["stream"])
    wanted = [row for number, row in enumerate(rows) if number % ROWS_PER_FILE >= 7]
    assert rows_of(online["stream in a fork, from row 7"]) == wanted


def test_both_ways_are_packed_into_the_same_samples(online: dict[str, Result], work: Path) -> None:
    assert online["pack tables"] == online["pack stream"] == {"samples": ROWS}
    tables, stream = (ShardIndex.load(work / name) for name in ("tables", "stream"))
    found = [
        sorted(zip(map(str, batch.captions), (image.tolist() for image in batch.images), strict=True))
        for batch in (read_all(index, ("image", "caption")) for index in (tables, stream))
    ]
    assert found[0] == found[1] and len(found[0]) == ROWS
    assert tables.source["revision"] and tables.licence["name"] == "cc-by-4.0"


def test_a_source_names_its_commit_and_its_licence(online: dict[str, Result], first_commit: str) -> None:
    described = cast("dict[str, object]", online["tables"]["describe"])
    assert described["revision"] == first_commit and described["kind"] == "hub" and described["count"] == ROWS
    assert (described["image_column"], described["text_column"], described["label_columns"]) == ("image", "caption", ["label"])
    licence = cast("dict[str, object]", online["tables"]["licence"])
    assert (licence["name"], licence["creators"], licence["attribution_required"], licence["tags"]) == (
        "cc-by-4.0",
        ["zoo"],
        True,
        ["animals"],
    )
    assert licence["source_url"] == "https://huggingface.co/datasets/zoo/animals"
    own = cast("dict[str, object]", online["one of two configs"]["licence"])
    assert (own["name"], own["url"]) == ("our-own", "https://example.org/terms")


def test_a_pinned_revision_stays_when_main_moves_on(online: dict[str, Result], hub: HubDouble, first_commit: str) -> None:
    for way in ("tables", "stream"):
        pinned = online[f"{way}, pinned"]
        assert pinned["describe"] == online[way]["describe"] and rows_of(pinned) == rows_of(online[way])
    moved = cast("dict[str, object]", online["tables, moved"]["describe"])["revision"]
    assert moved == hub.head("datasets/zoo/animals") != first_commit


def test_a_location_is_pinned_to_the_commit_of_now(online: dict[str, Result], hub: HubDouble, first_commit: str) -> None:
    assert online["resolve"] == {"location": f"hf://datasets/zoo/animals@{first_commit}/data/train.tar"}
    assert online["resolve, moved"] == {"location": f"hf://datasets/zoo/animals@{hub.head('datasets/zoo/animals')}"}
    assert online["resolve, pinned"] == {"location": f"hf://datasets/zoo/animals@{first_commit}/a"}
    assert "no such dataset, or it is private" in error_of(online["resolve, absent"])[1]
    with pytest.raises(ValueError, match=r"is not hf://datasets/OWNER/NAME"):
        resolve_hub_location("s3://bucket/a")


def test_bytes_without_a_mark_and_lists_of_captions_are_found(online: dict[str, Result]) -> None:
    rows = rows_of(online["plain"])
    assert [row["image"] for row in rows] == [hashlib.sha256(image_bytes(number)).hexdigest() for number in range(3)]
    assert [row["caption"] for row in rows] == ["first 0", "first 1", "first 2"]
    assert {row["caption"] for row in rows_of(online["no captions wanted"])} == {None}


def test_a_path_leads_to_the_data_sets_own_files_and_nowhere_else(online: dict[str, Result], hub: HubDouble) -> None:
    rows = rows_of(online["paths"])
    assert rows[0]["image"] == hashlib.sha256(image_bytes(1)).hexdigest()
    reasons = [str(row["reason"]) for row in rows[1:]]
    assert "images/none.png" in reasons[0] or "lacks a file" in reasons[0]
    assert all("is no file of this data set" in reasons[number] for number in (1, 2, 4))
    assert "only a URL, which is not fetched" in reasons[3] and reasons[5] == "it has no image"


@pytest.mark.parametrize("call", ["folder", "folder stream", "zip", "zip stream"])
def test_images_that_are_files_of_their_own_or_in_a_zip_are_read(call: str, online: dict[str, Result]) -> None:
    rows = rows_of(online[call])
    assert [row["image"] for row in rows] == [hashlib.sha256(image_bytes(number)).hexdigest() for number in range(3)]
    assert [row["extra"] for row in rows] == [{"file": f"{number}.png"} for number in range(3)]
    assert [row["caption"] for row in rows] == [f"text {number}" if "folder" in call else None for number in range(3)]


@pytest.mark.parametrize(
    ("call", "kind", "parts"),
    [
        ("stereo", "ValueError", ["left or right?", "--image-column", "left (image), right (image)"]),
        ("two configs", "ValueError", ["several configs", "small, large"]),
        ("no such config", "ValueError", ["no config 'medium'", "small, large"]),
        ("no such split", "ValueError", ["no split 'test'", "train"]),
        ("no such column", "ValueError", ["photo", "label (label: cat, dog, bird)"]),
        ("no such revision", "ValueError", ["no revision 'v9'"]),
        ("script", "ValueError", ["Python script", "never run", "refs/convert/parquet"]),
        ("empty", "ValueError", ["holds no file", "parquet"]),
        ("bad name", "ValueError", ["'zoo/a/b'", "OWNER/NAME"]),
        ("absent", "ValueError", ["no such dataset, or it is private", "HF_TOKEN"]),
        ("private", "ValueError", ["no such dataset, or it is private", "HF_TOKEN"]),
        ("absent, right token", "ValueError", ["no such dataset, or it is private"]),
        ("wrong token", "ValueError", ["does not know the token", "HF_TOKEN"]),
        ("gated", "ValueError", ["gated", "accept its terms", "HF_TOKEN"]),
        ("gated, right token", "ValueError", ["gated", "accept its terms"]),
        ("flaky", "ConnectionError", ["can't be read right now", "HF_HUB_OFFLINE=1"]),
        ("broken", "ValueError", ["can't be read as one table"]),
        ("broken stream", "ValueError", ["zoo/broken at", "can't be read as one table", "Parquet"]),
        ("card", "ValueError", ["zoo/card", "configs"]),
        ("ragged", "ValueError", ["can't be read as one table"]),
        ("down", "ConnectionError", ["answered 503", "try again"]),
        ("silent", "ConnectionError", ["can't be reached", "HF_HUB_OFFLINE=1"]),
    ],
)
def test_an_error_says_what_and_how_to_mend_it(call: str, kind: str, parts: list[str], online: dict[str, Result]) -> None:
    found, text = error_of(online[call])
    assert found == kind and all(part in text for part in parts), text
    assert TOKEN not in text and WRONG_TOKEN not in text and len(text) < 500


def test_a_private_data_set_is_read_with_its_token_which_stays_with_the_hub(online: dict[str, Result], hub: HubDouble) -> None:
    assert without_names(rows_of(online["private, right token"])) == without_names(rows_of(online["tables"]))
    cdn = [request for request in hub.requests if request.path.startswith("/cdn/datasets/zoo/secret")]
    assert cdn and not any(request.authorized for request in cdn)


def test_offline_the_last_or_the_pinned_revision_comes_from_the_cache(offline: dict[str, Result], online: dict[str, Result]) -> None:
    assert offline["last"]["describe"] == online["tables, moved"]["describe"]
    assert offline["pinned"] == online["tables, pinned"]
    assert rows_of(offline["last"]) == rows_of(online["tables, moved"])


@pytest.mark.parametrize(
    ("call", "kind", "parts"),
    [
        ("another revision", "ValueError", ["0000 is not in the cache", "HF_HUB_OFFLINE", "default at "]),
        ("absent", "ValueError", ["zoo/empty at any revision is not in the cache", "nothing of it"]),
        ("no such split", "ValueError", ["no split 'test'", "train"]),
        ("streaming", "ValueError", ["streaming needs the network", "HF_HUB_OFFLINE"]),
        ("resolve", "ConnectionError", ["HF_HUB_OFFLINE", "forbids to ask"]),
    ],
)
def test_offline_what_is_not_in_the_cache_is_named(call: str, kind: str, parts: list[str], offline: dict[str, Result]) -> None:
    found, text = error_of(offline[call])
    assert found == kind and all(part in text for part in parts), text


def test_without_the_libraries_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeError, match=r"pip install 'halfstep\[hub\]'"):
        need_datasets()


def test_a_file_that_need_not_be_there_is_not_blamed() -> None:
    from huggingface_hub.errors import RemoteEntryNotFoundError
    from huggingface_hub.utils import httpx

    answer = httpx.Response(404, request=httpx.Request("GET", "http://hub"))
    with pytest.raises(ValueError, match="the card is bad"), hub_errors("zoo/animals"):
        try:
            raise RemoteEntryNotFoundError("dataset_infos.json", response=answer)
        except RemoteEntryNotFoundError:
            raise ValueError("the card is bad")  # noqa: B904 - as datasets does
    with pytest.raises(ValueError, match="lacks a file at revision v1"), hub_errors("zoo/animals", revision="v1"):
        raise RemoteEntryNotFoundError("a.png", response=answer)


MARKED, MASK, TITLE = Column("image"), Column("image"), Column("text")


@pytest.mark.parametrize(
    ("found", "image", "text"),
    [
        ({"photo": MARKED, "image": Column("text")}, "photo", None),
        ({"image": MARKED, "mask": MASK, "text": TITLE}, "image", "text"),
        ({"scan": Column("record"), "jpg": Column("binary"), "id": TITLE}, "scan", None),
        ({"jpg": Column("binary"), "txt": TITLE, "json": Column("other")}, "jpg", "txt"),
        ({"Image": Column("text"), "TEXT": TITLE}, "Image", "TEXT"),
        ({"image": MARKED, "captions": Column("texts"), "id": TITLE}, "image", "captions"),
    ],
)
def test_the_columns_are_guessed_by_type_and_then_by_name(found: dict[str, Column], image: str, text: str | None) -> None:
    columns = choose_columns(found, image=None, text=None, where="t")
    assert (columns.image, columns.text) == (image, text)


@pytest.mark.parametrize(
    ("found", "image", "text", "message"),
    [
        ({"a": TITLE}, None, None, r"no column looks like images.*--image-column.*a \(text\)"),
        ({"image": MARKED, "caption": TITLE, "text": TITLE}, None, None, r"caption or text\? Name it with --text-column"),
        ({"a": MARKED, "b": MARKED}, None, None, r"a or b\?"),
        ({"image": MARKED, "n": Column("other")}, None, "n", r"--text-column n: a column of other does not serve"),
        ({"image": MARKED, "n": Column("other")}, "n", None, r"--image-column n: a column of other does not serve"),
    ],
)
def test_columns_are_not_guessed_where_it_is_unclear(found: dict[str, Column], image: str | None, text: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_columns(found, image=image, text=text, where="t")
