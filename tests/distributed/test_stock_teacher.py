"""A teacher named by its Hub id: fetched, pinned, halved, drawn, and found again without a network."""

import json
import shutil
from pathlib import Path

import pytest

from launch.status import print_status
from tests.distributed.test_from_the_hub import halfstep
from tests.hub_double import HubDouble
from trainer.chain import read_chain
from trainer.config import DdpmConfig
from trainer.config_io import load_recipe
from trainer.tiny_models.make import make_tiny

pytestmark = [pytest.mark.distributed, pytest.mark.all_cases]


def test_a_hub_ids_pipeline_is_halved_and_drawn_online_and_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = tmp_path / "hub" / "models" / "tester" / "ddpm"
    folder = make_tiny("ddpm", tmp_path / "tiny")
    flat.mkdir(parents=True)
    for file in (*folder.glob("*.json"), *folder.glob("*/*")):
        shutil.copy(file, flat)
    (flat / "diffusion_pytorch_model.bin").write_bytes(b"a pickle, which nobody asks for")
    chain = tmp_path / "chain"
    changes = ["model.base=tester/ddpm", "distill.teacher=tester/ddpm", "distill.start_steps=8", "distill.end_steps=4", "distill.updates=2"]
    words = ["distill", "distill_cifar10_500-tiny", "--run-dir", chain, "logging.sample_every_steps=0", *changes]
    with HubDouble(tmp_path / "hub") as hub:
        halfstep(*words, environment={**hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"})
        commit = hub.head("models/tester/ddpm")
        assert not any(request.path.endswith(".bin") for request in hub.requests)
        offline = {**hub.environment(tmp_path / "home", offline=True), "OMP_NUM_THREADS": "1"}
    teacher, student = read_chain(chain)
    assert (str(teacher.run_dir), teacher.trained_here) == (f"tester/ddpm@{commit}", False)
    assert load_recipe(student.run_dir / "recipe.yaml").model == DdpmConfig(base="tester/ddpm", revision=commit)
    halfstep(*words, environment=offline)
    halfstep("sample", f"tester/ddpm@{commit}", "--steps", "2", "--images", "1", "--out", tmp_path / "teacher.png", environment=offline)
    halfstep("sample", chain, "--steps", "4", "--images", "1", "--out", tmp_path / "student.png", environment=offline)
    assert (tmp_path / "teacher.png").stat().st_size and (tmp_path / "student.png").stat().st_size
    assert print_status(chain, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "done"
