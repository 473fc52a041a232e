"""The reader delivers the plan's samples bit for bit, names what it can't read, and keeps no state."""

import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_shards.config import OnBadSample
from data_shards.images import READERS, DecodeError, image_pixels
from data_shards.index import ShardIndex, index_text
from data_shards.packing.write import PackedSample, write_shard
from data_shards.reading.decode import attribute_strings, caption_text
from data_shards.reading.plan import Plan
from data_shards.reading.read import MicroBatches, loader, read_all
from data_shards.reading.sample import BadSampleError, MicroBatch
from data_shards.sources.faces import FacesSource

FlipBit = Callable[[int, int], None]


def batches_of(folder: Path, *, on_bad_sample: OnBadSample = "raise", seed: int = 0) -> MicroBatches:
    index = ShardIndex.load(folder)
    plan = Plan(index.samples_per_shard, seed, global_batch_size=10, micro_batch_size=5)
    return MicroBatches(index, plan, on_bad_sample=on_bad_sample, fields=("image", "caption", "attributes"))


def load(batches: MicroBatches, *, start: int = 0, stop: int = 6, workers: int = 0, indices: range = range(2)) -> list[MicroBatch]:
    return list(loader(batches, start_step=start, stop_step=stop, indices=indices, workers=workers))


def digest(delivered: Sequence[MicroBatch]) -> list[tuple[object, ...]]:
    return [(b.keys, b.captions, b.attributes, b.replaced, b.images.numpy().tobytes()) for b in delivered]


def write_shards(folder: Path, images: Sequence[bytes], *, extension: str = "png", texts: bytes = b"{}", image_size: int = 16) -> None:
    """A whole, honestly indexed shard of any contents."""
    with (folder / "shard-000000.tar").open("wb") as file:
        samples = [PackedSample(f"s{i}", ((extension, content), ("json", texts))) for i, content in enumerate(images)]
        shard = write_shard(file, "shard-000000.tar", samples)
    (folder / "index.json").write_text(index_text(image_size=image_size, licence={}, source={}, pack={}, shards=[shard]))


def png(size: tuple[int, int], mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 200).save(file, "PNG")
    return file.getvalue()


def test_images_are_the_packed_ones(packed: Path) -> None:
    for batch in load(batches_of(packed)):
        assert (
            batch.images.dtype == torch.uint8
            and batch.images.shape == (5, 3, 16, 16)
            and batch.images.is_contiguous(memory_format=torch.channels_last)
        )
        for key, image, caption in zip(batch.keys, batch.images, batch.captions, strict=True):
            face = FacesSource("open-peeps", 30).row(int(key[-8:]), 16)
            assert isinstance(face.image, Image.Image)
            assert image.permute(1, 2, 0).contiguous().numpy().tobytes() == face.image.tobytes()
            assert caption == face.caption


def test_an_epoch_delivers_every_sample_once(packed: Path) -> None:
    keys = [key for batch in load(batches_of(packed), stop=3) for key in batch.keys]
    assert sorted(keys) == [f"open-peeps_0_{face:08d}" for face in range(30)]


def test_starting_anywhere_and_any_number_of_workers_give_the_same_batches(packed: Path) -> None:
    whole = digest(load(batches_of(packed)))
    assert digest(load(batches_of(packed), start=4)) == whole[8:]
    assert digest(load(batches_of(packed), start=2, workers=2)) == whole[4:]
    assert digest(load(batches_of(packed), indices=range(1, 2))) == whole[1::2]


