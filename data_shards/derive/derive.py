"""From shards to others, shard by shard and batch by batch, on all ranks: what captioners, encoders and models that draw share."""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, final

import torch

from data_shards import ranks
from data_shards.config import INDEX_NAME, is_image
from data_shards.derive.files import MAX_NAME_CHARACTERS, Entry, Made, PartFile, Row, write_tar
from data_shards.derive.members import MemberReader
from data_shards.derive.progress import Progress, append_line
from data_shards.derive.request import RUN_NAME, WORK_NAME, DeriveJob, check_same, is_finished
from data_shards.files import json_text, replace_file
from data_shards.images import DecodeError
from data_shards.index import Json, Shard, ShardIndex, index_text

logger = logging.getLogger(__name__)

DONE, CALL_AGAIN = 0, 75  # the worker's exit codes
ROUND_SECONDS = 5.0  # of work, between two meetings of the ranks; a batch that has begun is finished first
LISTED_LEFT_OUT = 100  # in the index; all are counted


class Asked(Protocol):
    """Whether this rank was asked to stop."""

    @property
    def reason(self) -> str:
        """By what; empty while it was not."""
        ...


class Beat(Protocol):
    """The rank's heartbeat, which ends a rank that says nothing for too long."""

    def phase(self, name: str, step: int) -> None:
        """Say what is done from now on."""
        ...


Sample = TypeVar("Sample")


class Work(Protocol[Sample]):
    """What is made of samples by frozen models, a batch at a time; equal batches give equal results."""

    @property
    def extensions(self) -> Sequence[str]:
        """Of the members that it adds or puts in place of old ones."""
        ...

    @property
    def keeps_images(self) -> bool:
        """Whether images are copied."""
        ...

    @property
    def models(self) -> Json:
        """The models by name and sha256; ranks and attempts must agree on them."""
        ...

    def read(self, reader: MemberReader, shard: int, position: int) -> Sample:
        """What it needs of a sample. Raises: DecodeError if that is missing or damaged."""
        ...

    def make(self, samples: Sequence[Sample]) -> Sequence[tuple[Mapping[str, bytes], object]]:
        """Of each sample the new members and a note for `facts`."""
        ...

    def facts(self, notes: Sequence[object]) -> Json:
        """What is said of all samples in the index, from their notes."""
        ...


def derive(job: DeriveJob, out: Path, work: Work[Sample], *, stop: Asked, beat: Beat) -> int:
    """Make OUT, or go on with it: each rank its share of the shards that are not finished. Collective.

    Returns DONE, or CALL_AGAIN if a rank was asked to stop; what was finished until then is kept.
    Raises: ValueError for shards, a model or a bad sample that stop it; OSError; PeerLost."""
    index = ShardIndex.load(job.shards)
    if index.sha256 != job.shards_sha256:
        raise ValueError(f"{job.shards}: its index has changed since the command was given; give the command again")
    return derive_from(index, job, out, work, stop=stop, beat=beat)


def derive_from(index: ShardIndex, job: DeriveJob, out: Path, work: Work[Sample], *, stop: Asked, beat: Beat) -> int:
    """As derive, from an index that need not lie on a disk: one of samples without members says only which are to be made. Collective."""
    _check_names(index, work)
    _agree(work.models)
    ranks.barrier()  # the first to come waits here for the others' models, not in what follows
    todo = _start(out, job, index, work) if ranks.is_rank_0() else []
    todo = json.loads(ranks.all_gather_text(json.dumps(todo))[0])
    progress = Progress(out / RUN_NAME, job, done=index.samples - sum(index.shards[number].samples for number in todo))
    batches = _batches(_Place(index, out, job, beat), todo[ranks.rank() :: ranks.world_size()], work)
    if not _work_in_rounds(batches, progress, stop, beat):
        return CALL_AGAIN
    beat.phase("commit", 0)
    if ranks.is_rank_0():
        _finish(out, job, index, work)
    beat.phase("reduce", 0)
    ranks.barrier()
    return DONE


def _work_in_rounds(batches: Iterator["_Finished"], progress: Progress, stop: Asked, beat: Beat) -> bool:
    """Work until every rank is through (True) or one was asked to stop (False). Collective.

    A rank that is through meets the others every few seconds until they are, so that none waits long in one collective."""
    is_through, number = False, 0
    while True:
        until, new, old, has_begun = time.monotonic() + ROUND_SECONDS, 0, 0, False
        while not (is_through or stop.reason) and (time.monotonic() < until or not has_begun):
            batch = next(batches, None)
            is_through, has_begun = batch is None, True
            new, old = new + (batch.new if batch else 0), old + (batch.old if batch else 0)
        beat.phase("reduce", number)
        rows = ranks.all_gather_tensor(torch.tensor([int(is_through), int(bool(stop.reason)), new, old]))
        progress.report(new=int(rows[:, 2].sum()), old=int(rows[:, 3].sum()))
        if bool(rows[:, 0].all()):
            return True
        if bool(rows[:, 1].any()):
            logger.info("asked to stop (%s): every finished batch is kept", stop.reason or "another rank")
            return False
        number += 1


