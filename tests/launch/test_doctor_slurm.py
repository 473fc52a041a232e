"""What Slurm says of itself, and what halfstep doctor makes of it; the texts are a Slurm 22.05's own."""

import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launch.doctor_slurm import SlurmSite, exit_codes, judge, parse_config, parse_partitions, probe, seconds_of
from launch.findings import Finding

CAPTURED = Path(__file__).with_name("captured")
CONFIG = (CAPTURED / "slurm_22_05_config.txt").read_text()
PARTITIONS = (CAPTURED / "slurm_22_05_partitions.txt").read_text()


@pytest.fixture
def site() -> SlurmSite:
    return SlurmSite(parse_config(CONFIG), parse_partitions(PARTITIONS))


def with_config(site: SlurmSite, **config: str) -> SlurmSite:
    return replace(site, config={**site.config, **config})


def with_partition(site: SlurmSite, name: str, **fields: str) -> SlurmSite:
    return replace(site, partitions={**site.partitions, name: {**site.partitions[name], **fields}})


def named(site: SlurmSite, name: str) -> Finding:
    [finding] = [finding for finding in judge(site) if finding.name == name]
    return finding


def test_the_config_is_read_key_by_key() -> None:
    config = parse_config(CONFIG)
    assert config["SLURM_VERSION"] == "22.05.8" and config["PreemptType"] == "preempt/partition_prio"
    assert config["AuthInfo"] == "cred_expire=5,socket=/tmp/doctor-slurm/munge/sock"
    assert (config["KillWait"], config["RequeueExit"], config["RequeueExitHold"], config["JobRequeue"]) == ("5 sec", "85", "(null)", "1")


