"""Hashes: of weights as bytes, of what was delivered whichever rank did it."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trainer.hash import hash_job, hash_run, samples_sha256, tensors_sha256

WriteRun = Callable[..., Path]

STEPS, MICRO_BATCHES = 6, 4


def write_ledgers(run_dir: Path, world_size: int, *, steps: int = STEPS) -> None:
    """The ledgers of a run whose micro-batches are divided among `world_size` ranks as design.md 1 divides them."""
    (run_dir / "ledger").mkdir(parents=True, exist_ok=True)
    share = MICRO_BATCHES // world_size
    for rank in range(world_size):
        with open(run_dir / "ledger" / f"rank_{rank}.jsonl", "w") as file:
            for step in range(steps):
                for index in range(rank * share, (rank + 1) * share):
                    keys, noise = (hashlib.sha256(f"{kind} {step} {index}".encode()).hexdigest() for kind in ("keys", "noise"))
                    file.write(json.dumps({"step": step, "index": index, "keys_sha256": keys, "noise_sha256": noise}) + "\n")


def test_tensors_are_hashed_in_name_order_as_fp32_little_endian_bytes() -> None:
    tensors = {"b": torch.tensor([[1.5, -2.0], [3.0, 0.25]]).T, "a": torch.tensor([1.0], dtype=torch.bfloat16)}
    wanted = hashlib.sha256(struct.pack("<5f", 1.0, 1.5, 3.0, -2.0, 0.25)).hexdigest()
    assert tensors_sha256(tensors) == wanted


def test_the_ledgers_hash_is_the_same_for_any_world_size(tmp_path: Path) -> None:
    for world_size in (1, 2, 4):
        write_ledgers(tmp_path / str(world_size), world_size)
    assert len({samples_sha256(tmp_path / str(world_size), before_step=STEPS) for world_size in (1, 2, 4)}) == 1


def test_one_other_sample_changes_the_hash(tmp_path: Path) -> None:
    write_ledgers(tmp_path, 2)
    before = samples_sha256(tmp_path, before_step=STEPS)
    ledger = tmp_path / "ledger" / "rank_1.jsonl"
    lines = ledger.read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "keys_sha256": "0" * 64})
    ledger.write_text("\n".join(lines) + "\n")
    assert samples_sha256(tmp_path, before_step=STEPS) != before


def test_steps_after_the_checkpoint_and_half_a_last_line_do_not_count(tmp_path: Path) -> None:
    write_ledgers(tmp_path / "whole", 1, steps=4)
    write_ledgers(tmp_path / "killed", 1)
    ledger = tmp_path / "killed" / "ledger" / "rank_0.jsonl"
    ledger.write_text(ledger.read_text()[:-30])
    assert samples_sha256(tmp_path / "killed", before_step=4) == samples_sha256(tmp_path / "whole", before_step=4)


def test_a_micro_batch_delivered_twice_and_a_damaged_line_are_named(tmp_path: Path) -> None:
    write_ledgers(tmp_path, 1)
    (tmp_path / "ledger" / "rank_1.jsonl").write_text((tmp_path / "ledger" / "rank_0.jsonl").read_text())
    with pytest.raises(ValueError, match=r"rank_1\.jsonl: step 0, micro-batch 0 was delivered twice"):
        samples_sha256(tmp_path, before_step=STEPS)
    (tmp_path / "ledger" / "rank_1.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ValueError, match=r"rank_1\.jsonl:1: wanted an object"):
        samples_sha256(tmp_path, before_step=STEPS)


def test_a_run_is_hashed_in_three_lines(write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = write_run(tmp_path / "run")
    write_ledgers(run_dir, 2)
    assert hash_job(run_dir, {}) == 0
    hashes = hash_run(run_dir)
    assert capsys.readouterr().out == f"weights {hashes.weights}\nema {hashes.ema}\nsamples {hashes.samples}\n"
    assert hashes.weights != hashes.ema


def test_a_chains_hash_changes_with_any_of_its_stages(write_run: WriteRun, write_chain: WriteRun, tmp_path: Path) -> None:
    teacher, student = write_run(tmp_path / "stage_00"), write_run(tmp_path / "stage_01", student_steps=500)
    chain = write_chain({1000: teacher, 500: student, 250: tmp_path / "stage_02"})
    before = hash_run(chain)
    write_ledgers(student, 1)
    after = hash_run(chain)
    assert before.weights == after.weights
    assert before.samples != after.samples


def test_what_has_no_checkpoint_cannot_be_hashed(write_chain: WriteRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint to hash"):
        hash_run(tmp_path)
    with pytest.raises(ValueError, match="no stage of this chain"):
        hash_run(write_chain({1000: tmp_path / "stage_00"}))