@final
@dataclass(frozen=True)
class _Place:
    """What is read, where it is written."""

    index: ShardIndex
    out: Path
    job: DeriveJob
    beat: Beat

    def part(self, shard: Shard) -> Path:
        return self.out / WORK_NAME / f"{shard.name}.part"

    def entry(self, shard: Shard) -> Path:
        return _entry_path(self.out, shard)


@final
@dataclass(frozen=True)
class _Finished:
    """Samples that are finished: by this attempt (new), or found to be by an earlier one (old)."""

    new: int = 0
    old: int = 0


def _entry_path(out: Path, shard: Shard) -> Path:
    return out / WORK_NAME / f"{shard.name}.json"


def _batches(place: _Place, numbers: Sequence[int], work: Work[Sample]) -> Iterator[_Finished]:
    """Finish shard after shard; gives how many samples each batch has, and a shard that is begun again.

    A batch is BATCH_SIZE positions of a shard, whoever makes it: sums in a model may depend on what else is in the batch."""
    reader, size, count = MemberReader(place.index), place.job.request.batch_size, 0
    ledger = place.out / RUN_NAME / "ledger" / f"rank_{ranks.rank()}.jsonl"
    for number in numbers:
        shard = place.index.shards[number]
        reader.close_but(number)
        part = PartFile(place.part(shard))
        starts = range(0, shard.samples, size)
        yield _Finished(old=min(part.batches * size, shard.samples))
        for batch in range(part.batches, len(starts)):
            began = time.monotonic()
            positions = range(starts[batch], min(starts[batch] + size, shard.samples))
            place.beat.phase("data", count)
            samples, bad = _read(place, reader, work, number, positions)
            place.beat.phase("compute", count)
            made = work.make(list(samples.values())) if samples else []
            place.beat.phase("write", count)
            good = [Made(position, members, note) for position, (members, note) in zip(samples, made, strict=True)]
            part.append(sorted((*good, *bad), key=lambda one: one.position))
            line = {"shard": shard.name, "batch": batch, "samples": len(positions), "seconds": round(time.monotonic() - began, 3)}
            append_line(ledger, line)
            count += 1
            yield _Finished(new=len(positions))
        place.beat.phase("stage", count)
        _commit_shard(place, reader, work, number, part)
        part.close()
        place.part(shard).unlink()


def _read(place: _Place, reader: MemberReader, work: Work[Sample], number: int, positions: range) -> tuple[dict[int, Sample], list[Made]]:
    """The samples of a batch by position, and those that are left out.

    Raises: ValueError naming the first bad one, under the policy `stop`."""
    samples: dict[int, Sample] = {}
    bad: list[Made] = []
    for position in positions:
        try:
            samples[position] = work.read(reader, number, position)
        except DecodeError as error:
            shard = place.index.shards[number]
            if place.job.request.on_bad_sample == "stop":
                raise _bad_sample(place, shard, shard.keys[position], error) from None
            bad.append(Made(position, bad=str(error)))
    return samples, bad


def _bad_sample(place: _Place, shard: Shard, key: str, error: DecodeError) -> ValueError:
    return ValueError(
        f"{shard.name}: sample {key!r}: {error}; see `halfstep shards verify {place.index.root}`, "
        "or leave such samples out with --on-bad-sample skip"
    )


def _commit_shard(place: _Place, reader: MemberReader, work: Work[Sample], number: int, part: PartFile) -> None:
    """Write the new tar, then its name, then its entry."""
    shard = place.index.shards[number]
    left_out: list[tuple[str, str]] = []
    notes: list[object] = []
    lists_sizes = work.keeps_images and shard.widths is not None

    def samples() -> Iterator[Row]:
        for made in part.read():
            key, old = shard.keys[made.position], None
            reason = made.bad
            if not reason:
                try:
                    old = reader.contents(number, made.position)
                except DecodeError as error:  # of a member that was not looked at before
                    if place.job.request.on_bad_sample == "stop":
                        raise _bad_sample(place, shard, key, error) from None
                    reason = str(error)
            if old is None:
                left_out.append((key, reason))
                continue
            notes.append(made.note)
            copied = {name: content for name, content in old.items() if work.keeps_images or not is_image(name)}
            yield key, {**copied, **made.members}, place.index.size_at(shard, made.position) if lists_sizes else None

    written = write_tar(place.out / shard.name, samples())
    Entry(written, tuple(left_out), tuple(notes)).write(place.entry(shard))


