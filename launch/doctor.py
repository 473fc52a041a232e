"""halfstep doctor: what this machine, its Slurm and its Ray have, what they lack, and how to mend it. Free of torch."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from launch import doctor_ray, doctor_slurm
from launch.cluster import ClusterConfig, RayCluster, load_cluster
from launch.doctor_cluster import Site, check_cluster
from launch.doctor_devices import Torch, devices, processors
from launch.doctor_machine import hub_reachable, hub_token, machine, packages
from launch.findings import Finding, count, findings_json, findings_text

_Answer = TypeVar("_Answer")

_TORCH_SECONDS = 60.0
"""Importing torch takes 2 s; from a cold network file system, a minute."""
_ANSWER_SECONDS = 3.5
"""What Slurm and the Hub get to answer."""
_RAY_SECONDS = 8.0
"""What a Ray that takes connections gets: its own command takes 4 s to be refused. A dead one shows in 2 s."""
_MORE_SECONDS = 0.5


def run_doctor(*, as_json: bool = False, cluster: str | None = None, online: bool = False) -> int:
    """Write what was found; returns 1 if anything is a problem.

    cluster: a cluster file to compare with it. online: whether to try the Hub.
    Raises: ValueError for a cluster file that cannot be used."""
    file = None if cluster is None else load_cluster(cluster, [])
    findings = examine(file, online=online)
    sys.stdout.write(json.dumps(findings_json(findings), indent=2) + "\n" if as_json else findings_text(findings))
    return 1 if count(findings, "problem") else 0


def examine(cluster: ClusterConfig | None, *, online: bool, runs: Path = Path("runs")) -> list[Finding]:
    """Everything that is looked at; what has to wait for others waits beside each other, and not for long."""
    address = cluster.address if isinstance(cluster, RayCluster) else None
    began = time.monotonic()
    torch = _begin(lambda: Torch.ask(seconds=_TORCH_SECONDS))
    slurm = _begin(lambda: doctor_slurm.probe(os.environ, seconds=_ANSWER_SECONDS))
    ray = _begin(lambda: doctor_ray.probe(address, os.environ, seconds=_RAY_SECONDS))
    hub = _begin(lambda: [hub_reachable(os.environ, seconds=_ANSWER_SECONDS)] if online else [])
    files = _begin(lambda: [*machine(runs), hub_token(os.environ)])
    about_packages = [*packages()]

    deadline, later = (began + seconds + _MORE_SECONDS for seconds in (_ANSWER_SECONDS, _RAY_SECONDS))
    about_files = _result(files, deadline, [_silent("Machine", "files", "a file system hangs: that of runs, home or temp")])
    about_hub = _result(hub, deadline, [_silent("Hugging Face Hub", "reachable", "a name server may be dead")])
    site, about_slurm = _result(slurm, deadline, (None, [_silent("Slurm", "controller", "is slurmctld reachable?")]))
    state, about_ray = _result(ray, later, (None, [_silent("Ray", "cluster", "a name server may be dead")]))
    about_devices = [*_devices(torch)]
    findings = [*about_packages, *about_devices, *about_files, *about_hub, *about_slurm, *about_ray]
    if cluster is not None:
        known = None if torch.exception() else torch.result()
        findings += check_cluster(cluster, Site(known, site, state), runs=runs)
    return findings


def _devices(torch: Future[Torch]) -> Iterator[Finding]:
    yield processors()
    try:
        yield from devices(torch.result(), os.environ)
    except (RuntimeError, ValueError) as error:
        yield Finding("Devices", "torch", "problem", f"cannot be imported: {error}", "python -c 'import torch' says more; reinstall it")


def _begin(question: Callable[[], _Answer]) -> Future[_Answer]:
    """Ask in a thread that dies with this process, whatever holds it up."""
    asked: Future[_Answer] = Future()

    def work() -> None:
        try:
            asked.set_result(question())
        except BaseException as error:
            asked.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return asked


def _result(asked: Future[_Answer], deadline: float, otherwise: _Answer) -> _Answer:
    try:
        return asked.result(max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        return otherwise


def _silent(group: str, name: str, mend: str) -> Finding:
    return Finding(group, name, "problem", "no answer in time", mend)
