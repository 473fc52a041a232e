"""Shards are pushed to the Hub's stand-in by the real client: tars first, index last, nothing twice, and read back as they were."""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import yaml

from data_shards.hub.card import card_text, licence_note, size_category
from data_shards.index import ShardIndex
from tests.data_shards.hub_cases import Result, run_cases
from tests.hub_double import HubDouble

TOKEN = "hf_right"
REPO, FOLDER = "tester/faces", "datasets/tester/faces"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubDouble]:
    """The stand-in, with one valid token; the second commit of tester/faces fails once."""
    commits: list[str] = []

    def fault(method: str, path: str) -> int | None:
        if method == "POST" and path.startswith(f"/api/{FOLDER}/commit/"):
            commits.append(path)
        return 503 if len(commits) == 2 and method == "POST" and "/commit/" in path else None

    with HubDouble(tmp_path_factory.mktemp("hub"), token=TOKEN) as double:
        double.intercept = fault
        other, written = (double.folder(f"datasets/tester/{name}") for name in ("other", "written"))
        for folder in (other, written):
            folder.mkdir(parents=True)
        (other / "shard-000099.tar").write_bytes(b"of another pack")
        (written / "README.md").write_text("# Written by hand\n")
        yield double


@pytest.fixture(scope="module")
def pushed(hub: HubDouble, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """All calls of one client process."""
    work = tmp_path_factory.mktemp("work")
    broken = Path(shutil.copytree(packed, work / "broken"))
    content = bytearray((broken / "shard-000001.tar").read_bytes())
    content[3000] ^= 1
    (broken / "shard-000001.tar").write_bytes(content)
    push = {"do": "push", "root": str(packed), "repo": REPO, "token": TOKEN}
    calls: dict[str, Mapping[str, object]] = {
        "no token": {**push, "token": None},
        "wrong token": {**push, "token": "hf_wrong"},
        "interrupted": push,
        "continued": push,
        "again": push,
        "read back": {"do": "ls", "location": f"hf://{FOLDER}", "token": TOKEN},
        "read back without token": {"do": "ls", "location": f"hf://{FOLDER}"},
        "read as a data set": {"repo": REPO, "streaming": True, "token": TOKEN},
        "broken": {**push, "root": str(broken), "repo": "tester/broken"},
        "other": {**push, "repo": "tester/other"},
        "written": {**push, "repo": "tester/written"},
    }
    return run_cases(calls, hub.environment(work / "home"))


def error_of(result: Result) -> str:
    """Type and text of what a call raised."""
    assert "error" in result, result
    return ": ".join(cast("list[str]", result["error"]))


def test_a_push_goes_on_where_it_stopped_and_sends_nothing_twice(pushed: dict[str, Result], hub: HubDouble, packed: Path) -> None:
    assert error_of(pushed["interrupted"]).startswith("ConnectionError: tester/faces") and "503" in error_of(pushed["interrupted"])
    assert pushed["continued"] == {"location": f"hf://datasets/{REPO}@{hub.head(FOLDER)}"} == pushed["again"]
    commits = [path for path in hub.paths() if path.startswith(f"POST /api/{FOLDER}/commit/")]
    assert len(commits) == 5  # a shard; one that fails; two shards; index and card: none for what is there already
    asked = [path for path in hub.paths() if path.startswith(f"POST /api/{FOLDER}/preupload/")]
    assert len(asked) == 6  # the same, and index and card of the third push: what is there is not even offered
    sent = [path for path in hub.paths() if path.startswith("PUT /lfs/")]
    for shard in ShardIndex.load(packed).shards:
        assert sent.count(f"PUT /lfs/{shard.sha256}") == 1


def test_the_index_comes_last(pushed: dict[str, Result], hub: HubDouble) -> None:
    assert "location" in pushed["continued"]
    tars = {name for name in hub.commits[FOLDER][hub.head(FOLDER)] if name.endswith(".tar")}
    seen = [set(files) for files in hub.commits[FOLDER].values() if files]
    assert len(tars) == 3 and any(len(files & tars) in (1, 2) for files in seen)
    assert all(tars <= files and "README.md" in files for files in seen if "index.json" in files)


def test_what_was_pushed_is_read_back_as_it_was(pushed: dict[str, Result], packed: Path) -> None:
    found = {name.rpartition("/")[2]: digest for name, digest in pushed["read back"].items()}
    index = ShardIndex.load(packed)
    assert {name: found[name] for name in found if name.endswith(".tar")} == {shard.name: shard.sha256 for shard in index.shards}
    assert found["index.json"] == hashlib.sha256((packed / "index.json").read_bytes()).hexdigest()


def test_a_new_repository_is_private(pushed: dict[str, Result], hub: HubDouble) -> None:
    assert FOLDER in hub.private
    assert "error" in pushed["read back without token"]


def test_pushed_shards_are_a_data_set_for_everybody(pushed: dict[str, Result], packed: Path) -> None:
    rows = cast("list[dict[str, object]]", pushed["read as a data set"].get("rows"))
    assert rows, pushed["read as a data set"]
    assert len(rows) == ShardIndex.load(packed).samples and all(row["caption"] and row["image"] for row in rows)
    licence = cast("dict[str, object]", pushed["read as a data set"]["licence"])
    assert licence["name"] == "cc0-1.0"


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        ("no token", ["ValueError", "HF_TOKEN", "hf auth login"]),
        ("wrong token", ["ValueError", "does not know the token", "HF_TOKEN"]),
        ("broken", ["ShardIndexError", "shard-000001.tar is damaged"]),
        ("other", ["ValueError", "holds shard-000099.tar, of other shards", "another repository"]),
    ],
)
def test_an_error_says_what_and_how_to_mend_it(call: str, parts: list[str], pushed: dict[str, Result]) -> None:
    text = error_of(pushed[call])
    assert all(part in text for part in parts), text
    assert TOKEN not in text and "hf_wrong" not in text


