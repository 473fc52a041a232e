"""Tensors come back bit for bit, from any shards; a manifest that does not fit the model or its files is refused by name."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from trainer.checkpoint import Piece, Staging, agree_on_pieces, agreed_checkpoint, file_name, load_state, read_tensors, tensors_record
from trainer.engines.engine import Shard, State
from trainer.manifest import SCHEMA_VERSION, Checkpoint, newest_checkpoint, seal
from trainer.save import write_checkpoint


def _tensors(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {part: {"a": torch.randn(300, generator=generator), "b": torch.randn(2, 3, generator=generator)} for part in ("model", "ema")}


def _write(run_dir: Path, step: int) -> Path:
    return write_checkpoint(run_dir, step, parts=_tensors(step), facts={"world_size": 2})


def _newest(run_dir: Path) -> Checkpoint:
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None
    return checkpoint


def _whole(tensors: Mapping[str, Tensor]) -> State:
    return {"model": {name: Shard(tuple(tensor.shape), 0, tensor) for name, tensor in tensors.items()}}


def _write_two_files(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Tensor:
    """A checkpoint that two ranks have written, each the half of one tensor of 7 * 11 elements, cut within a row; returns the tensor."""
    whole = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    folder.mkdir(parents=True)
    pieces, files = [Piece("model/w", (7, 11), 0, 40, 0), Piece("model/w", (7, 11), 40, 37, 1)], {}
    for rank, piece in enumerate(pieces):
        monkeypatch.setattr("data_shards.ranks.rank", lambda rank=rank: rank)
        shard = Shard((7, 11), piece.start, whole.view(-1)[piece.start : piece.start + piece.count])
        staging = Staging({"model": {"w": shard}}, pieces)
        staging.copy()
        files[file_name(rank)] = staging.write(folder / file_name(rank))
    monkeypatch.undo()
    manifest = {"schema_version": SCHEMA_VERSION, "step": 1, "files": files, "tensors": tensors_record(pieces)}
    (folder / "manifest.json").write_text(seal(manifest))
    return whole


def test_what_was_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    _write(tmp_path, 10)
    checkpoint = _newest(tmp_path)
    assert checkpoint.step == 10 and checkpoint.manifest["world_size"] == 2
    for part, tensors in _tensors(10).items():
        read = read_tensors(checkpoint, part)
        assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_bits_of_zeros_and_numbers_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    odd = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45, -1e-45])
    write_checkpoint(tmp_path, 1, parts={"model": {"odd": odd}}, facts={})
    assert torch.equal(read_tensors(_newest(tmp_path), "model")["odd"].view(torch.int32), odd.view(torch.int32))


def test_parameters_that_share_one_buffer_are_written_apart(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    write_checkpoint(tmp_path, 1, parts={"model": {"a": flat[:4], "b": flat[4:].view(2, 4).T}}, facts={})
    read = read_tensors(_newest(tmp_path), "model")
    assert torch.equal(read["a"], flat[:4]) and torch.equal(read["b"], flat[4:].view(2, 4).T)


def test_the_files_are_plain_safetensors(tmp_path: Path) -> None:
    path = _write(tmp_path, 10) / "rank_0000.safetensors"
    with safe_open(path, framework="pt") as tensors:
        assert set(tensors.keys()) == {"model/a", "model/b", "ema/a", "ema/b"}
        assert torch.equal(tensors.get_tensor("ema/b"), _tensors(10)["ema"]["b"])


def test_a_state_of_channels_last_tensors_is_overwritten_in_place(tmp_path: Path) -> None:
    wanted = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    write_checkpoint(tmp_path, 1, parts={"model": {"w": wanted}}, facts={})
    held = torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last)
    state = _whole({"w": held})
    load_state(_newest(tmp_path), state, agree_on_pieces(state))
    assert torch.equal(held, wanted) and held.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("start", "stop"), [(0, 77), (0, 33), (33, 77), (39, 41), (40, 77), (76, 77)])
def test_any_shard_is_read_from_the_pieces_that_it_overlaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, stop: int) -> None:
    whole = _write_two_files(monkeypatch, tmp_path / "checkpoints" / "step_000001")
    checkpoint = agreed_checkpoint(tmp_path)
    assert checkpoint is not None and torch.equal(read_tensors(checkpoint, "model")["w"], whole)
    shard = Shard((7, 11), start, torch.zeros(stop - start))
    load_state(checkpoint, {"model": {"w": shard}}, [Piece("model/w", (7, 11), 0, 77, 0)])
    assert torch.equal(shard.values, whole.view(-1)[start:stop])


def test_a_state_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, parts={"model": {"conv.weight": torch.ones(4), "conv.bias": torch.ones(2)}}, facts={})
    held = torch.zeros(4)
    for state, detail in (
        (_whole({"conv.weight": held}), r"model/conv\.bias: got \(2,\), wanted None"),
        (_whole({"conv.weight": held, "conv.bias": torch.zeros(3)}), r"model/conv\.bias: got \(2,\), wanted \(3,\)"),
        (_whole({"conv.weight": held, "conv.bias": torch.zeros(2), "out": torch.zeros(1)}), r"model/out: got None, wanted \(1,\)"),
    ):
        with pytest.raises(ValueError, match=rf"step_000001: its tensors do not fit the model: {detail}; .* belongs to another recipe"):
            load_state(_newest(tmp_path), state, agree_on_pieces(state))
    assert torch.equal(held, torch.zeros(4))


BAD_TENSORS: dict[str, Callable[[list[object]], dict[str, object]]] = {
    "no shape": lambda piece: {"pieces": [piece]},
    "a shape of text": lambda piece: {"shape": ["300"], "pieces": [piece]},
    "a negative size": lambda piece: {"shape": [-20, -15], "pieces": [piece]},
    "sizes whose product wraps around": lambda piece: {"shape": [2**62, 2**62], "pieces": []},
    "a piece of another file": lambda piece: {"shape": [300], "pieces": [["../x.safetensors", 0, 300]]},
    "a piece that is no list": lambda piece: {"shape": [300], "pieces": [7]},
    "a piece twice, and a gap": lambda piece: {"shape": [300], "pieces": [["rank_0000.safetensors", 0, 150]] * 2},
    "a piece too short": lambda piece: {"shape": [300], "pieces": [[piece[0], 0, 299]]},
    "a negative start": lambda piece: {"shape": [300], "pieces": [[piece[0], -300, 300], [piece[0], 0, 300]]},
    "more elements than the file has bytes for": lambda piece: {"shape": [10**12], "pieces": [[piece[0], 0, 10**12]]},
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_manifest_whose_list_of_tensors_makes_no_sense_is_refused_by_the_tensor(tmp_path: Path, case: str) -> None:
    """It is sealed as it should be: whoever wrote it had our code, or ours had a fault."""
    path = _write(tmp_path, 10) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["manifest_sha256"]
    manifest["tensors"]["model/a"] = BAD_TENSORS[case](manifest["tensors"]["model/a"]["pieces"][0])
    path.write_text(seal(manifest))
    with pytest.raises(ValueError, match=r"step_000010/manifest.json: tensor model/a is .*, wanted its shape and pieces"):
        read_tensors(_newest(tmp_path), "model")


def test_a_file_without_the_tensor_that_its_manifest_lists_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, 10) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["manifest_sha256"]
    manifest["tensors"]["model/c"] = manifest["tensors"].pop("model/a")
    path.write_text(seal(manifest))
    with pytest.raises(ValueError, match=r"step_000010: a file does not hold what its manifest says: .*model/c"):
        read_tensors(_newest(tmp_path), "model")


def test_ranks_whose_shards_leave_a_gap_are_a_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_shards.ranks.all_gather_text", lambda text: [text, text])  # two ranks with the same shards
    with pytest.raises(RuntimeError, match="the ranks' shards do not make whole tensors"):
        agree_on_pieces({"model": {"w": Shard((10,), 0, torch.zeros(9))}})
