"""How many ranks there are changes the order of summation and nothing else."""

from pathlib import Path

import pytest

from tests.distributed.runs import curves, run
from trainer.hash import hash_run

pytestmark = pytest.mark.distributed


def test_1_2_and_4_ranks_deliver_the_same_samples_and_noise(one_rank: Path, two_ranks: Path, four_ranks: Path) -> None:
    assert hash_run(one_rank).samples == hash_run(two_ranks).samples == hash_run(four_ranks).samples


def test_losses_of_1_2_and_4_ranks_agree_to_1e_6(one_rank: Path, two_ranks: Path, four_ranks: Path) -> None:
    wanted = curves(one_rank)["stage_00_1000_steps"].values[:20]
    assert len(wanted) == 20
    for other in (two_ranks, four_ranks):
        assert curves(other)["stage_00_1000_steps"].values[:20] == pytest.approx(wanted, rel=1e-6)


def test_a_run_goes_on_with_another_number_of_ranks(one_rank: Path, tmp_path: Path) -> None:
    shards = f"data.shards={one_rank / 'shards'}"
    first = run("train", tmp_path / "run", ranks=2, overrides=(shards, "train.stop_after_steps=10"))
    assert first.returncode == 75, first.stderr
    second = run("train", tmp_path / "run", ranks=1, overrides=(shards,))
    assert second.returncode == 0, second.stderr
    assert hash_run(tmp_path / "run").samples == hash_run(one_rank / "stage_00_1000_steps").samples
    assert curves(tmp_path / "run")["run"].values == pytest.approx(curves(one_rank)["stage_00_1000_steps"].values, rel=1e-5)
