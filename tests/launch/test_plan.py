"""`halfstep plan` on shipped recipes: the page as people see it, and what it refuses."""

import json
from collections.abc import Callable

import pytest

from launch.cluster import load_cluster
from launch.plan import _title, print_plan
from trainer.config_io import RecipeErrors, load_recipe, recipe_path


def test_the_page_of_the_smoke_recipe(capfd: pytest.CaptureFixture[str], golden: Callable[[str, str], None]) -> None:
    assert print_plan("smoke", [], cluster="local", ranks=2, gpu="t4", as_json=False) == 0
    golden("plan_smoke.txt", capfd.readouterr().out)


def test_the_same_as_json_for_a_cluster_file_and_overrides(capfd: pytest.CaptureFixture[str]) -> None:
    changes = ["engine.kind=fsdp", "cluster.nodes=2", "cluster.gpus_per_rank=1"]
    assert print_plan("smoke", changes, cluster="slurm", ranks=None, gpu=None, as_json=True) == 0
    figures = json.loads(capfd.readouterr().out)
    assert (figures["world_size"], figures["engine"]["kind"]) == (2, "fsdp")
    assert figures["rank_bytes"]["peak"] > figures["parameters"]["trained"] * 4
    assert (figures["fits"], figures["usd"]) == (None, None)


def test_the_page_says_what_it_counts_for_what_is_still_to_be_measured() -> None:
    config = load_recipe(recipe_path("smoke"), ["train.compile=auto", "train.memory_format=auto"])
    assert _title("smoke", config, load_cluster("local", []), ranks=1) == (
        "Plan of smoke on 1 local rank: engine replicated, fp32, eager (train.compile=auto is measured before step 0), "
        "contiguous (train.memory_format=auto is measured before step 0)"
    )


def test_ranks_that_do_not_divide_the_batch_are_refused_as_by_train() -> None:
    with pytest.raises(ValueError, match="3 ranks cannot divide 4 micro-batches"):
        print_plan("smoke", [], cluster="local", ranks=3, gpu=None, as_json=False)


def test_a_mistake_in_the_recipe_is_named() -> None:
    with pytest.raises(RecipeErrors, match=r"optim\.learning_rat"):
        print_plan("smoke", ["optim.learning_rat=1"], cluster="local", ranks=1, gpu=None, as_json=False)


def test_a_strange_gpu_ends_with_the_names_that_there_are(capfd: pytest.CaptureFixture[str]) -> None:
    assert print_plan("smoke", [], cluster="local", ranks=1, gpu="h10", as_json=False) == 64
    assert "did you mean h100?" in capfd.readouterr().err


def test_a_halving_is_planned_with_its_teachers_network_and_all_its_updates(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"distill\.teacher=runs/ddpm_celebahq_cartoon: not there, so its network is not known"):
        print_plan("distill_finetuned_source", [], cluster="local", ranks=None, gpu=None, as_json=True)
    words = ["model={kind: ddpm, base: google/ddpm-cifar10-32}", "data.image_size=32"]
    assert print_plan("distill_finetuned_source", words, cluster="local", ranks=None, gpu="a100-40gb", as_json=True) == 0
    figures = json.loads(capfd.readouterr().out)
    assert figures["parameters"]["trained"] == pytest.approx(35.746e6, rel=1e-4)
    assert figures["run_hours"] == pytest.approx(75_000 * figures["step_seconds"] / 3600)