def test_a_loader_draws_nothing_from_the_global_generator(packed: Path) -> None:
    before = torch.get_rng_state()
    load(batches_of(packed), stop=1, workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_texts_are_read_only_where_asked_for(packed: Path) -> None:
    index = ShardIndex.load(packed)
    batch = read_all(index, limit=7)
    assert len(batch.images) == 7 and batch.captions == () and batch.attributes == ()
    assert read_all(index, ("image", "attributes"), limit=2).attributes[0]["style"] == "open-peeps"


def test_a_copy_in_another_process_opens_its_own_files(packed: Path) -> None:
    batches = batches_of(packed)
    first = digest([batches[0, 0]])
    assert digest([pickle.loads(pickle.dumps(batches))[0, 0]]) == first  # noqa: S301


def test_a_plan_of_other_shards_is_refused(packed: Path) -> None:
    with pytest.raises(ValueError, match="made for other shards"):
        MicroBatches(ShardIndex.load(packed), Plan((30,), 0, 10, 5))


def place_of(folder: Path, key: str, extension: str) -> tuple[int, int]:
    """Shard and data offset of a member."""
    for number, shard in enumerate(ShardIndex.load(folder).shards):
        if key in shard.keys:
            return number, shard.members[extension].offsets[shard.keys.index(key)]
    raise AssertionError(key)


@pytest.mark.parametrize(
    ("extension", "byte", "reason"),
    [
        ("png", 20, "do not match the crc32 in the index: they were changed after packing"),
        ("txt", 3, "do not match the crc32"),
        ("json", 3, "do not match the crc32"),
        ("png", -512, "its tar header is damaged: header checksum is"),
        ("png", -512 + 148, "its tar header is damaged: header checksum is"),
        ("png", -512 + 130, "its tar header is damaged: header checksum is"),
    ],
)
def test_a_flipped_bit_is_named_with_shard_key_and_offset(extension: str, byte: int, reason: str, damaged: Path, flip_bit: FlipBit) -> None:
    key = "open-peeps_0_00000007"
    shard, offset = place_of(damaged, key, extension)
    flip_bit(shard, offset + byte)
    image_offset = place_of(damaged, key, "png")[1]
    with pytest.raises(BadSampleError, match=rf"shard-00000{shard}\.tar: sample '{key}' at byte {image_offset}: .*{reason}"):
        load(batches_of(damaged), stop=3)


def test_a_worker_process_names_a_bad_sample_as_plainly(damaged: Path, flip_bit: FlipBit) -> None:
    shard, offset = place_of(damaged, "open-peeps_0_00000007", "png")
    flip_bit(shard, offset)
    with pytest.raises(BadSampleError) as alone:
        load(batches_of(damaged), stop=3)
    with pytest.raises(BadSampleError) as worker:
        load(batches_of(damaged), stop=3, workers=1)
    assert str(worker.value) == str(alone.value) and "\n" not in str(worker.value)
    assert "halfstep shards verify" in str(worker.value) and "data.on_bad_sample=skip" in str(worker.value)


def test_skip_replaces_a_bad_sample_by_the_same_rule_everywhere(damaged: Path, flip_bit: FlipBit) -> None:
    key = "open-peeps_0_00000007"
    shard, offset = place_of(damaged, key, "png")
    whole = load(batches_of(damaged))
    flip_bit(shard, offset)
    mended = load(batches_of(damaged, on_bad_sample="skip"))
    assert digest(load(batches_of(damaged, on_bad_sample="skip"), start=2, workers=1)) == digest(mended)[4:]
    assert [bad.key for batch in mended for bad in batch.replaced] == [key, key]  # once in each of two epochs
    for before, after in zip(whole, mended, strict=True):
        assert key not in after.keys and len(after.keys) == 5
        kept = [at for at, name in enumerate(before.keys) if name != key]
        assert [after.keys[at] for at in kept] == [before.keys[at] for at in kept]


def test_a_tar_cut_at_a_member_boundary_is_named(damaged: Path) -> None:
    index = ShardIndex.load(damaged)
    path = damaged / index.shards[1].name
    offset = index.shards[1].members["png"].offsets[6] - 512
    os.truncate(path, offset)
    with pytest.raises(BadSampleError, match=r"shard-000001\.tar.*the shard is cut"):
        load(batches_of(damaged), stop=3)
    lost = {bad.key for batch in load(batches_of(damaged, on_bad_sample="skip"), stop=3) for bad in batch.replaced}
    assert lost >= set(index.shards[1].keys[6:]) and not lost & set(index.shards[0].keys)


@pytest.mark.parametrize("remove", [True, False])
def test_a_missing_or_empty_shard_is_named(remove: bool, damaged: Path) -> None:
    path = damaged / "shard-000002.tar"
    path.unlink()
    if not remove:
        path.touch()
    with pytest.raises(BadSampleError, match=r"shard-000002\.tar"):
        load(batches_of(damaged), stop=3)


def test_when_nothing_is_left_skip_gives_up(damaged: Path) -> None:
    for path in damaged.glob("*.tar"):
        path.unlink()
    with pytest.raises(BadSampleError, match="No such file"):
        load(batches_of(damaged, on_bad_sample="skip"), stop=1)


def test_swapped_members_are_named(damaged: Path) -> None:
    index = ShardIndex.load(damaged)
    first, second = (damaged / shard.name for shard in index.shards[:2])
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    with pytest.raises(BadSampleError, match=r"the tar holds 'open-peeps|header is damaged|do not match"):
        load(batches_of(damaged), stop=3)


def test_an_image_of_another_size_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    bomb = png((20_000, 20_000), "1")
    write_shards(tmp_path, [png((16, 16)), bomb])
    with pytest.raises(BadSampleError, match=r"'s1' .*the image is 20000 x 20000 pixels, the index says 16 x 16"):
        read_all(ShardIndex.load(tmp_path))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_other_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    write_shards(tmp_path, [png((16, 16), mode)])
    assert read_all(ShardIndex.load(tmp_path)).images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("content", [b"", b"GIF89a" + bytes(50), b"cos\nsystem\n(S'touch /tmp/x'\ntR.", png((16, 16))[:45]])
def test_bytes_that_are_no_png_are_refused(content: bytes, tmp_path: Path) -> None:
    write_shards(tmp_path, [content])
    with pytest.raises(BadSampleError, match=r"'s0' at byte 512: the \.png can't be decoded"):
        read_all(ShardIndex.load(tmp_path))


@given(st.sampled_from(sorted(READERS)), st.binary(max_size=300), st.data())
def test_damaged_images_raise_only_what_we_catch(extension: str, noise: bytes, data: st.DataObject) -> None:
    file = io.BytesIO()
    Image.radial_gradient("L").resize((16, 16)).convert("RGB").save(file, {"png": "PNG", "webp": "WEBP"}.get(extension, "JPEG"))
    content = bytearray(file.getvalue())
    at = data.draw(st.integers(0, len(content)))
    content[at : at + len(noise)] = noise
    with suppress(DecodeError):
        assert len(image_pixels(bytes(content), extension, size=(16, 16))) == 768


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b'{"attributes": {"a": 1}}', b'{"attributes": []}', b"[" * 100_000])
def test_attributes_that_are_not_strings_in_an_object_are_refused(content: bytes) -> None:
    with pytest.raises(DecodeError, match=r"the \.json is not"):
        attribute_strings(content)


def test_attributes_may_be_missing_and_captions_must_be_utf_8() -> None:
    assert attribute_strings(json.dumps({"file": "a.png"}).encode()) == {}
    with pytest.raises(DecodeError, match="not UTF-8: invalid start byte at byte 1"):
        caption_text(b"a\xff")


TORCH_FREE = ("config", "images", "index", "info", "packing.pack", "reading.plan", "sources.faces", "sources.folder", "tars.verify")


@pytest.mark.parametrize("module", TORCH_FREE)
def test_everything_but_reading_leaves_torch_out(module: str) -> None:
    program = f"import data_shards.{module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