def _start(out: Path, job: DeriveJob, index: ShardIndex, work: Work[Sample]) -> list[int]:
    """Note what is made here, drop half-written files, and find the shards that are not finished; for rank 0."""
    wanted = {**job.wanted(), "models": work.models}
    check_same(out, wanted)
    if is_finished(out):
        return []
    (out / WORK_NAME).mkdir(parents=True, exist_ok=True)
    replace_file(out / WORK_NAME / "wanted.json", json_text(wanted))
    (out / RUN_NAME / "ledger").mkdir(exist_ok=True)
    for left in out.glob("*.tar.tmp"):
        left.unlink()
    todo = [number for number, shard in enumerate(index.shards) if not _is_kept(out, shard)]
    hosts = socket.gethostname()
    line = {"shards_left": len(todo), "world_size": ranks.world_size(), "hosts": [hosts], "job_id": os.environ.get("HALFSTEP_JOB_ID")}
    append_line(out / RUN_NAME / "attempts.jsonl", line)
    if ranks.world_size() > len(todo) > 0:
        logger.warning("%d ranks share %d unfinished shards: some have nothing to do", ranks.world_size(), len(todo))
    return todo


def _is_kept(out: Path, shard: Shard) -> bool:
    """Whether an earlier attempt finished the shard; its tar was on the disk before its entry."""
    entry = Entry.read(_entry_path(out, shard))
    if entry is None:
        return False
    path = out / shard.name
    return entry.shard is None or (path.is_file() and path.stat().st_size == entry.shard.size_bytes)


def _finish(out: Path, job: DeriveJob, index: ShardIndex, work: Work[Sample]) -> None:
    """Write OUT's index, last of all, and take the working folder away; for rank 0."""
    if is_finished(out):
        return
    entries = [Entry.read(_entry_path(out, shard)) for shard in index.shards]
    whole = [entry for entry in entries if entry is not None]
    assert len(whole) == len(entries), "every rank has said that its shards are finished"
    shards = [entry.shard for entry in whole if entry.shard is not None]
    left_out = [{"key": key, "reason": reason} for entry in whole for key, reason in entry.left_out]
    if not shards:
        raise ValueError(f"{job.shards}: no sample could be used; the first one: {left_out[0]}")
    facts = work.facts([note for entry in whole for note in entry.notes])
    done = {
        **job.wanted(),
        "models": work.models,
        **facts,
        "samples": sum(shard.samples for shard in shards),
        "left_out": len(left_out),
        "left_out_samples": left_out[:LISTED_LEFT_OUT],
    }
    text = index_text(
        image_size=index.image_size if work.keeps_images else None,
        licence=index.licence,
        source=index.source,
        pack=index.pack,
        shards=shards,
        derived=[*index.derived, done],
    )
    replace_file(out / INDEX_NAME, text)
    remove_work(out)


def remove_work(out: Path) -> None:
    """Take OUT's working folder away, if there is one."""
    if (out / WORK_NAME).exists():
        for path in (out / WORK_NAME).iterdir():
            path.unlink()
        (out / WORK_NAME).rmdir()


def _check_names(index: ShardIndex, work: Work[Sample]) -> None:
    """Raises: ValueError for a key that is too long for a tar with a new member's extension behind it."""
    longest = max((f"{key}.{extension}" for shard in index.shards for key in shard.keys for extension in work.extensions), key=len)
    if len(longest) > MAX_NAME_CHARACTERS:
        raise ValueError(f"{index.root}: {longest} is longer than the {MAX_NAME_CHARACTERS} characters of a tar's name; shorten its key")


def _agree(models: Json) -> None:
    """Raises: ValueError if ranks have other models than rank 0 has. Collective."""
    texts = ranks.all_gather_text(json.dumps(models, sort_keys=True))
    hosts = ranks.all_gather_text(socket.gethostname())
    other = next((rank for rank, text in enumerate(texts) if text != texts[0]), None)
    if other is not None:
        raise ValueError(
            f"rank {other} on {hosts[other]} has other models ({texts[other]}) than rank 0 on {hosts[0]} ({texts[0]}); "
            "give a --revision, or a folder that all hosts see"
        )