def test_what_is_damaged_or_strange_gets_no_index(pushed: dict[str, Result], hub: HubDouble) -> None:
    assert "error" in pushed["broken"] and "error" in pushed["other"]
    assert not (hub.folder("datasets/tester/broken") / "index.json").exists()
    assert [path.name for path in hub.folder("datasets/tester/other").iterdir()] == ["shard-000099.tar"]


def test_a_card_that_people_wrote_stays(pushed: dict[str, Result], hub: HubDouble) -> None:
    assert "location" in pushed["written"]
    assert (hub.folder("datasets/tester/written") / "README.md").read_text() == "# Written by hand\n"
    assert (hub.folder("datasets/tester/written") / "index.json").exists()


def test_the_card_names_licence_artist_and_how_captions_were_made(packed: Path) -> None:
    index = ShardIndex.load(packed)
    captioned = {"kind": "caption", "model": "o/blip", "revision": "abc", "prompt": "a photo of", "counts": {"written": 30}}
    text = card_text(replace(index, derived=(captioned,)), REPO)
    header = yaml.safe_load(text.split("---")[1])
    assert (header["license"], header["size_categories"], header["configs"][0]["data_files"][0]["path"]) == ("cc0-1.0", ["n<1K"], "*.tar")
    assert "webdataset" in header["tags"]
    for part in (
        "By Pablo Stanley",
        "30 images, 16 x 16 pixels; 30 with a caption",
        "source: kind faces",
        index.sha256,
        "shard-000002.tar",
    ):
        assert part in text
    assert "then: kind caption, model o/blip, revision abc, prompt a photo of" in text
    assert f'snapshot_download("{REPO}"' in text and f"hf://datasets/{REPO}" in text
    assert "source's own" in card_text(index, REPO)


def test_a_licence_that_is_unclear_is_said_to_be(packed: Path) -> None:
    index = ShardIndex.load(packed)
    assert licence_note(index) is None
    named = {name: replace(index, licence={"name": name}) for name in ("not stated", "Our Terms", "CC-BY-ND-4.0", "CC-BY-4.0")}
    assert licence_note(named["CC-BY-4.0"]) is None
    assert "not stated" in str(licence_note(named["not stated"])) and "Our Terms" in str(licence_note(named["Our Terms"]))
    assert "changed copies" in str(licence_note(named["CC-BY-ND-4.0"]))
    headers = [yaml.safe_load(card_text(one, REPO).split("---")[1]) for one in named.values()]
    assert [header["license"] for header in headers] == ["unknown", "other", "cc-by-nd-4.0", "cc-by-4.0"]
    assert headers[1]["license_name"] == "our-terms"
    hostile = replace(index, licence={"name": "x\n---\n# [a](http://b) <script>", "creators": ["<b>"], "text": "a\n\n# b"})
    assert "<script>" not in card_text(hostile, REPO).split("---", 2)[2] and "\n# b" not in card_text(hostile, REPO)


def test_the_size_category_is_the_hubs() -> None:
    assert [size_category(count) for count in (999, 1000, 99_999, 10**6, 10**8)] == ["n<1K", "1K<n<10K", "10K<n<100K", "1M<n<10M", "n>100M"]
