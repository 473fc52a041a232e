"""The tensors of checkpoints: which rank writes what, staging, writing, and reading onto any number of ranks and any engine."""

import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from data_shards import ranks
from trainer.engines.engine import Shard, State
from trainer.manifest import Checkpoint, committed, read_checkpoint, verify_files

logger = logging.getLogger(__name__)

_FLOAT_BYTES = 4
_PIECE_BYTES = 1 << 24  # written and hashed at a time


@final
@dataclass(frozen=True)
class Piece:
    """Elements start ... start + count - 1 of a logical tensor, in row-major order, and the rank that writes them."""

    tensor: str
    """part/name."""
    shape: tuple[int, ...]
    start: int
    count: int
    rank: int

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """As its file says: that of the whole tensor if it is whole, else flat."""
        return self.shape if self.count == torch.Size(self.shape).numel() else (self.count,)


def file_name(rank: int) -> str:
    """The file that a rank writes."""
    return f"rank_{rank:04d}.safetensors"


def named_shards(state: State) -> dict[str, Shard]:
    """A state's shards by part/name."""
    return {f"{part}/{name}": shard for part, shards in state.items() for name, shard in shards.items()}


def agree_on_pieces(state: State) -> list[Piece]:
    """Who writes what, the same list on all ranks: every element once, equal parts of equal ranks spread by size.

    Raises: RuntimeError if the ranks' shards overlap or leave a gap. Collective.
    Source: the plan is made by torch.distributed.checkpoint's DefaultSavePlanner."""
    own = {name: (shard.shape, shard.start, shard.values.numel()) for name, shard in named_shards(state).items()}
    held = [json.loads(text) for text in ranks.all_gather_text(json.dumps(own))]
    plans = [SavePlan([_write_item(name, *place) for name, place in places.items()]) for places in held]
    shapes = {name: tuple(shape) for places in held for name, (shape, _, _) in places.items()}
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner({}, is_coordinator=True)
    try:
        agreed, _ = planner.create_global_plan(plans)
    except ValueError as error:
        raise RuntimeError(f"the ranks' shards do not make whole tensors: {error}") from error
    return [
        Piece(item.index.fqn, shapes[item.index.fqn], data.chunk.offsets[0], data.chunk.sizes[0], rank)
        for rank, plan in enumerate(agreed)
        for item in plan.items
        if (data := item.tensor_data) is not None
    ]


def tensors_record(pieces: Iterable[Piece]) -> dict[str, dict[str, object]]:
    """The manifest's list of tensors: shape, and where each piece lies."""
    record: dict[str, dict[str, object]] = {}
    for piece in pieces:
        entry = record.setdefault(piece.tensor, {"shape": list(piece.shape), "pieces": []})
        places = entry["pieces"]
        assert isinstance(places, list)
        places.append([file_name(piece.rank), piece.start, piece.count])
    return record


@final
class Staging:
    """A copy of the pieces that this rank writes, laid out as its file; the memory is taken once and used again.

    On a GPU the copy runs behind the steps before and in front of those after, into pinned memory, and nothing waits."""

    def __init__(self, state: State, pieces: Sequence[Piece]) -> None:
        self.pieces = [piece for piece in pieces if piece.rank == ranks.rank()]
        shards = named_shards(state)
        held = [shards[piece.tensor] for piece in self.pieces]
        cuda = any(shard.values.is_cuda for shard in shards.values())
        self.buffer = torch.empty(sum(piece.count for piece in self.pieces), pin_memory=cuda)
        parts = self.buffer.split([piece.count for piece in self.pieces]) if self.pieces else ()
        shaped = [(part.view(shard.values.shape), shard) for part, shard in zip(parts, held, strict=True)]
        self.pairs = [(part, shard.values) for part, shard in shaped if shard.packed is None]
        self.packed = [(part, shard.packed) for part, shard in shaped if shard.packed is not None]
        self.copied = torch.cuda.Event() if cuda else None
        self.header = _header(self.pieces)

    @property
    def size_bytes(self) -> int:
        """Of this rank's file."""
        return len(self.header) + self.buffer.numel() * _FLOAT_BYTES

    @torch.no_grad()
    def copy(self) -> None:
        """Take the state as it is now."""
        if self.pairs:
            torch._foreach_copy_([part for part, _ in self.pairs], [source for _, source in self.pairs], non_blocking=True)
        for part, packed in self.packed:
            part.copy_(packed.unpack(), non_blocking=True)
        if self.copied:
            self.copied.record()

    def write(self, path: Path) -> Mapping[str, int | str]:
        """Write the copy as a safetensors file and wait until the disk holds it; its size and sha256. For any thread."""
        if self.copied:
            self.copied.synchronize()
        content = self.buffer.numpy().data.cast("B")
        digest = hashlib.sha256()
        with open(path, "xb", buffering=0) as file:
            for part in (self.header, *(content[at : at + _PIECE_BYTES] for at in range(0, len(content), _PIECE_BYTES))):
                digest.update(part)
                _write_all(file.fileno(), part)
            os.fsync(file.fileno())
        return {"bytes": self.size_bytes, "sha256": digest.hexdigest()}


