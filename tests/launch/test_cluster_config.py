"""Cluster files: what each kind takes, what is refused and in which words, and that a frozen one says everything."""

from pathlib import Path

import pytest

from launch.cluster import ClusterConfig, LocalCluster, RayCluster, SlurmCluster, load_cluster
from trainer.config_io import RecipeErrors, dump_yaml, shipped

KINDS = {"local": LocalCluster, "slurm": SlurmCluster, "ray": RayCluster}
SECRET = (
    "looks like a secret, and cluster files are copied into run folders and job scripts; "
    "put a Hub token into the file ~/.cache/huggingface/token, mode 0600, instead"
)
OURS = "the launcher sets this one itself; leave it out (threads: threads_per_rank)"


def write(folder: Path, text: str) -> str:
    path = folder / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def load(folder: Path, text: str, *overrides: str) -> ClusterConfig:
    return load_cluster(write(folder, text), overrides)


def mistakes_of(folder: Path, text: str, *overrides: str) -> list[str]:
    path = write(folder, text)
    with pytest.raises(RecipeErrors) as caught:
        load_cluster(path, overrides)
    return str(caught.value).replace(path, "FILE").splitlines()


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_needs_nothing_but_its_name(kind: str, tmp_path: Path) -> None:
    from_file = load(tmp_path, f"kind: {kind}\n")
    assert type(from_file) is KINDS[kind] and from_file == KINDS[kind]()
    assert load(tmp_path, "", f"kind={kind}") == from_file
    assert from_file.ranks == 1


def test_a_file_without_a_kind_is_local(tmp_path: Path) -> None:
    assert load(tmp_path, "ranks_per_node: 3\n") == LocalCluster(ranks_per_node=3)


@pytest.mark.parametrize("file", shipped("clusters"), ids=lambda file: file.stem)
def test_every_shipped_file_is_found_by_its_name(file: Path) -> None:
    assert load_cluster(file.stem, []) == load_cluster(str(file), [])


def test_the_shipped_local_file_is_the_default() -> None:
    assert load_cluster("local", []) == LocalCluster()


def test_ranks_are_counted_over_all_machines() -> None:
    assert (SlurmCluster(nodes=3, ranks_per_node=8).ranks, LocalCluster(ranks_per_node=8).ranks) == (24, 8)


FULL = {
    "local": "kind: local\nranks_per_node: 4\nmax_restarts: 2\nenvironment: {NCCL_DEBUG: INFO, NCCL_IB_TIMEOUT: 23}\n",
    "slurm": (
        "kind: slurm\nnodes: 2\nranks_per_node: 8\ngpus_per_rank: 1\ngpu_type: a100\npartition: gpu\nconstraint: rack1&ib\n"
        'time_limit_minutes: 240\nsetup: [module load cuda, "source /site/env.sh"]\nextra_sbatch_lines: [--mail-type=END]\n'
        "container: apptainer exec --nv /images/halfstep.sif\nmemory_gib_per_rank: 32.5\nrendezvous_ports: [30000, 30100]\n"
        "chain: dependent_jobs\nsweep_jobs_at_once: 4\nnetwork_interface: ib0\n"
    ),
    "ray": (
        'kind: ray\naddress: http://head:8265\nwait_for_nodes_minutes: 2.5\nresources_per_rank: {"accelerator_type:A100": 0.001, big: 1}\n'
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_file_reloads_to_an_equal_one_and_names_every_key(kind: str, tmp_path: Path) -> None:
    for text in (f"kind: {kind}\n", FULL[kind]):
        cluster = load(tmp_path, text)
        frozen = dump_yaml(cluster)
        assert load(tmp_path, frozen) == cluster
        assert {line.partition(":")[0] for line in frozen.splitlines() if line[0].isalpha()} >= set(type(cluster).model_fields)


def test_variables_may_be_words_or_whole_numbers(tmp_path: Path) -> None:
    words = ["cluster.environment.NCCL_DEBUG=INFO", "environment.NCCL_IB_TIMEOUT=23", "environment.TOKENIZERS_PARALLELISM='true'"]
    cluster = load(tmp_path, "environment: {OMP_PROC_BIND: close}\n", *words)
    assert cluster.environment == {
        "OMP_PROC_BIND": "close",
        "NCCL_DEBUG": "INFO",
        "NCCL_IB_TIMEOUT": 23,
        "TOKENIZERS_PARALLELISM": "true",
    }


@pytest.mark.parametrize(("value", "hint"), [("1.5", " - did you mean 2?"), ("true", ""), ("null", "")])
def test_other_values_of_variables_are_refused(value: str, hint: str, tmp_path: Path) -> None:
    expected = f"command line:1: cluster.environment.NAME: got {value}, wanted text or a whole number{hint}"
    assert mistakes_of(tmp_path, "", f"environment.NAME={value}") == [expected]


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "my_password", "RAY_CREDENTIALS", "APIKEY", "TOKEN"]
)
def test_secrets_are_refused_and_never_repeated(name: str, tmp_path: Path) -> None:
    assert mistakes_of(tmp_path, f"environment:\n  {name}: hunter2\n") == [f"FILE:2: environment.{name}: {SECRET}"]
    assert mistakes_of(tmp_path, "", f"environment.{name}=hunter2") == [f"command line:1: cluster.environment.{name}: {SECRET}"]


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "HALFSTEP_TIMEOUT_SECONDS"])
def test_what_the_launcher_sets_is_refused(name: str, tmp_path: Path) -> None:
    assert mistakes_of(tmp_path, f"environment:\n  {name}: 1\n") == [f"FILE:2: environment.{name}: {OURS}"]


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("kind: local\nenvironment: {a-b: 1}\n", "FILE:2: environment.a-b: 'a-b' is no name of a variable; use letters, digits and _"),
        ("kind: slurm\ngpus_per_rank: 2\n", "FILE:2: gpus_per_rank: got 2, wanted 0 or 1: a rank computes on one device"),
        (
            "kind: ray\nrendezvous_ports: [3000, 2000]\n",
            "FILE:2: rendezvous_ports: got [3000, 2000], wanted the first port before the last",
        ),
        (
            "kind: ray\nrendezvous_ports: [80, 2000]\n",
            "FILE:2: rendezvous_ports[0]: got 80, wanted at least 1024; the default is [20000, 29999]",
        ),
        (
            "kind: slurm\nnetwork_interface: ib0 ib1\n",
            "FILE:2: network_interface: got 'ib0 ib1', wanted one name of `ip link`, such as eth0 or ib0",
        ),
        (
            "kind: slurm\ntime_limit_minutes: 2\n",
            "FILE:1: stop_seconds_before_limit: 120 s is more than half of time_limit_minutes=2; set cluster.stop_seconds_before_limit=30",
        ),
        ("kind: slurm\ngpu_type: a100\n", "FILE:2: gpu_type: 'a100' is asked for, but no GPU; set cluster.gpus_per_rank=1"),
        *(
            (f"kind: slurm\n{key}: a b\n", f"FILE:2: {key}: got 'a b', wanted one word as sbatch takes it, without quotes or spaces")
            for key in ("partition", "account", "qos", "constraint")
        ),
        ("kind: slurm\nqos: ''\n", "FILE:2: qos: got '', wanted one word as sbatch takes it, without quotes or spaces"),
        (
            "kind: slurm\nextra_sbatch_lines: [--mail-type=END, mail]\n",
            "FILE:2: extra_sbatch_lines: item 1 is 'mail', wanted an option such as '--mail-type=END'",
        ),
        (
            "kind: slurm\nsetup: [module load cuda, '#SBATCH --nice']\n",
            "FILE:2: setup: line 1 is an option of sbatch; put '--nice' into extra_sbatch_lines",
        ),
        ("kind: ray\nresources_per_rank: {big: one}\n", "FILE:2: resources_per_rank.big: got 'one', wanted a number"),
        ("kind: local\nmax_restarts: -1\n", "FILE:2: max_restarts: got -1, wanted at least 0; the default is 0"),
    ],
)
def test_each_check_says_what_is_wrong_and_what_mends_it(text: str, mistake: str, tmp_path: Path) -> None:
    assert mistakes_of(tmp_path, text) == [mistake]


