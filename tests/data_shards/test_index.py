"""The index is read strictly: whatever was changed in it is named, with the way to mend it."""

import json
import re
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data_shards.config import INDEX_NAME
from data_shards.index import ShardIndex, ShardIndexError, canonical_sha256, index_text, is_safe_member_name

Content = dict[str, object]


@pytest.fixture
def edit(damaged: Path) -> Callable[[Callable[[Content], object]], Path]:
    """A function: changes the index with another one and signs it again, as a hostile or careless tool would."""

    def apply(change: Callable[[Content], object]) -> Path:
        path = damaged / INDEX_NAME
        content = json.loads(path.read_text())
        change(content)
        content["sha256"] = canonical_sha256(content)
        path.write_text(json.dumps(content))
        return damaged

    return apply


def test_the_index_says_what_was_packed(packed: Path) -> None:
    index = ShardIndex.load(packed)
    assert (index.samples, index.image_size, index.samples_per_shard) == (30, 16, (12, 12, 6))
    assert index.licence["name"] == "CC0-1.0" and index.source["style"] == "open-peeps" and index.pack["seed"] == 0
    assert json.loads((packed / INDEX_NAME).read_text())["sha256"] == index.sha256


def test_a_missing_index_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ShardIndexError, match="halfstep shards pack --out"):
        ShardIndex.load(tmp_path)


def test_a_folder_above_an_index_is_told_where_it_is(packed: Path) -> None:
    with pytest.raises(ShardIndexError, match=rf"there is no index; give .*{re.escape(str(packed))}"):
        ShardIndex.load(packed.parent)


def test_an_index_that_is_cut_is_not_json(damaged: Path) -> None:
    text = (damaged / INDEX_NAME).read_text()
    (damaged / INDEX_NAME).write_text(text[: len(text) // 2])
    with pytest.raises(ShardIndexError, match="not valid JSON"):
        ShardIndex.load(damaged)


def test_one_changed_digit_is_noticed(damaged: Path) -> None:
    text = (damaged / INDEX_NAME).read_text()
    (damaged / INDEX_NAME).write_text(text.replace('"samples": 30', '"samples": 31'))
    with pytest.raises(ShardIndexError, match="was changed after it was written"):
        ShardIndex.load(damaged)


def first_shard(content: Content) -> Content:
    shards = content["shards"]
    assert isinstance(shards, list)
    return shards[0]


def members(content: Content) -> dict[str, dict[str, list[int]]]:
    entry = first_shard(content)["members"]
    assert isinstance(entry, dict)
    return entry


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema_version=3), "schema_version is 3, this halfstep reads 2"),
        (lambda c: c.update(samples=31), "samples is 31, but the shards list 30"),
        (lambda c: c.update(image_size="16"), "image_size is '16', wanted int"),
        (lambda c: c.update(image_size=10**6), "at most 8192 is allowed"),
        (lambda c: c.pop("licence"), "licence is None, wanted dict"),
        (lambda c: first_shard(c).update(name="../../etc/passwd"), "wanted a plain file name"),
        (lambda c: first_shard(c).update(name="/tmp/x.tar"), "wanted a plain file name"),
        (lambda c: first_shard(c).update(name="shard-000001.tar"), "two shards have one name"),
        (lambda c: first_shard(c).update(keys=[]), "an empty shard"),
        (lambda c: first_shard(c).update(keys=["../x"] * 12), "keys must be unique safe paths"),
        (lambda c: members(c).update(pyd=members(c)["txt"]), "extension .pyd is not allowed"),
        (lambda c: members(c)["png"]["sizes"].pop(), "lists of 12, 11 and 12 entries, wanted 12"),
        (lambda c: members(c)["png"]["sizes"].__setitem__(0, 10**9), "do not fit a shard"),
        (lambda c: members(c)["png"]["offsets"].__setitem__(3, -512), r"png\[3\]: offset -512"),
        (lambda c: members(c).update(png=json.loads("[1]")), "wanted an object, got list"),
        (lambda c: members(c)["png"].update(crc32=json.loads("[1.5]")), "crc32 is not a list of whole numbers"),
        (lambda c: c.update(shards={}), "shards is {}, wanted list"),
    ],
)
def test_a_wrong_entry_is_named(
    change: Callable[[Content], object], message: str, edit: Callable[[Callable[[Content], object]], Path]
) -> None:
    with pytest.raises(ShardIndexError, match=message):
        ShardIndex.load(edit(change))


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("a.png", True),
        ("a/b.png", True),
        ("../a.png", False),
        ("a/../../b", False),
        ("/a", False),
        ("c:\\a", False),
        ("a\n", False),
        ("", False),
    ],
)
def test_names_that_lead_out_of_a_folder_are_not_safe(name: str, safe: bool) -> None:
    assert is_safe_member_name(name) is safe


def test_an_index_of_the_first_schema_is_still_read(edit: Callable[[Callable[[Content], object]], Path]) -> None:
    def make_old(content: Content) -> None:
        content["schema_version"] = 1
        del content["derived"]

    index = ShardIndex.load(edit(make_old))
    assert (index.samples, index.derived, index.location) == (30, (), None)


def test_where_the_tars_lie_is_no_part_of_the_identity(packed: Path) -> None:
    text = (packed / "index.json").read_text()
    index = ShardIndex.parse(text, packed, where="here", location="https://example.org/faces")
    moved = index_text(
        image_size=16, licence=index.licence, source=index.source, pack=index.pack, shards=index.shards, location="s3://bucket/faces"
    )
    again = ShardIndex.parse(moved, packed, where="there")
    assert (again.sha256, again.location) == (index.sha256, "s3://bucket/faces")


def test_images_of_several_sizes_are_listed(packed: Path) -> None:
    index = ShardIndex.load(packed)
    sizes = [replace(s, widths=array("q", [20] * s.samples), heights=array("q", [10] * s.samples)) for s in index.shards]
    text = index_text(image_size=None, licence=index.licence, source=index.source, pack=index.pack, shards=sizes)
    again = ShardIndex.parse(text, packed, where="here")
    assert again.size_at(again.shards[0], 3) == (20, 10)
    with pytest.raises(ShardIndexError, match=r"set data.image_size"):
        again.side()
    cut = index_text(image_size=None, licence={}, source={}, pack={}, shards=[replace(sizes[0], heights=array("q", [10] * 11)), *sizes[1:]])
    with pytest.raises(ShardIndexError, match="heights lists 11 entries, wanted 12"):
        ShardIndex.parse(cut, packed, where="here")
