"""Job scripts: the whole text for six sites, and what is refused before one is written."""

import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.cluster import SlurmCluster, load_cluster
from launch.job import Job
from launch.slurm import plan, plan_sweep
from launch.slurm_script import Script, render, sbatch_options, template
from launch.start import How, start_train
from trainer.config_io import RecipeErrors

CLUSTERS = sorted((Path(__file__).parent / "clusters").glob("*.yaml"))
RUN = Path("/scratch/ada/runs/faces_64px")


def site(path: Path) -> SlurmCluster:
    cluster = load_cluster(str(path), [])
    assert isinstance(cluster, SlurmCluster)
    return cluster


def text_for(script: Script, cluster: SlurmCluster | None = None) -> str:
    return render(template(), script, cluster or SlurmCluster())


def bash_accepts(text: str) -> bool:
    return subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_there_are_six_sites() -> None:
    assert len(CLUSTERS) == 6


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_the_job_script_of_each_site(path: Path, golden: Callable[[str, str], None]) -> None:
    cluster = site(path)
    if path.stem == "sweep":
        planned = plan_sweep(RUN.parent / "rates", [0, 2, 5], cluster, allow_fresh=False)
    else:
        [planned] = plan(Job("train", RUN, {"allow_fresh": False}), cluster, [])
    text = render(template(), planned.script, cluster)
    golden(f"sbatch/{path.stem}.sbatch", text)
    assert bash_accepts(text)


def test_options_stand_above_the_first_command_where_sbatch_reads_them() -> None:
    for path in CLUSTERS:
        lines = text_for(Script("halfstep-x", RUN, ["true"]), site(path)).splitlines()
        first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
        assert lines[0] == "#!/bin/bash" and lines[first_command].startswith("set -e")
        assert not any(line.startswith("#SBATCH") for line in lines[first_command:])


def test_a_run_that_may_start_over_says_so_to_its_job() -> None:
    [planned] = plan(Job("train", RUN, {"allow_fresh": True}), SlurmCluster(python="/usr/bin/python3"), [])
    assert planned.script.command == ["/usr/bin/python3", "-m", "launch.slurm_job", "train", str(RUN), "--allow-fresh"]


@pytest.mark.parametrize(
    ("folder", "option"),
    [
        ("/data/a b", '--output="/data/a b/job/slurm-%j.out"'),
        ("/data/50%", "--output=/data/50%%/job/slurm-%j.out"),
        ("/data/%j %x", '--output="/data/%%j %%x/job/slurm-%j.out"'),
        ("/data/it's", '--output="/data/it\'s/job/slurm-%j.out"'),
        ('/data/12"', '--output="/data/12\\"/job/slurm-%j.out"'),
        ("/data/#1", '--output="/data/#1/job/slurm-%j.out"'),
        ("/data/$HOME`x`", "--output=/data/$HOME`x`/job/slurm-%j.out"),
    ],
)
def test_odd_folders_come_out_whole(folder: str, option: str) -> None:
    """What is expected here is what the real sbatch 22.05 wrote its output to."""
    text = text_for(Script("halfstep-x", Path(folder), ["echo", folder]))
    assert f"#SBATCH {option}" in text.splitlines() and bash_accepts(text)
    last = text.splitlines()[-1]
    ran = subprocess.run(["bash", "-c", last], capture_output=True, text=True, check=True)
    assert ran.stdout == f"{folder}\n" and shlex.split(last)[0] == "exec"


@pytest.mark.parametrize("folder", ["/data/a\\b", "/data/a\nrm -rf x", "/data/a\r"])
def test_folders_that_slurm_cannot_write_to_are_refused(folder: str) -> None:
    with pytest.raises(ValueError, match=r"a backslash or a line break in its name; give another --run-dir$"):
        Script("halfstep-x", Path(folder), ["true"])


def test_an_array_names_its_elements_and_how_many_run_at_once() -> None:
    script = Script("halfstep-x", RUN, ["true"], (0, 3, 4))
    assert sbatch_options(script, SlurmCluster())["array"] == "0,3,4"
    assert sbatch_options(script, SlurmCluster(sweep_jobs_at_once=2))["array"] == "0,3,4%2"
    assert sbatch_options(script, SlurmCluster())["output"] == f"{RUN}/job/slurm-%A_%a.out"