def agreed_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint whose files all verify, the files divided among the ranks; a damaged one is named and passed over.

    Raises: RuntimeError if the ranks do not see the same one. Collective."""
    for step in json.loads(ranks.all_gather_text(json.dumps([step for step, _ in committed(run_dir)]))[0])[::-1]:
        path = run_dir / "checkpoints" / f"step_{step:06d}"
        checkpoint, verdict = None, ""
        try:
            checkpoint = read_checkpoint(path)
            names = sorted(checkpoint.files)
            verify_files(checkpoint, [names[number] for number in ranks.share(len(names))])
        except (ValueError, OSError) as error:
            verdict = str(error)
        verdicts = ranks.all_gather_text(json.dumps([verdict, checkpoint.sha256 if checkpoint else ""]))
        reasons, seals = zip(*(json.loads(text) for text in verdicts), strict=True)
        if len(set(seals)) > 1:
            raise RuntimeError(f"{path}: the ranks do not see the same checkpoint; RUN_DIR must be one folder that all nodes share")
        if checkpoint is not None and not any(reasons):
            return checkpoint
        if ranks.is_rank_0():
            logger.warning("checkpoint %s is damaged and not used: %s", path, next(filter(None, reasons)))
    return None


def load_state(checkpoint: Checkpoint, state: State, pieces: Sequence[Piece]) -> None:
    """Overwrite the shards of `state` with a verified checkpoint's values. pieces: of all ranks, from `agree_on_pieces`.

    Raises: ValueError, on all ranks alike, where names or shapes are not those of the checkpoint.
    Source: overlaps are found by torch.distributed.checkpoint's planner, as in its resharding."""
    wanted = {piece.tensor: piece.shape for piece in pieces}
    saved = _saved_tensors(checkpoint)
    got = {name: shape for name, (shape, _) in saved.items()}
    if wanted != got:
        odd = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))[:3]
        detail = "; ".join(f"{name}: got {got.get(name)}, wanted {wanted.get(name)}" for name in odd)
        raise ValueError(f"{checkpoint.path}: its tensors do not fit the model: {detail}; the checkpoint belongs to another recipe")
    _read_into(checkpoint, named_shards(state), saved)


def read_tensors(checkpoint: Checkpoint, part: str) -> dict[str, Tensor]:
    """The whole tensors of one part (model, ema, optimizer) by name, on the CPU; the checkpoint has just been verified.

    Raises: ValueError if a file is not what the manifest says."""
    saved = {name: entry for name, entry in _saved_tensors(checkpoint).items() if name.startswith(f"{part}/")}
    whole = {name: Shard(shape, 0, torch.empty(shape)) for name, (shape, _) in saved.items()}
    _read_into(checkpoint, whole, saved)
    return {name.removeprefix(f"{part}/"): shard.values for name, shard in whole.items()}