def test_every_mistake_is_listed_at_once(tmp_path: Path) -> None:
    found = mistakes_of(tmp_path, "kind: slurm\nnodes: 0\npartition: a b\n", "gpus_per_rank=2")
    assert [line.split(": ")[1] for line in found] == ["nodes", "partition", "cluster.gpus_per_rank"]


@pytest.mark.parametrize(
    ("text", "overrides", "mistake"),
    [
        ("kind: local\npartition: gpu\n", (), "FILE:2: partition: unknown key; it belongs to kind=slurm"),
        ("kind: local\nnodes: 2\n", (), "FILE:2: nodes: unknown key; it belongs to kind=slurm or ray"),
        ("kind: slurm\nwait_for_nodes_minutes: 2\n", (), "FILE:2: wait_for_nodes_minutes: unknown key; it belongs to kind=ray"),
        ("", ("partition=gpu",), "command line:1: cluster.partition: unknown key; it belongs to cluster.kind=slurm"),
        ("kind: slurm\npartition: gpu\n", ("kind=ray",), "FILE:2: partition: unknown key; it belongs to kind=slurm"),
        ("kind: slurm\n", ("part=gpu",), "command line:1: cluster.part: unknown key - did you mean 'cluster.partition'?"),
        ("kind: ray\nadress: auto\n", (), "FILE:2: adress: unknown key - did you mean 'address'?"),
    ],
)
def test_an_unknown_key_names_its_kind_or_the_nearest_key(text: str, overrides: tuple[str, ...], mistake: str, tmp_path: Path) -> None:
    assert mistakes_of(tmp_path, text, *overrides) == [mistake]


@pytest.mark.parametrize(
    ("text", "overrides", "mistake"),
    [
        ("nodes: 2\nkind: slrm\n", (), "FILE:2: kind: got 'slrm', wanted one of local, slurm, ray - did you mean 'slurm'?"),
        ("kind: Ray\n", (), "FILE:1: kind: got 'Ray', wanted one of local, slurm, ray - did you mean 'ray'?"),
        ("kind: kubernetes\n", (), "FILE:1: kind: got 'kubernetes', wanted one of local, slurm, ray"),
        ("kind:\n", (), "FILE:1: kind: got null, wanted one of local, slurm, ray"),
        ("kind: [slurm]\n", (), "FILE:1: kind: got ['slurm'], wanted one of local, slurm, ray - did you mean 'slurm'?"),
        ("", ("kind=locl",), "command line:1: cluster.kind: got 'locl', wanted one of local, slurm, ray - did you mean 'local'?"),
        ("kind: slurm\nkind: ray\n", (), "FILE:2: kind: stands twice, first in line 1; remove one"),
    ],
)
def test_a_wrong_kind_is_the_only_mistake_shown(text: str, overrides: tuple[str, ...], mistake: str, tmp_path: Path) -> None:
    assert mistakes_of(tmp_path, text, *overrides) == [mistake]


def test_a_file_that_is_not_there_names_the_nearest_shipped_one() -> None:
    with pytest.raises(ValueError, match=r"^locl: no such cluster file, nor a shipped cluster of that name - did you mean 'local'\?"):
        load_cluster("locl", [])
