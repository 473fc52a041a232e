"""The job script: slurm/train.sbatch filled in from a cluster file. Pure text."""

import importlib.resources
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from launch.cluster import SlurmCluster

_HEADER = """\
# {what}: written by halfstep from slurm/train.sbatch.
# Do not submit it by hand: the halfstep command that wrote it knows what is queued."""


@final
@dataclass(frozen=True)
class Script:
    """What one job is, apart from its cluster."""

    name: str
    run_dir: Path
    """Absolute, like every path in a job script."""
    command: Sequence[str]
    array: Sequence[int] = ()
    """Elements of a job array; empty for a single job."""

    def __post_init__(self) -> None:
        """Raises: ValueError for a folder whose name sbatch cannot read."""
        if re.search(r"[\\\r\n]", str(self.run_dir)):
            text = "Slurm cannot write into a folder with a backslash or a line break in its name"
            raise ValueError(f"{str(self.run_dir)!r}: {text}; give another --run-dir")

    @property
    def output(self) -> str:
        """The job's output, relative to run_dir, with Slurm's % patterns."""
        return "job/slurm-%A_%a.out" if self.array else "job/slurm-%j.out"


def sbatch_options(script: Script, cluster: SlurmCluster) -> dict[str, str | None]:
    """Options of sbatch in the order they are written; None for one without a value."""
    gpus = cluster.gpus_per_rank * cluster.ranks_per_node
    memory_mib = round((cluster.memory_gib_per_rank or 0) * cluster.ranks_per_node * 1024)
    output = str(script.run_dir).replace("%", "%%") + "/" + script.output
    options: dict[str, str | int | bool | None] = {
        "job-name": script.name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "nodes": cluster.nodes,
        "ntasks-per-node": cluster.ranks_per_node,
        "cpus-per-task": cluster.cpus_per_rank,
        "gpus-per-node": f"{cluster.gpu_type}:{gpus}" if cluster.gpu_type else gpus or None,
        "mem": f"{memory_mib}M" if memory_mib else None,
        "exclusive": cluster.exclusive,
        "time": cluster.time_limit_minutes,
        "array": _array(script.array, cluster.sweep_jobs_at_once) if script.array else None,
        "output": output,
        "open-mode": "append",
        "signal": f"B:USR1@{cluster.stop_seconds_before_limit}",
        "requeue": True,
    }
    return {name: None if value is True else str(value) for name, value in options.items() if value is not None and value is not False}


def render(template: str, script: Script, cluster: SlurmCluster) -> str:
    """The job script: the template with its options, its site's lines and its command replaced."""
    lines = template.splitlines()
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    site = next((number for number, line in enumerate(lines) if line.startswith("# The site's own lines")), 0)
    assert options and lines[0] == "#!/bin/bash" and lines[-1].startswith("exec "), "slurm/train.sbatch begins and ends as render knows it"
    assert options[-1] < site, "slurm/train.sbatch has the site's own lines below its options"
    parts = [
        lines[0],
        _HEADER.format(what=script.run_dir),
        *_option_lines(script, cluster),
        *lines[options[-1] + 1 : site + 1],
        *cluster.setup,
        "",
        f"exec {shlex.join(script.command)}",
    ]
    return "\n".join(parts) + "\n"


def template() -> str:
    """slurm/train.sbatch."""
    return importlib.resources.files("slurm").joinpath("train.sbatch").read_text(encoding="utf-8")


def _option_lines(script: Script, cluster: SlurmCluster) -> Iterator[str]:
    for name, value in sbatch_options(script, cluster).items():
        yield f"#SBATCH --{name}" if value is None else f"#SBATCH --{name}={_quoted(value)}"
    for line in cluster.extra_sbatch_lines:
        yield f"#SBATCH {line.removeprefix('#SBATCH ')}"


def _quoted(value: str) -> str:
    """A value as sbatch reads it: in double quotes where it has spaces or quotes."""
    return '"' + value.replace('"', '\\"') + '"' if re.search(r"[\s&|#'\"]", value) else value


def _array(elements: Sequence[int], at_once: int | None) -> str:
    return ",".join(map(str, elements)) + (f"%{at_once}" if at_once else "")
