"""Files that want to run code, fill the memory or reach elsewhere are refused or ignored; no canary is ever touched."""

import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import torch.storage
from safetensors.torch import save_file

from data_shards.encoders.efficient_net import load_efficient_net
from data_shards.files import content_record
from data_shards.index import ShardIndex, ShardIndexError, canonical_sha256
from data_shards.tars.tar import end_bytes, member_bytes
from data_shards.tars.verify import verify
from launch.checkpoints import print_checkpoints
from launch.data import pack_faces
from launch.run_dir import freeze
from launch.status import print_status
from trainer.checkpoint import agreed_checkpoint, read_tensors
from trainer.config import DataConfig, FacesConfig, RunConfig, TrainConfig
from trainer.config_io import load_recipe
from trainer.import_checkpoint import import_job
from trainer.lease import Lease
from trainer.manifest import newest_checkpoint, seal, sweep_leftovers
from trainer.quality.inception import load_inception
from trainer.quality.statistics import read_arrays
from trainer.save import write_checkpoint
from trainer.source import load_source


class _Call:
    """Pickled as a call, which whoever unpickles it makes."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


def _nested(canary: Path) -> object:
    """A call that the outer pickle's reader may take for a tensor's storage; the inner pickle is loaded without any limit."""
    return _Call(torch.storage._load_from_bytes, pickle.dumps(_Call(os.mkdir, str(canary))))


PAYLOADS: dict[str, Callable[[Path], object]] = {
    "os.system": lambda canary: _Call(os.system, f"touch {canary}"),
    "builtins.exec": lambda canary: _Call(exec, f"open({str(canary)!r}, 'w')"),
    "builtins.getattr": lambda canary: _Call(getattr, Path, "touch"),
    "torch.storage._load_from_bytes": _nested,
    "pathlib.Path": lambda canary: canary,
}


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """What a payload would make if it ran."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "the payload ran"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with one good checkpoint, of step 10."""
    run = tmp_path / "run"
    run.mkdir()
    _write(run, 10)
    return run


def _write(run: Path, step: int) -> Path:
    return write_checkpoint(run, step, parts={"model": {"w": torch.full((4,), float(step))}}, facts={})


def _newest_step(run: Path) -> int | None:
    steps = {checkpoint and checkpoint.step for checkpoint in (newest_checkpoint(run), agreed_checkpoint(run))}
    assert len(steps) == 1
    return steps.pop()


