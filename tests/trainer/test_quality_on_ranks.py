"""Evaluation and report on several ranks: the numbers and pictures of one."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path

import pytest

from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from launch.cluster import load_cluster
from launch.job import Job
from launch.local import run_job
from tests.trainer.conftest import IMAGE_SIZE, WriteRun
from trainer.evaluate import evaluate_job
from trainer.evaluation import EvaluationRow, read_rows
from trainer.report.job import report_job

pytestmark = pytest.mark.distributed

MACHINES = ("seconds_per_image", "images_per_second", "timings", "ranks")
"""What may differ: how fast, and on how many."""


def test_two_ranks_measure_and_draw_as_one_does(
    write_run: WriteRun, write_chain: Callable[[Mapping[int, Path]], Path], tmp_path: Path
) -> None:
    chain = write_chain(
        {48: write_run(tmp_path / "teacher", levels=48), 3: write_run(tmp_path / "student", student_steps=3, levels=48, seed=1)}
    )
    pack(FacesSource("open-peeps", 24), tmp_path / "faces", size=IMAGE_SIZE)
    # 11 images: one rank draws one more than the other
    pack(FacesSource("open-peeps", 13, seed=2), tmp_path / "learnt", size=IMAGE_SIZE)
    options: dict[str, object] = {"reference": str(tmp_path / "faces"), "images": 11, "batch_size": 4, "feature_net_updates": 3}
    options |= {"training": str(tmp_path / "learnt"), "time_batches": [2]}
    machines = load_cluster("local", [])
    assert run_job(Job("evaluate", chain, {**options, "out": str(tmp_path / "two" / "evaluation.json")}), machines, ranks=2) == 0
    assert run_job(Job("report", chain, {"out": str(tmp_path / "two" / "report.html")}), machines, ranks=2) == 0
    assert len(list((chain / "pictures").iterdir())) == 3
    (chain / "pictures").rename(chain / "pictures_of_two")

    evaluate_job(chain, {**options, "out": str(tmp_path / "one" / "evaluation.json")})
    report_job(chain, {"out": str(tmp_path / "one" / "report.html")})
    assert (tmp_path / "one" / "grid.png").read_bytes() == (tmp_path / "two" / "grid.png").read_bytes()
    two, one = read_rows(tmp_path / "two" / "evaluation.json"), read_rows(tmp_path / "one" / "evaluation.json")
    for row, alone in zip(two, one, strict=True):
        assert (row.ranks, alone.ranks) == (2, 1) and len(row.timings) == len(alone.timings) == 1
        for field in fields(EvaluationRow):
            mine, others = getattr(row, field.name), getattr(alone, field.name)
            if field.name in MACHINES:
                continue
            if isinstance(others, float):  # batches are the same on any number of ranks; sums differ in their last digits
                assert mine == pytest.approx(others, rel=1e-6, abs=1e-9), field.name
            else:
                assert mine == others, field.name
    sheets = {path.name: path.read_bytes() for path in (tmp_path / "two" / "evaluation_neighbours").iterdir()}
    assert sheets and sheets == {path.name: path.read_bytes() for path in (tmp_path / "one" / "evaluation_neighbours").iterdir()}
