"""The cluster file: where a recipe runs. Free of torch."""

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field

from trainer.config_io import Mistake, RecipeErrors, config_path, load_config, written_kind
from trainer.config_sections import Count, CountOrZero, Positive, Problem, Section
from trainer.config_wording import wrong_word

Variables = dict[str, str | int]
Lines = Annotated[tuple[str, ...], Field(strict=False)]
Ports = Annotated[tuple[Annotated[int, Field(ge=1024, le=65535)], ...], Field(strict=False, min_length=2, max_length=2)]

_OURS = frozenset(
    {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "MKL_NUM_THREADS"}
)
_OF_THE_LAUNCHER = frozenset({"ntasks", "output", "error", "open-mode", "requeue", "no-requeue", "array"})
_KEY_OF_OPTION = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "nodes": "nodes",
    "ntasks-per-node": "ranks_per_node",
    "cpus-per-task": "cpus_per_rank",
    "gpus-per-node": "gpus_per_rank",
    "time": "time_limit_minutes",
    "signal": "stop_seconds_before_limit",
}
"""Options of sbatch that have a key of their own."""
_SECRET = re.compile(r"TOKEN(?!IZER|_PATH)|SECRET|PASSWORD|API_?KEY|CREDENTIAL", re.IGNORECASE)


class _Machines(Section):
    """What every kind of cluster file has."""

    ranks_per_node: Count = 1
    """Ranks per machine; one a GPU, or on CPU one a core."""
    threads_per_rank: Count = 1
    """Compute threads per rank; on CPU several ranks of one thread beat one rank of several."""
    collective_timeout_seconds: Annotated[float, Positive] = 300.0
    """Longest wait for the other ranks in one collective operation."""
    environment: Variables = Field(default_factory=dict)
    """Variables of every rank, such as NCCL_DEBUG, NCCL_IB_HCA or GLOO_SOCKET_IFNAME; no secrets, for they are written down."""

    def problems(self) -> Iterator[Problem]:
        for name in self.environment:
            key = f"environment.{name}"
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                yield Problem((key,), f"'{name}' is no name of a variable; use letters, digits and _")
            elif name in _OURS or name.startswith("HALFSTEP_"):
                yield Problem((key,), "the launcher sets this one itself; leave it out (threads: threads_per_rank)")
            elif _SECRET.search(name):
                text = "looks like a secret, and cluster files are copied into run folders and job scripts"
                yield Problem((key,), f"{text}; put a Hub token into the file ~/.cache/huggingface/token, mode 0600, instead")


class LocalCluster(_Machines):
    """Ranks on this machine, started by the command itself, listening on loopback only."""

    kind: Literal["local"] = "local"
    """local: ranks on this machine, started by the command itself."""
    max_restarts: CountOrZero = 0
    """How often in a row a run that lost a rank or crashed is started again without having come further; 0 never starts it again."""

    @property
    def ranks(self) -> int:
        """Ranks of the run."""
        return self.ranks_per_node