def _reseal(folder: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    """Change a manifest and seal it again, as one who knows our format can."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["manifest_sha256"]
    change(manifest)
    (folder / "manifest.json").write_text(seal(manifest))


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_calls_is_refused_by_import(tmp_path: Path, canary: Path, payload: str, zipped: bool) -> None:
    torch.save({"w": torch.ones(3), "x": PAYLOADS[payload](canary)}, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model.pt: refused: it holds more than tensors: it asks to call .*, and that would run code"):
        import_job(tmp_path / "model.pt", {"out": str(tmp_path / "out.safetensors")})
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("load", [load_efficient_net, lambda path: load_inception(Path(path))], ids=["efficient_net", "inception"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_pickle_that_calls_is_refused_as_weights(tmp_path: Path, canary: Path, payload: str, load: Callable[[str], object]) -> None:
    torch.save({"w": torch.ones(3), "x": PAYLOADS[payload](canary)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt: refused: it holds more than tensors: it asks to call .*, and that would run code"):
        load(str(tmp_path / "model.pt"))
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data/0", bytes(10_000))
    with pytest.raises(ValueError, match=r"bomb.pt: refused: .*compressed archive"):
        load(str(tmp_path / "bomb.pt"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_is_refused_by_import(tmp_path: Path, canary: Path, protocol: int) -> None:
    (tmp_path / "model.bin").write_bytes(pickle.dumps(PAYLOADS["os.system"](canary), protocol=protocol))
    with pytest.raises(ValueError, match=r"model.bin: refused: "):
        import_job(tmp_path / "model.bin", {"out": str(tmp_path / "out.safetensors")})


def test_a_torchscript_archive_is_refused_by_import(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt", "a") as archive:
        archive.writestr("model/constants.pkl", b"")  # by which torch.load knows one
        archive.writestr("model/code/__torch__.py", "import os")
    with pytest.raises(ValueError, match=r"model.pt: refused: "):
        import_job(tmp_path / "model.pt", {"out": str(tmp_path / "out.safetensors")})


def test_dcp_metadata_is_never_read(run_dir: Path, canary: Path) -> None:
    content = pickle.dumps(PAYLOADS["os.system"](canary))
    for folder in (run_dir / "checkpoints" / "step_000010", run_dir / "checkpoints" / "step_000020"):
        folder.mkdir(exist_ok=True)
        (folder / ".metadata").write_bytes(content)
        (folder / "__0_0.distcp").write_bytes(content)
    assert _newest_step(run_dir) == 10


def test_deepspeeds_latest_and_pickles_are_never_read(run_dir: Path, tmp_path: Path, canary: Path) -> None:
    content = pickle.dumps(PAYLOADS["os.system"](canary))
    for folder in (run_dir / "checkpoints" / "global_step20", tmp_path / "elsewhere"):
        folder.mkdir()
        for name in ("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):
            (folder / name).write_bytes(content)
    (run_dir / "checkpoints" / "latest").write_text("../../elsewhere")
    (run_dir / "checkpoints" / "zero_to_fp32.py").write_text(f"open({str(canary)!r}, 'w')")
    assert _newest_step(run_dir) == 10


@pytest.mark.parametrize("text", ['{"step": 20, "path": "../../elsewhere"}', '{"step": "x"}', "[" * 100_000, "\0"])
def test_latest_json_is_no_truth(run_dir: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "other").mkdir()
    _write(tmp_path / "other", 20).rename(tmp_path / "elsewhere")
    (run_dir / "latest.json").write_text(text)
    assert _newest_step(run_dir) == 10


def test_a_linked_checkpoint_folder_is_not_used_and_not_followed_when_it_is_deleted(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    elsewhere = _write(tmp_path / "other", 20)
    (run_dir / "checkpoints" / "step_000020").symlink_to(elsewhere)
    (run_dir / "checkpoints" / "step_000020.tmp-0").symlink_to(elsewhere.parent)
    assert _newest_step(run_dir) == 10
    sweep_leftovers(run_dir)
    for step in (20, 30):
        write_checkpoint(run_dir, step, parts={"model": {"w": torch.full((4,), float(step))}}, facts={})
    assert newest_checkpoint(tmp_path / "other") is not None and not (run_dir / "checkpoints" / "step_000020").is_symlink()


def test_a_checkpoints_folder_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(_write(tmp_path / "other", 20).parent)
    for look in (newest_checkpoint, agreed_checkpoint):
        with pytest.raises(ValueError, match="checkpoints: is not a plain folder; move it away"):
            look(tmp_path / "run")


@pytest.mark.parametrize("name", ["rank_0000.safetensors", "manifest.json"])
def test_linked_files_and_pipes_in_a_checkpoint_are_not_opened(run_dir: Path, tmp_path: Path, name: str) -> None:
    file = _write(run_dir, 20) / name
    file.rename(tmp_path / name)
    file.symlink_to(tmp_path / name)
    assert _newest_step(run_dir) == 10
    file.unlink()
    os.mkfifo(file)  # to open it would wait for ever
    assert _newest_step(run_dir) == 10


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "x/y.safetensors", "rank_0000.safetensors\0", ".metadata", ""])
def test_a_manifest_names_files_beside_it_only(run_dir: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    _reseal(_write(run_dir, 20), lambda manifest: manifest["files"].__setitem__(name, content_record(b"secret")))
    assert _newest_step(run_dir) == 10


@pytest.mark.parametrize(
    "damage",
    [
        {"step": "20"},
        {"step": True},
        {"files": []},
        {"files": {"rank_0000.safetensors": 7}},
        {"files": {"rank_0000.safetensors": {"bytes": "9", "sha256": None}}},
        {"files": {"rank_0000.safetensors": {"bytes": 10**400, "sha256": []}}},
        {"schema_version": [2]},
    ],
)
def test_a_sealed_manifest_of_other_types_is_passed_over(run_dir: Path, damage: dict[str, object]) -> None:
    _reseal(_write(run_dir, 20), lambda manifest: cast("dict[str, object]", manifest).update(damage))
    assert _newest_step(run_dir) == 10


def _header(offsets: list[int], *, length: int | None = None) -> bytes:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": offsets}
    text = json.dumps({"model/w": entry, "model/v": entry | {"data_offsets": [0, 16]}}).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(32)


SAFETENSORS = {
    "a header of 1 GiB": _header([16, 32], length=2**30),
    "a header of 2^64 - 1 bytes": _header([16, 32], length=2**64 - 1),
    "overlapping tensors": _header([0, 16]),
    "negative offsets": _header([-16, 0]),
    "offsets backwards": _header([32, 16]),
    "offsets behind the end": _header([16, 2**40]),
    "offsets that wrap around": _header([16, 2**64]),
    "no JSON": (8).to_bytes(8, "little") + b"\x80\x04K\x01.   ",
    "nothing": b"",
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_a_sealed_safetensors_file_of_nonsense_is_refused(run_dir: Path, case: str) -> None:
    folder = _write(run_dir, 20)
    (folder / "rank_0000.safetensors").write_bytes(SAFETENSORS[case])

    record = content_record(SAFETENSORS[case])
    _reseal(folder, lambda manifest: manifest["files"].__setitem__("rank_0000.safetensors", record))
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None and checkpoint.step == 20, "its hashes are right"
    with pytest.raises(ValueError, match=r"step_000020(: a file does not hold what|/manifest.json: tensor)"):
        read_tensors(checkpoint, "model")


BOMB = "\n".join(["a0: &a0 x", *(f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]" for number in range(1, 20))])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seed: !!python/object/apply:os.system ['touch CANARY']", "the tag tag:yaml.org,2002:python/object/apply:os.system is not read"),
        ("seed: !!python/object/new:os.mkdir ['CANARY']", "is not read"),
        ("!!python/object:trainer.config.RunConfig\nseed: 1", "is not read"),
        (BOMB, "anchors and aliases"),
        ("seed: " + "[" * 20_000, "nested too deeply"),
        ("data: {shards: x}\n__class__: os", "unknown key"),
        ("\x00", "not YAML"),
    ],
)
def test_a_recipe_is_plain_values(tmp_path: Path, canary: Path, text: str, reason: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text.replace("CANARY", str(canary)))
    with pytest.raises(ValueError, match=reason):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("sealed", [False, True])
def test_an_export_of_pickles_or_remote_code_is_refused(tmp_path: Path, canary: Path, sealed: bool) -> None:
    folder = tmp_path / "export"
    (folder / "unet").mkdir(parents=True)
    index = {"_class_name": ["pipeline", "Evil"], "custom_pipeline": "./evil.py", "unet": ["evil", "Net"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in ("evil.py", "unet/evil.py", "pipeline.py"):
        (folder / name).write_text(f"open({str(canary)!r}, 'w')")
    (folder / "unet" / "config.json").write_text('{"_class_name": "Net", "auto_map": {"AutoModel": "evil.Net"}}')
    content = pickle.dumps(PAYLOADS["os.system"](canary))
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(content)
    if sealed:
        for name in ("descriptor.json", "recipe.yaml"):
            (folder / name).write_text("{}")
        records = {name: content_record((folder / name).read_bytes()) for name in ("descriptor.json", "recipe.yaml")}
        records["unet/diffusion_pytorch_model.bin"] = content_record(content)
        (folder / "manifest.json").write_text(json.dumps({"files": records}))
    pickles = "has weights only as diffusion_pytorch_model.bin, a pickle"
    reason = "diffusion_pytorch_model.safetensors: is .*, manifest.json says None" if sealed else pickles
    with pytest.raises(ValueError, match=reason):
        load_source(folder)


def test_members_of_a_shard_that_would_be_unpickled_or_leave_it_are_named(tmp_path: Path, canary: Path) -> None:
    names = ("0.pkl", "0.pyd", "0.pth", "../0.png", "/etc/0.png")
    body = b"".join(member_bytes(name, pickle.dumps(PAYLOADS["os.system"](canary))) for name in names)
    (tmp_path / "shard-000000.tar").write_bytes(body + end_bytes(len(body)))
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert tuple(tar.getnames()) == names
    [problem] = verify(tmp_path)
    assert "there is no index" in str(problem)
    members = {extension: {"offsets": [512], "sizes": [9], "crc32": [0]} for extension in ("pkl", "png")}
    shard = {"name": "shard-000000.tar", "bytes": len(body), "sha256": "0" * 64, "keys": ["0"], "members": members}
    with pytest.raises(ShardIndexError, match=r"extension .pkl is not allowed"):
        _load_index(tmp_path, shard)
    for name in ("../shard-000000.tar", "/etc/passwd", "pipe:touch x.tar", "|touch x.tar"):
        with pytest.raises(ShardIndexError, match="wanted a plain file name"):
            _load_index(tmp_path, {**shard, "name": name})
    with pytest.raises(ShardIndexError, match="do not fit a shard"):
        _load_index(tmp_path, {**shard, "members": {"png": {"offsets": [2**60], "sizes": [9], "crc32": [0]}}})


def _load_index(folder: Path, shard: dict[str, object]) -> ShardIndex:
    content = {"schema_version": 1, "samples": 1, "image_size": 8, "licence": {}, "source": {}, "pack": {}, "shards": [shard]}
    (folder / "index.json").write_text(json.dumps({**content, "sha256": canonical_sha256(content)}))
    return ShardIndex.load(folder)


def test_a_reference_with_pickled_objects_is_refused(tmp_path: Path, canary: Path) -> None:
    objects = np.array([PAYLOADS["os.system"](canary)], dtype=object)
    np.savez(tmp_path / "reference.npz", features=objects)
    with pytest.raises(ValueError, match=r"reference.npz: cannot be read \(Object arrays cannot be loaded"):
        read_arrays(tmp_path / "reference.npz", ("features",))


@pytest.mark.parametrize("text", ["[]", "7", '"text"', "\0" * 1000, '{"code": {"a": []}, "reason": ["\x1b[2J"]}', "nothing"])
def test_records_of_other_types_are_refused_or_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("data: {shards: shards}\ntrain: {steps: 10}\n")
    (run / "exit.json").write_text(text)
    try:
        assert print_status(run, as_json=False) == 0
    except ValueError as error:
        assert "exit.json" in str(error)
    assert print_checkpoints(run, verify=True, as_json=False) == 0
    capsys.readouterr()


@pytest.mark.parametrize("text", ["[]", "nothing", '{"seed": "x"}'])
def test_an_identity_of_another_type_is_refused(tmp_path: Path, run_dir: Path, text: str) -> None:
    (run_dir / "identity.json").write_text(text)
    config = RunConfig(data=DataConfig(shards="shards"), train=TrainConfig(steps=10))
    with pytest.raises(ValueError, match=r"identity.json|another recipe or other data"):
        freeze(run_dir, config, shards=pack_faces(FacesConfig(count=1, size=8), tmp_path / "shards"))
    assert (run_dir / "identity.json").read_text() == text


@pytest.mark.parametrize("content", [b"[]", b"nothing", b'{"owner": 7}', None])
def test_a_lease_that_nobody_can_have_written_is_taken_over(run_dir: Path, content: bytes | None) -> None:
    if content is None:
        with open(run_dir / "lease.json", "wb") as file:
            file.truncate(20 * 2**20)
    else:
        (run_dir / "lease.json").write_bytes(content)
    lease = Lease.take(run_dir, renew_seconds=0.05)
    assert lease.held()
    lease.release()


def test_safetensors_that_nobody_listed_are_not_read(run_dir: Path) -> None:
    save_file({"model/w": torch.zeros(4)}, run_dir / "checkpoints" / "step_000010" / "rank_0001.safetensors")
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None and torch.equal(read_tensors(checkpoint, "model")["w"], torch.full((4,), 10.0))