def _read_into(
    checkpoint: Checkpoint, shards: Mapping[str, Shard], saved: Mapping[str, tuple[tuple[int, ...], list[tuple[str, int, int]]]]
) -> None:
    reads: dict[str, list[tuple[str, int, int, int]]] = {}
    left: Counter[str] = Counter()
    for name, shard in shards.items():
        shape, places = saved[name]
        metadata = TensorStorageMetadata(
            TensorProperties(), torch.Size([torch.Size(shape).numel()]), [_chunk(*place[1:]) for place in places]
        )
        for item in create_read_items_for_chunk_list(name, metadata, [_chunk(shard.start, shard.values.numel())]):
            assert item.storage_index.index is not None
            file = places[item.storage_index.index][0]
            reads.setdefault(file, []).append((name, item.storage_offsets[0], item.dest_offsets[0], item.lengths[0]))
            left[name] += 1
    flat: dict[str, Tensor] = {}
    try:
        for file, wanted in sorted(reads.items()):
            with safe_open(checkpoint.path / file, framework="pt") as tensors:
                for name, at, to, count in wanted:
                    flat[name] = flat[name] if name in flat else _row_major(shards[name])
                    flat[name].narrow(0, to, count).copy_(tensors.get_tensor(name).view(-1).narrow(0, at, count))
                    left[name] -= 1
                    if not left[name]:
                        _finish(shards[name], flat.pop(name))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{checkpoint.path}: a file does not hold what its manifest says: {error}") from error


def _row_major(shard: Shard) -> Tensor:
    """Flat memory to read a shard into: its own where that is fp32 in row-major order."""
    in_place = shard.packed is None and shard.values.is_contiguous()
    return shard.values.view(-1) if in_place else torch.empty(shard.values.numel())


def _finish(shard: Shard, flat: Tensor) -> None:
    """Put what was read into the shard, if it is not there yet."""
    if shard.packed is not None:
        shard.packed.pack(flat.view(shard.values.shape))
    elif not shard.values.is_contiguous():
        shard.values.copy_(flat.view(shard.values.shape))


def _saved_tensors(checkpoint: Checkpoint) -> dict[str, tuple[tuple[int, ...], list[tuple[str, int, int]]]]:
    """Shape and pieces (file, start, count) of every tensor that the manifest lists."""
    tensors = checkpoint.manifest.get("tensors")
    if not isinstance(tensors, dict):
        raise ValueError(f"{checkpoint.path / 'manifest.json'}: has no list of tensors")
    file_bytes = {name: int(record["bytes"]) for name, record in checkpoint.files.items()}
    return {name: _saved_tensor(checkpoint, name, entry, file_bytes) for name, entry in tensors.items()}


def _saved_tensor(
    checkpoint: Checkpoint, name: str, entry: object, file_bytes: Mapping[str, int]
) -> tuple[tuple[int, ...], list[tuple[str, int, int]]]:
    match entry:
        case {"shape": [*shape], "pieces": [*places]} if all(isinstance(size, int) and size > 0 for size in shape):
            pieces = [piece for place in places if (piece := _saved_piece(place, file_bytes))]
            ordered = sorted(pieces, key=lambda piece: piece[1])
            # Every element once; math.prod, because torch's product of sizes wraps around.
            if [*(start for _, start, _ in ordered), math.prod(shape)] == [0, *(start + count for _, start, count in ordered)]:
                return tuple(shape), pieces
    raise ValueError(
        f"{checkpoint.path / 'manifest.json'}: tensor {name} is {entry!r:.120}, wanted its shape and pieces of the files listed"
    )


def _saved_piece(place: object, file_bytes: Mapping[str, int]) -> tuple[str, int, int] | None:
    """File, start and count, if the file is one of the checkpoint's and large enough."""
    match place:
        case [str(file), int(start), int(count)] if 0 < count * _FLOAT_BYTES <= file_bytes.get(file, 0):
            return file, start, count
    return None


def _chunk(start: int, count: int) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size([start]), sizes=torch.Size([count]))


def _write_item(name: str, shape: Sequence[int], start: int, count: int) -> WriteItem:
    data = TensorWriteData(chunk=_chunk(start, count), properties=TensorProperties(), size=torch.Size([torch.Size(shape).numel()]))
    return WriteItem(index=MetadataIndex(name, torch.Size([start])), type=WriteItemType.SHARD, tensor_data=data)


def _header(pieces: Sequence[Piece]) -> bytes:
    """The head of a safetensors file: its length in 8 bytes, then JSON, filled up so that the data is aligned.

    Source: github.com/huggingface/safetensors, "Format"."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for piece in pieces:
        size = piece.count * _FLOAT_BYTES
        entries[piece.tensor] = {"dtype": "F32", "shape": list(piece.stored_shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)
    return len(text).to_bytes(8, "little") + text


def _write_all(descriptor: int, content: bytes | memoryview) -> None:
    """os.write may take less than it is given, as on a disk that fills up."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