class _Network(_Machines):
    """What clusters of several machines share."""

    nodes: Count = 1
    """Machines of a run."""
    gpus_per_rank: CountOrZero = 0
    """GPUs per rank: 1, or 0 for ranks on CPUs."""
    cpus_per_rank: Count = 1
    """Processor cores per rank, for compute threads and data.workers."""
    memory_gib_per_rank: Annotated[float, Positive] | None = None
    """Main memory per rank in GiB; null leaves it to the cluster."""
    max_restarts: CountOrZero = 5
    """How often in a row a run may be started again without having come further; preemptions and time limits count too."""
    network_interface: str | None = None
    """Interface that ranks listen on and reach each other by, such as ib0; null takes the one that leads to the first node.

    On a single node it is loopback in any case."""
    rendezvous_ports: Ports = (20000, 29999)
    """First and last port that rank 0 may listen on."""
    sweep_jobs_at_once: Count | None = None
    """Of a sweep: how many of its runs may run at a time; null leaves it to the cluster's room."""

    @property
    def ranks(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.ranks_per_node

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.gpus_per_rank > 1:
            yield Problem(("gpus_per_rank",), f"got {self.gpus_per_rank}, wanted 0 or 1: a rank computes on one device")
        first, last = self.rendezvous_ports
        if first > last:
            yield Problem(("rendezvous_ports",), f"got [{first}, {last}], wanted the first port before the last")
        if self.network_interface is not None and not re.fullmatch(r"[A-Za-z0-9._@-]{1,15}", self.network_interface):
            yield Problem(("network_interface",), f"got '{self.network_interface}', wanted one name of `ip link`, such as eth0 or ib0")


class SlurmCluster(_Network):
    """Slurm: a job script is written, submitted and comes back by itself when it is preempted."""

    kind: Literal["slurm"] = "slurm"
    """slurm: jobs that sbatch queues, one srun task a rank."""
    partition: str | None = None
    """Partition; null takes the site's default."""
    account: str | None = None
    """Account that is charged; null takes the user's default."""
    qos: str | None = None
    """Quality of service; null takes the default."""
    constraint: str | None = None
    """Features that nodes must have, such as a100 or "rack1&ib"."""
    gpu_type: str | None = None
    """Name of the GPU in the site's gres, such as a100; null takes any."""
    exclusive: bool = False
    """Whether nodes are the job's alone."""
    time_limit_minutes: Count | None = None
    """Time limit of one segment; a run that needs longer comes back for the next one. null takes the partition's."""
    stop_seconds_before_limit: Count = 120
    """How long before the time limit ranks are told to stop: at least two steps, a checkpoint and a minute."""
    setup: Lines = ()
    """Shell lines before the run: `module load cuda`, `source /site/env.sh`."""
    container: str | None = None
    """Words before the ranks' command, such as "apptainer exec --nv /images/halfstep.sif"; it needs the same paths inside."""
    python: str | None = None
    """Interpreter on the nodes, with halfstep installed; null takes the one that runs this command."""
    submit_with: Literal["sbatch", "submitit"] = "sbatch"
    """sbatch, or submitit, which adds its own folder of job files."""
    chain: Literal["one_job", "dependent_jobs"] = "one_job"
    """Of `halfstep distill`: all stages in one job, or a job a stage, each waiting for the one before."""
    extra_sbatch_lines: Lines = ()
    """Further options of sbatch, such as "--mail-type=END" or "--reservation=day"."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        limit, before = self.time_limit_minutes, self.stop_seconds_before_limit
        if limit is not None and before > limit * 30:
            text = f"{before} s is more than half of time_limit_minutes={limit}; set cluster.stop_seconds_before_limit={limit * 15}"
            yield Problem(("stop_seconds_before_limit", "time_limit_minutes"), text)
        if self.gpu_type is not None and self.gpus_per_rank == 0:
            yield Problem(("gpu_type", "gpus_per_rank"), f"'{self.gpu_type}' is asked for, but no GPU; set cluster.gpus_per_rank=1")
        for name in ("partition", "account", "qos", "constraint", "gpu_type"):
            value = getattr(self, name)
            if value is not None and (not value or re.search(r"[\s\"'$`\\]", value)):
                yield Problem((name,), f"got '{value}', wanted one word as sbatch takes it, without quotes or spaces")
        for number, line in enumerate(self.extra_sbatch_lines):
            option = re.fullmatch(r"(?:#SBATCH )?--([A-Za-z][A-Za-z-]*)([= ][^\n]*)?", line)
            if not option:
                yield Problem(("extra_sbatch_lines",), f"item {number} is '{line[:60]}', wanted an option such as '--mail-type=END'")
            elif key := _KEY_OF_OPTION.get(option[1]):
                yield Problem(("extra_sbatch_lines",), f"item {number} is '{line[:60]}'; leave it out and set cluster.{key}")
            elif option[1] in _OF_THE_LAUNCHER:
                yield Problem(
                    ("extra_sbatch_lines",), f"item {number} is '{line[:60]}'; the launcher sets --{option[1]} itself, leave it out"
                )
        for number, line in enumerate(self.setup):
            if line.startswith("#SBATCH"):
                yield Problem(("setup",), f"line {number} is an option of sbatch; put '{line[8:60]}' into extra_sbatch_lines")


class RayCluster(_Network):
    """Ray: workers of Ray Train on a running cluster, or on a Ray of this command's own."""

    kind: Literal["ray"] = "ray"
    """ray: a rank in each worker of a Ray Train group."""
    address: str | None = None
    """A running cluster: auto, HOST:PORT, or http(s)://HOST:PORT to submit a job. null takes RAY_ADDRESS, else starts a Ray here."""
    wait_for_nodes_minutes: Annotated[float, Positive] = 10.0
    """How long to wait for machines, also after one was lost; a pool that scales by itself needs minutes."""
    python: str | None = None
    """Interpreter on the nodes, with halfstep installed; null takes the one that Ray's workers, or this command, run with."""
    resources_per_rank: dict[str, float] = Field(default_factory=dict)
    """Further Ray resources of a rank, such as "accelerator_type:A100": 0.001."""


ClusterConfig = LocalCluster | SlurmCluster | RayCluster

_KINDS: dict[str, type[LocalCluster] | type[SlurmCluster] | type[RayCluster]] = {
    "local": LocalCluster,
    "slurm": SlurmCluster,
    "ray": RayCluster,
}


def load_cluster(name_or_path: str, overrides: Sequence[str]) -> ClusterConfig:
    """The cluster file of a shipped name or a path, with `KEY=VALUE` overrides.

    Raises: RecipeErrors listing every mistake; ValueError if there is no such file."""
    path = config_path(name_or_path, folder="clusters")
    kind, source, line = written_kind(path, overrides, prefix="cluster.", default="local")
    if not isinstance(kind, str) or kind not in _KINDS:
        key = "kind" if source != "command line" else "cluster.kind"
        raise RecipeErrors([Mistake(source, line, key, wrong_word(kind, ", ".join(f"'{name}'" for name in _KINDS)))])
    others = tuple(other for name, other in _KINDS.items() if name != kind)
    return load_config(_KINDS[kind], path, overrides, prefix="cluster.", others=others)
