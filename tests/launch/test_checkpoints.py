"""`halfstep checkpoints` lists what a resume could use, and says what it has not looked at."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from data_shards.files import content_record
from launch.checkpoints import print_checkpoints
from trainer.manifest import SCHEMA_VERSION, seal

Listed = tuple[int, str]


def _write(run_dir: Path, step: int, **facts: object) -> Path:
    """A checkpoint as the trainer commits it, but for its tensors."""
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    content = f"tensors of step {step}".encode() * 50_000
    (folder / "rank_0000.safetensors").write_bytes(content)
    manifest = {"schema_version": SCHEMA_VERSION, "step": step, "files": {"rank_0000.safetensors": content_record(content)}, **facts}
    (folder / "manifest.json").write_text(seal(manifest))
    os.utime(folder, (1_700_000_000 + step, 1_700_000_000 + step))
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run with checkpoints of steps 10 and 20."""
    run = tmp_path / "run"
    _write(run, 10, world_size=2, engine="replicated", mean_loss=0.25, final=False)
    _write(run, 20, world_size=4, engine="fsdp", mean_loss=0.125, final=True)
    (run / "recipe.yaml").touch()
    return run


@pytest.fixture
def listing(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Listed]:
    """A function: exit code and output of the command on the run, or on another path."""

    def run(path: Path = run_dir, *, verify: bool = False, as_json: bool = False) -> Listed:
        code = print_checkpoints(path, verify=verify, as_json=as_json)
        return code, capsys.readouterr().out

    return run


def test_a_table_for_people(run_dir: Path, listing: Callable[..., Listed]) -> None:
    code, text = listing()
    head, *lines = text.splitlines()
    assert code == 0 and re.fullmatch(rf"{run_dir}: 2 whole of 2; [0-9.]+ GiB are free there", head)
    assert lines == [
        "step  written (UTC)        size     ranks  engine      mean loss  marks          state",
        "10    2023-11-14 22:13:30  0.9 MiB  2      replicated  0.25       -              whole",
        "20    2023-11-14 22:13:40  0.9 MiB  4      fsdp        0.125      newest, final  whole",
        "manifests and sizes were compared; --verify reads every byte",
    ]


def test_json_for_programs(run_dir: Path, listing: Callable[..., Listed]) -> None:
    listed = json.loads(listing(as_json=True, verify=True)[1])
    assert listed["verified"] is True and listed["runs"][0]["run_dir"] == str(run_dir)
    assert listed["runs"][0]["checkpoints"][1] == {
        "step": 20,
        "written_at": "2023-11-14 22:13:40",
        "size_bytes": 900_000,
        "world_size": 4,
        "engine": "fsdp",
        "mean_loss": 0.125,
        "marks": ["newest", "final"],
        "state": "whole",
    }


def test_one_flipped_bit_is_found_by_verify_alone(run_dir: Path, listing: Callable[..., Listed]) -> None:
    file = run_dir / "checkpoints" / "step_000020" / "rank_0000.safetensors"
    content = bytearray(file.read_bytes())
    content[777] ^= 1
    file.write_bytes(content)
    assert listing()[0] == 0
    code, text = listing(verify=True)
    older, newer, foot = text.splitlines()[2:]
    assert code == 2 and "newest" in older
    assert "damaged: rank_0000.safetensors has sha256 " in newer and "newest" not in newer
    assert foot == "every byte was read and compared"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: os.truncate(file, 5), "rank_0000.safetensors has 5 bytes, the manifest says 900000"),
        (lambda file: file.unlink(), "rank_0000.safetensors cannot be read: No such file or directory"),
        (lambda file: os.truncate(file.with_name("manifest.json"), 5), "manifest.json is not one that was ever written"),
        (lambda file: file.with_name("manifest.json").unlink(), "manifest.json cannot be read: No such file or directory"),
    ],
)
def test_other_damage_is_found_at_once(run_dir: Path, listing: Callable[..., Listed], damage: Callable[[Path], None], reason: str) -> None:
    damage(run_dir / "checkpoints" / "step_000020" / "rank_0000.safetensors")
    for verify in (False, True):
        code, text = listing(verify=verify)
        assert f"damaged: {reason}" in text.splitlines()[3] and "1 whole of 2" in text
        assert code == (2 if verify else 0)


def test_unfinished_saves_are_listed_and_are_no_damage(run_dir: Path, listing: Callable[..., Listed]) -> None:
    unfinished = run_dir / "checkpoints" / f"step_000030.tmp-{'0' * 32}"
    unfinished.mkdir()
    (unfinished / "rank_0000.safetensors").write_bytes(bytes(2**20))
    code, text = listing(verify=True)
    assert code == 0 and "2 whole of 3" in text
    assert re.fullmatch(r"30 .* 1\.0 MiB .* unfinished", text.splitlines()[4])


def test_a_chain_is_listed_stage_by_stage(tmp_path: Path, listing: Callable[..., Listed]) -> None:
    names = {8: "stage_00_0008_steps", 4: "stage_01_0004_steps", 2: "stage_02_0002_steps"}
    _write(tmp_path / "chain" / names[8], 16, final=True)
    (tmp_path / "chain" / names[4]).mkdir()
    stages = [{"name": name, "steps": steps, "run_dir": name} for steps, name in names.items()]
    (tmp_path / "chain" / "chain.json").write_text(json.dumps({"schema_version": 1, "stages": stages}))
    code, text = listing(tmp_path / "chain")
    assert code == 0 and f"{names[8]}: 1 whole of 1" in text and f"{names[4]}: no checkpoints yet" in text
    assert names[2] not in text, "not started"


def test_links_are_damage_and_are_not_followed(run_dir: Path, tmp_path: Path, listing: Callable[..., Listed]) -> None:
    other = _write(tmp_path / "other", 30)
    (run_dir / "checkpoints" / "step_000030").symlink_to(other)
    code, text = listing(verify=True)
    assert code == 2 and "damaged: step_000030 is not a folder of its own (a link leads elsewhere)" in text
    assert re.search(r"^30 .* 0\.0 MiB", text, flags=re.MULTILINE)


def test_what_a_manifest_says_cannot_move_the_cursor(run_dir: Path, listing: Callable[..., Listed]) -> None:
    _write(run_dir, 30, engine="\x1b[2J", world_size="many", mean_loss=[])
    assert "30    2023-11-14 22:13:50  0.9 MiB  -      ?[2J " in listing()[1]


def test_a_folder_that_is_no_run_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wanted a RUN_DIR or a chain's directory"):
        print_checkpoints(tmp_path, verify=False, as_json=False)