def test_what_the_cluster_file_leaves_open_is_left_to_the_site() -> None:
    assert sbatch_options(Script("halfstep-x", RUN, ["true"]), SlurmCluster()) == {
        "job-name": "halfstep-x",
        "nodes": "1",
        "ntasks-per-node": "1",
        "cpus-per-task": "1",
        "output": f"{RUN}/job/slurm-%j.out",
        "open-mode": "append",
        "signal": "B:USR1@120",
        "requeue": None,
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("#!/bin/bash", "#!/bin/sh"), "begins and ends as render knows it"),
        (("#SBATCH", "# SBATCH"), "begins and ends as render knows it"),
        (('exec halfstep train --cluster slurm --here "$@"', "halfstep train"), "begins and ends as render knows it"),
        (("# The site's own lines", "# Modules"), "has the site's own lines below its options"),
        (("set -e", "# The site's own lines:\n#SBATCH --nice"), "has the site's own lines below its options"),
    ],
)
def test_a_template_of_another_shape_is_a_loud_error(changed: tuple[str, str], message: str) -> None:
    other = template().replace(*changed)
    assert other != template()
    with pytest.raises(AssertionError, match=message):
        render(other, Script("halfstep-x", RUN, ["true"]), SlurmCluster())


def test_the_template_itself_is_a_job_script_to_submit_by_hand() -> None:
    assert bash_accepts(template())
    assert template().splitlines()[-1] == 'exec halfstep train --cluster slurm --here "$@"'


@pytest.mark.parametrize(
    ("line", "mistake"),
    [
        ("submit_with: srun", "submit_with: got 'srun', wanted one of sbatch, submitit"),
        ("chain: dependent", "chain: got 'dependent', wanted one of one_job, dependent_jobs - did you mean 'dependent_jobs'?"),
        ("gpus_per_node: 8", "gpus_per_node: unknown key - did you mean 'gpus_per_rank'?"),
        ("time_limit: 60", "time_limit: unknown key - did you mean 'time_limit_minutes'?"),
        ("time_limit_minutes: 4h", "time_limit_minutes: got '4h', wanted a whole number"),
        ("nodes: 0", "nodes: got 0, wanted at least 1; the default is 1"),
        ("extra_sbatch_lines: [--nodes=3]", "extra_sbatch_lines: item 0 is '--nodes=3'; leave it out and set cluster.nodes"),
        (
            "extra_sbatch_lines: ['#SBATCH --time 60']",
            "extra_sbatch_lines: item 0 is '#SBATCH --time 60'; leave it out and set cluster.time_",
        ),
        (
            "extra_sbatch_lines: [--no-requeue]",
            "extra_sbatch_lines: item 0 is '--no-requeue'; the launcher sets --no-requeue itself, leave",
        ),
        (
            "extra_sbatch_lines: [--output=x.log]",
            "extra_sbatch_lines: item 0 is '--output=x.log'; the launcher sets --output itself, leave",
        ),
        ("extra_sbatch_lines: [-N3]", "extra_sbatch_lines: item 0 is '-N3', wanted an option such as '--mail-type=END'"),
    ],
)
def test_a_wrong_parameter_fails_before_anything_is_written(
    line: str, mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cluster.yaml").write_text(f"kind: slurm\n{line}\n")
    Path("recipe.yaml").write_text("data: {faces: {count: 4, size: 16}}\ntrain: {steps: 2}\n")
    with pytest.raises(RecipeErrors) as caught:
        start_train("recipe.yaml", [], How(Path("run"), cluster="cluster.yaml"))
    assert str(caught.value).startswith(f"cluster.yaml:2: {mistake}") and "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cluster.yaml", "recipe.yaml"]


def test_a_key_like_no_other_is_answered_with_all_of_them(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("kind: slurm\nzzz: 1\n")
    with pytest.raises(RecipeErrors) as caught:
        load_cluster(str(path), [])
    assert str(caught.value).endswith(f"zzz: unknown key; the file has {', '.join(SlurmCluster.model_fields)}")


def test_a_line_of_the_site_that_fails_ends_the_job_and_an_unset_variable_does_not(tmp_path: Path) -> None:
    def run(*setup: str) -> tuple[int, str]:
        text = text_for(Script("halfstep-x", tmp_path, ["echo", "ranks"]), SlurmCluster(setup=setup))
        done = subprocess.run(["bash"], input=text, text=True, capture_output=True, check=False)
        return done.returncode, done.stdout

    assert run('echo "modules $NEVER_SET"', "true") == (0, "modules \nranks\n")
    assert run("echo modules", "false") == (1, "modules\n")