def test_partitions_are_read_by_name() -> None:
    partitions = parse_partitions(PARTITIONS)
    assert list(partitions) == ["main", "high"]
    assert partitions["main"]["TRES"] == "cpu=8,mem=8000M,node=2,billing=8" and partitions["main"]["GraceTime"] == "5"
    assert [fields["PreemptMode"] for fields in partitions.values()] == ["REQUEUE", "OFF"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30 sec", 30),
        ("5", 5),
        ("10:00", 600),
        ("01:02:03", 3723),
        ("2-12:00:00", 216000),
        ("1-06", 108000),
        ("UNLIMITED", float("inf")),
        ("INFINITE", float("inf")),
        ("NONE", float("inf")),
    ],
)
def test_times_are_read_as_slurm_writes_them(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(("text", "codes"), [("85", {85}), ("1,99-101", {1, 99, 100, 101}), ("(null)", set()), ("", set())])
def test_exit_codes_may_be_spans(text: str, codes: set[int]) -> None:
    assert exit_codes(text) == codes


def test_a_site_as_it_was_found(site: SlurmSite) -> None:
    assert [(finding.name, finding.status, finding.found) for finding in judge(site)] == [
        ("controller", "ok", "Slurm 22.05.8, cluster test, /tmp/doctor-slurm/slurm.conf"),
        ("partitions", "ok", "main* (2 nodes, MaxTime none), high (2 nodes, MaxTime none)"),
        ("preemption", "ok", "main (REQUEUE): a preempted job is queued again"),
        ("GraceTime", "warning", "main: 5 s, then KillWait=5 s: what a preempted job has to end its step and commit a checkpoint"),
        ("user signal", "ok", "preempt_send_user_signal: USR1 comes first, as before a time limit"),
        ("JobRequeue", "ok", "1: a job whose node is lost is queued again"),
        ("RequeueExit", "ok", "85"),
        ("KillWait", "ok", "5 sec between SIGTERM and SIGKILL"),
        ("SlurmdTimeout", "ok", "a lost node is noticed after 15 s"),
        ("accounting", "absent", "none: sacct knows nothing, so submitit cannot tell how jobs ended"),
    ]


@pytest.mark.parametrize(
    ("change", "name", "status", "says"),
    [
        (lambda site: with_config(site, PreemptType="preempt/none"), "preemption", "ok", "jobs are never preempted"),
        (lambda site: with_partition(site, "main", PreemptMode="CANCEL"), "preemption", "warning", "a cancelled job does not come back"),
        (
            lambda site: with_partition(site, "main", PreemptMode="GANG,SUSPEND"),
            "preemption",
            "warning",
            "a suspended job keeps its memory",
        ),
        (lambda site: with_partition(site, "main", GraceTime="0"), "GraceTime", "warning", "main: 0 s, then KillWait=5 s"),
        (lambda site: with_partition(site, "main", GraceTime="55"), "GraceTime", "ok", "main: 55 s, then KillWait=5 s"),
        (lambda site: with_config(site, KillWait="55 sec"), "GraceTime", "ok", "main: 5 s, then KillWait=55 s"),
        (lambda site: with_config(site, SchedulerParameters="(null)"), "user signal", "ok", "SIGTERM comes instead, which ranks obey"),
        (
            lambda site: with_config(site, SchedulerParameters="(null)", SlurmctldParameters="a,preempt_send_user_signal"),
            "user signal",
            "ok",
            "USR1 comes first",
        ),
        (lambda site: with_config(site, JobRequeue="0"), "JobRequeue", "ok", "unless it asks with --requeue, which halfstep's scripts do"),
        (
            lambda site: with_config(site, RequeueExit="64-66"),
            "RequeueExit",
            "warning",
            "64 (bad input), 65 (data budget spent), 66 (numbers",
        ),
        (lambda site: with_config(site, RequeueExitHold="0"), "RequeueExitHold", "warning", "ended with 0 (done) is queued again and held"),
        (lambda site: with_config(site, RequeueExitHold="75"), "RequeueExitHold", "ok", "75"),
        (lambda site: with_config(site, SlurmdTimeout="0 sec"), "SlurmdTimeout", "warning", "0: a lost node is never noticed"),
        (lambda site: with_config(site, SlurmdTimeout="3600 sec"), "SlurmdTimeout", "warning", "3600 s: so long does a run wait"),
        (lambda site: with_config(site, AccountingStorageType="accounting_storage/slurmdbd"), "accounting", "ok", "slurmdbd"),
        (lambda site: with_partition(site, "high", State="DOWN"), "partitions", "warning", "high is DOWN"),
        (lambda site: with_partition(site, "high", MaxTime="1-00:00:00"), "partitions", "ok", "high (2 nodes, MaxTime 1-00:00:00)"),
        (lambda site: replace(site, partitions={}), "partitions", "warning", "none"),
    ],
)
def test_each_setting_is_judged(change: Callable[[SlurmSite], SlurmSite], name: str, status: str, says: str, site: SlurmSite) -> None:
    finding = named(change(site), name)
    assert finding.status == status and says in finding.found
    assert bool(finding.mend) == (status != "ok")


def test_where_nothing_is_preempted_nothing_is_said_of_how(site: SlurmSite) -> None:
    names = {finding.name for finding in judge(with_config(site, PreemptType="preempt/none"))}
    assert not names & {"GraceTime", "user signal"}


def _scontrol(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for scontrol, before the machine's own."""
    program = folder / "scontrol"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_controller_that_answers_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: SlurmSite) -> None:
    texts = f"{CAPTURED}/slurm_22_05"
    _scontrol(
        tmp_path, f'case "$*" in *config) cat {texts}_config.txt;; *partition) cat {texts}_partitions.txt;; *) exit 1; esac', monkeypatch
    )
    assert probe({}, seconds=5) == (site, list(judge(site)))


def test_a_controller_that_never_answers_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _scontrol(tmp_path, "exec sleep 60", monkeypatch)
    began = time.monotonic()
    found, [finding] = probe({}, seconds=0.3)
    assert found is None and time.monotonic() - began < 5
    assert (finding.name, finding.status, finding.found) == ("controller", "problem", "Slurm: no answer within 0 s")


def test_a_controller_that_answers_once_and_then_no_more_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _scontrol(tmp_path, f'case "$*" in *config) cat {CAPTURED}/slurm_22_05_config.txt;; *) exec sleep 60; esac', monkeypatch)
    began = time.monotonic()
    assert probe({}, seconds=1)[0] is None and time.monotonic() - began < 5


def test_a_machine_without_slurm_lacks_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found, [finding] = probe({"SLURM_CONF": "/nowhere"}, seconds=1)
    assert found is None and finding.status == "absent" and "login node" in finding.mend


def test_a_configuration_that_is_not_there_is_a_mistake_of_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _scontrol(tmp_path, "exec sleep 60", monkeypatch)
    [finding] = probe({"SLURM_CONF": "/nowhere"}, seconds=1)[1]
    assert (finding.status, finding.found) == ("problem", "SLURM_CONF=/nowhere is not there")


def test_commands_without_a_cluster_are_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _scontrol(tmp_path, "echo 'scontrol: fatal: Could not establish a configuration source' >&2; exit 1", monkeypatch)
    [finding] = probe({}, seconds=1)[1]
    assert finding.status == "absent" and finding.mend == "set SLURM_CONF to the site's slurm.conf"


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="Slurm is not installed")
def test_a_dead_slurmctld_is_a_problem_within_the_time_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    conf = tmp_path / "slurm.conf"
    conf.write_text(f"ClusterName=dead\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort={port}\nAuthType=auth/none\nNodeName=n1\n")
    monkeypatch.setenv("SLURM_CONF", str(conf))
    began = time.monotonic()
    found, [finding] = probe(os.environ, seconds=1)
    assert found is None and time.monotonic() - began < 3
    assert finding.status == "problem" and finding.found.startswith(f"{conf}: ") and "scontrol ping" in finding.mend
