"""Evaluation and report on several ranks: the numbers and pictures of one."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from launch.cluster import load_cluster
from launch.job import Job
from launch.local import run_job
from tests.trainer.conftest import IMAGE_SIZE, WriteRun
from trainer.evaluate import evaluate_job
from trainer.evaluation import read_rows
from trainer.report.job import report_job

pytestmark = pytest.mark.distributed


def test_two_ranks_measure_and_draw_as_one_does(
    write_run: WriteRun, write_chain: Callable[[Mapping[int, Path]], Path], tmp_path: Path
) -> None:
    chain = write_chain(
        {48: write_run(tmp_path / "teacher", levels=48), 3: write_run(tmp_path / "student", student_steps=3, levels=48, seed=1)}
    )
    pack(FacesSource("open-peeps", 24), tmp_path / "faces", size=IMAGE_SIZE)
    # 11 images: one rank draws one more than the other
    options: dict[str, object] = {"reference": str(tmp_path / "faces"), "images": 11, "batch_size": 4, "feature_net_updates": 3}
    machines = load_cluster("local", [])
    assert run_job(Job("evaluate", chain, {**options, "out": str(tmp_path / "two.json")}), machines, ranks=2) == 0
    assert run_job(Job("report", chain, {"out": str(tmp_path / "two" / "report.html")}), machines, ranks=2) == 0
    assert len(list((chain / "pictures").iterdir())) == 3
    (chain / "pictures").rename(chain / "pictures_of_two")

    evaluate_job(chain, {**options, "out": str(tmp_path / "one.json")})
    report_job(chain, {"out": str(tmp_path / "one" / "report.html")})
    assert (tmp_path / "one" / "grid.png").read_bytes() == (tmp_path / "two" / "grid.png").read_bytes()
    two, one = read_rows(tmp_path / "two.json"), read_rows(tmp_path / "one.json")
    for row, alone in zip(two, one, strict=True):
        if alone.frechet_distance is not None and alone.kid is not None:
            assert row.frechet_distance == pytest.approx(alone.frechet_distance, rel=1e-3)
            assert row.kid == pytest.approx(alone.kid, rel=1e-2, abs=1e-3)
        first, second = (replace(each, frechet_distance=None, kid=None, seconds_per_image=0.0) for each in (row, alone))
        assert first == second
