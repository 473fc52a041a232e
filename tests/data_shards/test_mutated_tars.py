"""Shards that were damaged at random: every sample is delivered as it was packed or reported, and no image gets another's caption.

`make test` runs the first 500 cases, `make test-all` the 10,000; HALFSTEP_MUTATIONS_REPORT names a file for their counts."""

import bz2
import gzip
import io
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

from data_shards.config import INDEX_NAME
from data_shards.images import DecodeError
from data_shards.index import ShardIndex, index_text
from data_shards.packing.pack import pack
from data_shards.reading.plan import Plan
from data_shards.reading.read import MicroBatches
from data_shards.reading.sample import BadSampleError
from data_shards.reading.sample_reader import SampleReader
from data_shards.sources.faces import FacesSource
from data_shards.tars.pax import TarError
from data_shards.tars.samples import tar_samples
from data_shards.tars.tar import Member, end_bytes, member_bytes, walk
from data_shards.tars.verify import verify

CASES, CASES_A_TEST, ALL_CASES = 500, 50, 10_000
SECONDS = 2.0
SAMPLES = 12
MEMBERS_A_SAMPLE = 3
Contents = list[tuple[str, bytes]]
Mutation = Callable[[bytes, "Originals", random.Random], bytes]

watched: list[str] = []
watching = False
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "socket.connect", "exec")


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    """Notes whatever would run code, connect or write while damaged bytes are read."""
    if not watching:
        return
    writes = event == "open" and len(arguments) == 3 and bool(cast(int, arguments[2]) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if event in _FORBIDDEN or writes:
        watched.append(f"{event} {arguments}")


sys.addaudithook(_watch)


@dataclass(frozen=True)
class Originals:
    """A packed shard, another one of the same pack, and a twin: the same keys, each with the image and caption of another sample."""

    folder: Path
    index: ShardIndex
    whole: bytes
    other: bytes
    twin: bytes

    origins: dict[bytes, set[tuple[str, str]]]  # content -> the (tar, key) that it was written for


def contents_of(tar: bytes) -> Contents:
    found = [member for member in walk(io.BytesIO(tar), len(tar)) if isinstance(member, Member)]
    return [(member.name, tar[member.offset : member.offset + member.size]) for member in found]


def tar_of(contents: Sequence[tuple[str, bytes]]) -> bytes:
    written = b"".join(member_bytes(name, content) for name, content in contents)
    return written + end_bytes(len(written))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    folder = tmp_path_factory.mktemp("originals")
    index = pack(FacesSource("open-peeps", 2 * SAMPLES), folder / "packed", size=16, samples_per_shard=SAMPLES)
    whole, other = ((folder / "packed" / shard.name).read_bytes() for shard in index.shards)
    contents = contents_of(whole)
    twin = tar_of([(name, moved) for (name, _), (_, moved) in zip(contents, contents_of(other), strict=True)])
    origins: dict[bytes, set[tuple[str, str]]] = {}
    for tar, written in (("whole", whole), ("other", other), ("twin", twin)):
        for name, content in contents_of(written):
            origins.setdefault(content, set()).add((tar, name.partition(".")[0]))
    one = folder / "one"
    one.mkdir()
    shard = index.shards[0]
    (one / INDEX_NAME).write_text(index_text(image_size=16, licence={}, source={}, pack={}, shards=[shard]))
    return Originals(one, ShardIndex.load(one), whole, other, twin, origins)


# Mutations


def flip_bits(tar: bytes, _: Originals, rng: random.Random) -> bytes:
    damaged = bytearray(tar)
    for at in rng.choices(range(len(damaged)), k=rng.choice((1, 1, 2, 8, 64))):
        damaged[at] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def flip_bits_of_headers(tar: bytes, _: Originals, rng: random.Random) -> bytes:
    damaged = bytearray(tar)
    members = [member for member in walk(io.BytesIO(tar), len(tar)) if isinstance(member, Member)]
    for member in rng.sample(members, min(len(members), rng.randint(1, 3))):
        damaged[member.offset - 512 + rng.choice((0, 5, 100, 124, 130, 135, 148, 156, 257, 345, rng.randrange(512)))] ^= 1 << rng.randrange(
            8
        )
    return bytes(damaged)


def cut(tar: bytes, _: Originals, rng: random.Random) -> bytes:
    return tar[: rng.randrange(len(tar))]


def cut_at_block(tar: bytes, _: Originals, rng: random.Random) -> bytes:
    return tar[: rng.randrange(len(tar) // 512 + 1) * 512]


def splice(tar: bytes, originals: Originals, rng: random.Random) -> bytes:
    """Up to some member of this tar, then from some sample of another, as when a download was cut and gone on with."""
    donor = contents_of(rng.choice((originals.other, originals.twin)))
    head = contents_of(tar)[: rng.randrange(len(contents_of(tar)) + 1)]
    return tar_of(head + donor[rng.randrange(SAMPLES) * MEMBERS_A_SAMPLE :])


def splice_bytes(tar: bytes, originals: Originals, rng: random.Random) -> bytes:
    at, start = rng.randrange(len(tar)), rng.randrange(SAMPLES)
    donor = tar_of(contents_of(originals.twin)[start * MEMBERS_A_SAMPLE :])
    return tar[: at // 512 * 512 if rng.random() < 0.5 else at] + donor


def append(tar: bytes, originals: Originals, rng: random.Random) -> bytes:
    return tar + rng.choice((originals.whole, originals.other, originals.twin))


def reorder(tar: bytes, _: Originals, rng: random.Random) -> bytes:
    contents = contents_of(tar)
    rng.shuffle(contents)
    return tar_of(contents)


def repeat_member(tar: bytes, originals: Originals, rng: random.Random) -> bytes:
    contents, donor = contents_of(tar), contents_of(rng.choice((tar, originals.twin)))
    if contents and donor:
        contents.insert(rng.randrange(len(contents) + 1), rng.choice(donor))
    return tar_of(contents)


def drop_member(tar: bytes, _: Originals, rng: random.Random) -> bytes:
    contents = contents_of(tar)
    if contents:
        del contents[rng.randrange(len(contents))]
    return tar_of(contents)


def repeat_blocks(tar: bytes, _: Originals, rng: random.Random) -> bytes:
    at, count = rng.randrange(len(tar) // 512 + 1) * 512, rng.randint(1, 6) * 512
    return tar[: at + count] + tar[at:]


def drop_blocks(tar: bytes, _: Originals, rng: random.Random) -> bytes:
    at = rng.randrange(len(tar) // 512 + 1) * 512
    return tar[:at] + tar[at + rng.randint(1, 6) * 512 :]


def zero(tar: bytes, _: Originals, rng: random.Random) -> bytes:
    at = rng.randrange(len(tar))
    count = min(len(tar) - at, rng.choice((1, 12, 512, 1024, 4096, 20_000)))
    return tar[:at] + bytes(count) + tar[at + count :]


def zero_blocks(tar: bytes, _: Originals, rng: random.Random) -> bytes:
    at, count = rng.randrange(len(tar) // 512 + 1) * 512, rng.randint(1, 4) * 512
    return tar[:at] + bytes(count) + tar[at + (count if rng.random() < 0.5 else 0) :]


def noise(tar: bytes, _: Originals, rng: random.Random) -> bytes:
    at, count = rng.randrange(len(tar)), rng.choice((1, 100, 512, 5000))
    return tar[:at] + rng.randbytes(count) + tar[at + count :]


def compress(tar: bytes, _: Originals, rng: random.Random) -> bytes:
    return gzip.compress(tar, 1) if rng.random() < 0.7 else bz2.compress(tar, 1)


ONE: tuple[Mutation, ...] = (
    flip_bits,
    flip_bits_of_headers,
    cut,
    cut_at_block,
    splice,
    splice_bytes,
    append,
    reorder,
    repeat_member,
    drop_member,
    repeat_blocks,
    drop_blocks,
    zero,
    zero_blocks,
    noise,
    compress,
)
# A second mutation on top of one. Not what takes members away in whole: half a sample of one tar and the other half of its twin, with
# nothing repeated, is a tar like any other.
TWO: tuple[Mutation, ...] = (flip_bits, flip_bits_of_headers, cut, cut_at_block, append, repeat_blocks, zero, noise, compress)


def mutated(number: int, originals: Originals) -> tuple[str, bytes]:
    rng = random.Random(number)
    first = ONE[number % len(ONE)]
    tar, name = first(originals.whole, originals, rng), first.__name__
    if tar and rng.random() < 0.3:
        second = rng.choice(TWO)
        tar, name = second(tar, originals, rng), f"{name}, {second.__name__}"
    return name, tar


# What must hold


def read_all_samples(originals: Originals, counts: Counter[str]) -> None:
    """Each sample of the index is what was packed, or reported."""
    index = originals.index
    packed = dict(contents_of(originals.whole))
    reader = SampleReader(index)
    for position, key in enumerate(index.shards[0].keys):
        try:
            assert reader.content(0, position, "png") == packed[f"{key}.png"]
            caption, pixels = reader.caption(0, position), reader.images([(0, position)])
        except (DecodeError, OSError) as error:
            assert str(error)
            counts["reported"] += 1
            continue
        assert caption == packed[f"{key}.txt"].decode() and pixels.shape == (1, 3, 16, 16)
        counts["delivered"] += 1
    for file in list(reader._files.values()):
        file.close()


def read_micro_batch(originals: Originals, counts: Counter[str]) -> None:
    """Under `skip`, each sample of the plan is in the batch or in what was replaced."""
    plan = Plan(originals.index.samples_per_shard, 0, global_batch_size=SAMPLES, micro_batch_size=SAMPLES)
    batches = MicroBatches(originals.index, plan, on_bad_sample="skip", fields=("image", "caption"))
    packed = dict(contents_of(originals.whole))
    try:
        batch = batches[0, 0]
    except BadSampleError as error:
        assert error.bad.key in originals.index.shards[0].keys
        counts["micro-batches given up"] += 1
        return
    assert set(originals.index.shards[0].keys) - set(batch.keys) <= {bad.key for bad in batch.replaced}
    assert list(batch.captions) == [packed[f"{key}.txt"].decode() for key in batch.keys]
    counts["micro-batches"] += 1


def index_anew(tar: bytes, originals: Originals, counts: Counter[str]) -> None:
    """Each sample that a new index has holds what was written for one sample; damage inside data is beyond a tar without hashes."""
    try:
        samples, _, report = tar_samples(io.BytesIO(tar), len(tar))
    except TarError as error:
        assert str(error)
        counts["tars refused"] += 1
        return
    counts["tars indexed"] += 1
    counts["samples left out"] += sum(report.left_out.values())
    for key, sample in samples.items():
        parts = [tar[offset : offset + size] for offset, size, _ in sample.members.values()]
        known = [origins for part in parts if (origins := originals.origins.get(part))]
        assert not known or key in {found for _, found in set.intersection(*known)}, f"{key} is of several samples"
        counts["samples indexed"] += 1


def run_case(number: int, originals: Originals, counts: Counter[str]) -> None:
    global watching
    name, tar = mutated(number, originals)
    (originals.folder / originals.index.shards[0].name).write_bytes(tar)
    started, before = time.monotonic(), counts["delivered"] + counts["reported"]
    watching = True
    try:
        read_all_samples(originals, counts)
        if number % 10 == 0:
            read_micro_batch(originals, counts)
            assert verify(originals.folder) or tar == originals.whole
        index_anew(tar, originals, counts)
    except Exception as error:
        raise AssertionError(f"case {number} ({name}): {type(error).__name__}: {error}") from error
    finally:
        watching = False
    assert counts["delivered"] + counts["reported"] - before == SAMPLES, f"case {number} ({name})"
    assert time.monotonic() - started < SECONDS, f"case {number} ({name})"
    assert not watched, f"case {number} ({name}): {watched}"
    counts["cases"] += 1


@pytest.fixture(scope="module")
def totals(originals: Originals) -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()
    yield counts
    path = os.environ.get("HALFSTEP_MUTATIONS_REPORT")
    if path is not None:
        Path(path).write_text(json.dumps(dict(counts), indent=1))


@pytest.mark.parametrize(
    "first",
    [pytest.param(first, marks=[] if first < CASES else [pytest.mark.all_cases]) for first in range(0, ALL_CASES, CASES_A_TEST)],
)
def test_every_sample_is_delivered_whole_or_reported(first: int, originals: Originals, totals: Counter[str]) -> None:
    for number in range(first, first + CASES_A_TEST):
        run_case(number, originals, totals)


def test_an_undamaged_shard_is_delivered_and_indexed_whole(originals: Originals) -> None:
    counts: Counter[str] = Counter()
    (originals.folder / originals.index.shards[0].name).write_bytes(originals.whole)
    read_all_samples(originals, counts)
    index_anew(originals.whole, originals, counts)
    assert counts == {"delivered": SAMPLES, "tars indexed": 1, "samples left out": 0, "samples indexed": SAMPLES}


def test_a_shard_that_is_gone_is_reported_and_no_crash(originals: Originals) -> None:
    (originals.folder / originals.index.shards[0].name).unlink(missing_ok=True)
    counts: Counter[str] = Counter()
    read_all_samples(originals, counts)
    assert counts == {"reported": SAMPLES}


def test_a_tar_that_goes_on_with_its_twin_crosses_no_pair(originals: Originals) -> None:
    """The damage that WebDataset turns into the image of one sample with the caption of another."""
    head, twin = contents_of(originals.whole), contents_of(originals.twin)
    for start in range(SAMPLES):
        for end in range(len(head) + 1):
            index_anew(tar_of(head[:end] + twin[start * MEMBERS_A_SAMPLE :]), originals, Counter())
