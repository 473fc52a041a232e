"""Other programs' checkpoints become safetensors, or are refused with a reason and a way out."""

import collections
import logging
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.import_checkpoint import find_tensors, import_job


def _import(path: Path, out: Path) -> dict[str, Tensor]:
    assert import_job(path, {"out": str(out)}) == 0
    return load_file(out)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_written_as_it_is(tmp_path: Path, suffix: str, zipped: bool) -> None:
    state = nn.Conv2d(3, 4, 3).state_dict()
    state["half"] = torch.ones(3, dtype=torch.bfloat16)
    torch.save(state, tmp_path / f"model{suffix}", _use_new_zipfile_serialization=zipped)
    read = _import(tmp_path / f"model{suffix}", tmp_path / "model.safetensors")
    assert read.keys() == state.keys() and all(torch.equal(read[name], tensor) for name, tensor in state.items())
    assert read["half"].dtype == torch.bfloat16
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "source": f"model{suffix}", "taken": "the top level"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"model{suffix}", "model.safetensors"]


def test_tied_strided_and_scalar_tensors_are_written_whole(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    state = {"a": flat, "b": flat, "part": flat[3:5], "turned": flat.view(3, 4).T, "count": torch.tensor(7)}
    torch.save(state, tmp_path / "model.pt")
    read = _import(tmp_path / "model.pt", tmp_path / "model.safetensors")
    assert read.keys() == state.keys() and all(torch.equal(read[name], tensor) for name, tensor in state.items())


def test_averages_one_level_down_are_taken_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = {"epoch": 3, "model": {"w": torch.zeros(2)}, "ema": {"w": torch.ones(2)}, "optimizer": {"state": {}, "lr": 0.1}}
    torch.save(content, tmp_path / "last.ckpt")
    with caplog.at_level(logging.INFO):
        read = _import(tmp_path / "last.ckpt", tmp_path / "out.safetensors")
    assert torch.equal(read["w"], torch.ones(2))
    assert "1 tensors (0.0 MiB) of 'ema' (not of 'model') written to" in caplog.text


def test_where_tensors_are_looked_for() -> None:
    one, two = torch.ones(1), torch.ones(2)
    assert find_tensors({"w": one, "epoch": 3}) == ({"w": one}, "the top level")
    assert find_tensors(collections.OrderedDict(w=two)) == ({"w": two}, "the top level")
    assert find_tensors({"state_dict": {"w": two}, "step": one}) == ({"w": two}, "'state_dict'")
    assert find_tensors({"generator": {"w": two}}) == ({"w": two}, "'generator'")
    assert find_tensors({"state_dict": {"a": one, "b": two}, "step": one})[1] == "'state_dict'"
    for content, reason in (
        ([one], "it holds list, wanted a mapping"),
        ({}, "it has nothing"),
        ({"a": {"b": {"w": one}}}, "no tensors at the top, nor one level down under one of ema, .*; it has 'a'"),
        ({"left": {"w": one}, "right": {"w": two}}, "it has 'left', 'right'"),
    ):
        with pytest.raises(ValueError, match=reason):
            find_tensors(content)


def test_safetensors_are_copied_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    assert torch.equal(_import(tmp_path / "a.safetensors", tmp_path / "b.safetensors")["w"], torch.ones(3))
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"c.safetensors: not a safetensors file"):
        import_job(tmp_path / "c.safetensors", {"out": str(tmp_path / "d.safetensors")})
    assert not (tmp_path / "d.safetensors").exists()


def test_objects_are_refused_by_the_name_of_what_would_be_called(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(3)}, "hyper_parameters": Namespace(lr=0.1)}, tmp_path / "lightning.ckpt")
    with pytest.raises(ValueError, match="refused: ") as refused:
        import_job(tmp_path / "lightning.ckpt", {"out": str(tmp_path / "out.safetensors")})
    message = str(refused.value)
    assert message.startswith(
        f"{tmp_path / 'lightning.ckpt'}: refused: it holds more than tensors: it asks to call argparse.Namespace, and"
    )
    assert message.endswith("safetensors.torch.save_file(model.state_dict(), 'model.safetensors')")
    assert "weights_only" not in message, "torch's advice is to load it unsafely"
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no pickle at all", b"\x80\x02N.", b"\x80\x05" + b"(" * 5000])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.pt: (refused: it cannot be read as tensors alone|it holds NoneType)"):
        import_job(tmp_path / "model.pt", {"out": str(tmp_path / "out.safetensors")})


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(100_000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    with pytest.raises(ValueError, match=r"it is a compressed archive, which torch.save does not write"):
        import_job(tmp_path / "bomb.pt", {"out": str(tmp_path / "out.safetensors")})


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, tmp_path / "model.pt")
    (tmp_path / "taken.safetensors").symlink_to(tmp_path / "nowhere")
    for name, reason in (
        ("taken.safetensors", "is there already"),
        ("model.npz", "wanted a name that ends in .safetensors"),
        ("new/model.safetensors", "no directory .*new; make it first"),
    ):
        with pytest.raises(ValueError, match=reason):
            import_job(tmp_path / "model.pt", {"out": str(tmp_path / name)})
    assert not (tmp_path / "nowhere").exists()


def test_a_file_that_comes_while_ours_is_written_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.zeros(3)}, tmp_path / "model.pt")
    out = tmp_path / "model.safetensors"

    def save_late(*arguments: object, **named: object) -> None:
        save_file(*arguments, **named)  # type: ignore[arg-type]
        out.write_text("somebody else's")

    monkeypatch.setattr("trainer.import_checkpoint.save_file", save_late)
    with pytest.raises(ValueError, match="is there already"):
        import_job(tmp_path / "model.pt", {"out": str(out)})
    assert out.read_text() == "somebody else's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "model.safetensors"]


def test_a_tensor_that_the_format_lacks_is_named(tmp_path: Path) -> None:
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"cannot be written as safetensors|refused"):
        import_job(tmp_path / "model.pt", {"out": str(tmp_path / "out.safetensors")})
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
