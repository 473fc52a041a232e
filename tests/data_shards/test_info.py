"""`shards info`: the summary counts truly and the contact sheet shows the images."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_shards.index import ShardIndex, index_text
from data_shards.info import contact_sheet, summary, write_contact_sheet


def test_the_summary_counts_what_is_there(packed: Path) -> None:
    found = summary(ShardIndex.load(packed))
    json.dumps(found)
    assert (found["samples"], found["shards"], found["image_size"], found["with_caption"]) == (30, 3, 16, 30)
    assert found["bytes"] == sum(path.stat().st_size for path in packed.glob("*.tar"))
    attributes = found["attributes"]
    assert isinstance(attributes, dict) and attributes["style"] == {"open-peeps": 30}
    assert all(sum(counts.values()) == 30 for counts in attributes.values())


def test_the_contact_sheet_shows_every_image_once(packed: Path, tmp_path: Path) -> None:
    write_contact_sheet(ShardIndex.load(packed), tmp_path / "sheet.png", rows=3, columns=10)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (10 * 34 + 2, 3 * 34 + 2)
        cells = [sheet.crop((2 + x * 34, 2 + y * 34, 34 + x * 34, 34 + y * 34)).tobytes() for y in range(3) for x in range(10)]
    assert len(set(cells)) == 30


def test_a_damaged_image_is_named_instead_of_shown(damaged: Path, flip_bit: Callable[[int, int], None]) -> None:
    shard = ShardIndex.load(damaged).shards[0]
    flip_bit(0, shard.members["png"].offsets[0] + 1)
    with pytest.raises(ValueError, match=f"sample '{shard.keys[0]}'"):
        contact_sheet(ShardIndex.load(damaged))


def test_tars_that_lie_elsewhere_are_shown(packed: Path, tmp_path: Path) -> None:
    index = ShardIndex.load(packed)
    text = index_text(image_size=16, licence=index.licence, source=index.source, pack=index.pack, shards=index.shards, location=str(packed))
    (tmp_path / "index.json").write_text(text)
    elsewhere = ShardIndex.load(tmp_path)
    assert summary(elsewhere)["attributes"] == summary(index)["attributes"]
    assert contact_sheet(elsewhere).tobytes() == contact_sheet(index).tobytes()


def test_a_cut_shard_is_named(damaged: Path) -> None:
    path = damaged / ShardIndex.load(damaged).shards[0].name
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"shard-000000.tar: sample .* is cut or was changed after packing; see `halfstep shards verify"):
        summary(ShardIndex.load(damaged))
