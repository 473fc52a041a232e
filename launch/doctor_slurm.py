"""halfstep doctor: what a site's Slurm does with jobs that are preempted, time out or lose a node."""

import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self, final

from launch.findings import Finding, ask
from trainer.exit_codes import BAD_INPUT, DATA_BUDGET, DONE, NUMERIC

_GROUP = "Slurm"
_LISTED = 8
_LATE_SECONDS = 600
_SHORT_SECONDS = 60
_FINAL = {DONE: "done", BAD_INPUT: "bad input", DATA_BUDGET: "data budget spent", NUMERIC: "numbers that are not finite"}
"""Exit codes of jobs after which no other may follow."""


@final
@dataclass(frozen=True)
class SlurmSite:
    """What the controller says of itself."""

    config: Mapping[str, str]
    partitions: Mapping[str, Mapping[str, str]]

    @classmethod
    def ask(cls, *, seconds: float) -> Self:
        """Raises: RuntimeError if the controller does not answer in time, or refuses."""
        deadline = time.monotonic() + seconds
        config = parse_config(ask(["scontrol", "show", "config"], seconds=seconds))
        left = max(0.1, deadline - time.monotonic())
        return cls(config, parse_partitions(ask(["scontrol", "--oneliner", "--all", "show", "partition"], seconds=left)))

    @property
    def preemptable(self) -> dict[str, str]:
        """Partitions whose jobs may be preempted, and how."""
        if self.config.get("PreemptType", "preempt/none") == "preempt/none":
            return {}
        modes = {name: fields.get("PreemptMode", "OFF") for name, fields in self.partitions.items()}
        return {name: mode for name, mode in modes.items() if mode != "OFF"}


def parse_config(text: str) -> dict[str, str]:
    """`scontrol show config`."""
    pairs = (line.partition("=") for line in text.splitlines())
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


def parse_partitions(text: str) -> dict[str, dict[str, str]]:
    """`scontrol --oneliner show partition`, by name."""
    found = [_fields(line) for line in text.splitlines() if line.startswith("PartitionName=")]
    return {fields["PartitionName"]: fields for fields in found}


def _fields(line: str) -> dict[str, str]:
    pairs = (word.partition("=") for word in line.split())
    return {key: value for key, equals, value in pairs if equals}


def seconds_of(text: str) -> float:
    """Slurm's times: `30 sec`, `5`, `10:00`, `2-12:00:00`; infinity for UNLIMITED, INFINITE and NONE."""
    if re.fullmatch(r"\d+( sec)?", text):
        return float(text.split()[0])
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in (*parts, days or "0")):
        return float("inf")
    parts = [*parts, *["0"] * (3 - len(parts))] if days else ["0"] * (3 - len(parts)) + parts
    hours, minutes, seconds = map(int, parts)
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def probe(variables: Mapping[str, str], *, seconds: float) -> tuple[SlurmSite | None, list[Finding]]:
    """What Slurm says, judged; None and a reason where it says nothing."""
    if shutil.which("scontrol") is None:
        mend = "only for cluster files of kind slurm: use a login node of the cluster"
        return None, [Finding(_GROUP, "commands", "absent", "not on this machine", mend)]
    named = variables.get("SLURM_CONF")
    if named and not Path(named).exists():  # Slurm itself would look for a minute whether it appears
        return None, [Finding(_GROUP, "controller", "problem", f"SLURM_CONF={named} is not there", "set it to the site's slurm.conf")]
    try:
        site = SlurmSite.ask(seconds=seconds)
    except RuntimeError as error:
        if not named and "configuration source" in str(error):
            text = "Slurm's commands are here, but no configuration of a cluster"
            return None, [Finding(_GROUP, "controller", "absent", text, "set SLURM_CONF to the site's slurm.conf")]
        mend = "is slurmctld running (scontrol ping), and reachable from here?"
        return None, [Finding(_GROUP, "controller", "problem", f"{named or 'Slurm'}: {error}", mend)]
    return site, list(judge(site))


def judge(site: SlurmSite) -> Iterator[Finding]:
    """Each setting that decides whether runs come back by themselves."""
    config = site.config
    found = f"Slurm {config.get('SLURM_VERSION', '?')}, cluster {config.get('ClusterName', '?')}, {config.get('SLURM_CONF', '?')}"
    yield Finding(_GROUP, "controller", "ok", found)
    yield _partitions(site)
    yield _preemption(site)
    if site.preemptable:
        yield _grace(site)
        yield _user_signal(config)
    yield _requeue(config)
    yield from _requeue_exits(config)
    yield _kill_wait(config)
    yield _lost_nodes(config)
    yield _accounting(config)


def _partitions(site: SlurmSite) -> Finding:
    described = [
        f"{name}{'*' if fields.get('Default') == 'YES' else ''} ({fields.get('TotalNodes', '?')} nodes, MaxTime {_limit(fields)})"
        for name, fields in site.partitions.items()
    ]
    text = ", ".join(described[:_LISTED]) + (f" and {len(described) - _LISTED} more" if len(described) > _LISTED else "")
    down = [f"{name} is {fields['State']}" for name, fields in site.partitions.items() if fields.get("State", "UP") != "UP"]
    if not described or down:
        return Finding(_GROUP, "partitions", "warning", "; ".join([text or "none", *down]), "jobs wait there until the site opens one")
    return Finding(_GROUP, "partitions", "ok", text)


def _limit(fields: Mapping[str, str]) -> str:
    limit = fields.get("MaxTime", "UNLIMITED")
    return "none" if limit == "UNLIMITED" else limit


def _preemption(site: SlurmSite) -> Finding:
    name, modes = "preemption", site.preemptable
    text = ", ".join(f"{partition} ({mode})" for partition, mode in modes.items())
    if not modes:
        return Finding(_GROUP, name, "ok", "jobs are never preempted")
    if any("SUSPEND" in mode or "GANG" in mode for mode in modes.values()):
        return Finding(
            _GROUP,
            name,
            "warning",
            f"{text}: a suspended job keeps its memory and commits nothing",
            "use a partition with PreemptMode=REQUEUE",
        )
    if any("CANCEL" in mode for mode in modes.values()):
        return Finding(
            _GROUP,
            name,
            "warning",
            f"{text}: a cancelled job does not come back by itself",
            "give the same halfstep command again after a preemption, or use a partition with PreemptMode=REQUEUE",
        )
    return Finding(_GROUP, name, "ok", f"{text}: a preempted job is queued again")


def _grace(site: SlurmSite) -> Finding:
    kill_wait = seconds_of(site.config.get("KillWait", "30 sec"))
    grace = {name: seconds_of(site.partitions[name].get("GraceTime", "0")) for name in site.preemptable}
    text = ", ".join(f"{name}: {seconds:g} s" for name, seconds in grace.items())
    found = f"{text}, then KillWait={kill_wait:g} s: what a preempted job has to end its step and commit a checkpoint"
    if min(grace.values()) + kill_wait < _SHORT_SECONDS:
        mend = "ask the site for more, if your model's checkpoint takes longer; a low checkpoint.every_steps bounds what is done again"
        return Finding(_GROUP, "GraceTime", "warning", found, mend)
    return Finding(_GROUP, "GraceTime", "ok", found)


def _user_signal(config: Mapping[str, str]) -> Finding:
    places = ("SlurmctldParameters", "SchedulerParameters", "PreemptParameters")
    if any("send_user_signal" in config.get(place, "") for place in places):
        return Finding(_GROUP, "user signal", "ok", "preempt_send_user_signal: USR1 comes first, as before a time limit")
    return Finding(_GROUP, "user signal", "ok", "no preempt_send_user_signal: SIGTERM comes instead, which ranks obey as well")


def _requeue(config: Mapping[str, str]) -> Finding:
    if config.get("JobRequeue", "1") == "1":
        return Finding(_GROUP, "JobRequeue", "ok", "1: a job whose node is lost is queued again")
    return Finding(
        _GROUP, "JobRequeue", "ok", "0: a lost node brings no job back unless it asks with --requeue, which halfstep's scripts do"
    )


def exit_codes(text: str) -> frozenset[int]:
    """The codes of RequeueExit and RequeueExitHold: `85`, `1,99-101`."""
    spans = [part.partition("-") for part in text.split(",") if re.fullmatch(r"\d+(-\d+)?", part)]
    return frozenset(code for first, _, last in spans for code in range(int(first), int(last or first) + 1))


def _requeue_exits(config: Mapping[str, str]) -> Iterator[Finding]:
    for name, what in (("RequeueExit", "queued again, for ever"), ("RequeueExitHold", "queued again and held")):
        text = config.get(name, "(null)")
        wrong = [f"{code} ({_FINAL[code]})" for code in sorted(exit_codes(text) & _FINAL.keys())]
        if wrong:
            mend = "after such an end: scancel JOB; and ask the site for other codes"
            yield Finding(_GROUP, name, "warning", f"{text}: a run that ended with {', '.join(wrong)} is {what}", mend)
        elif text != "(null)":
            yield Finding(_GROUP, name, "ok", text)


def _kill_wait(config: Mapping[str, str]) -> Finding:
    text = config.get("KillWait", "30 sec")
    return Finding(_GROUP, "KillWait", "ok", f"{text} between SIGTERM and SIGKILL")


def _lost_nodes(config: Mapping[str, str]) -> Finding:
    seconds = seconds_of(config.get("SlurmdTimeout", "300 sec"))
    if seconds == 0:
        return Finding(
            _GROUP, "SlurmdTimeout", "warning", "0: a lost node is never noticed", "halfstep ends its ranks; scontrol requeue JOB then"
        )
    if seconds > _LATE_SECONDS:
        found = f"{seconds:g} s: so long does a run wait after it lost a node"
        return Finding(_GROUP, "SlurmdTimeout", "warning", found, "scontrol requeue JOB brings it back sooner")
    return Finding(_GROUP, "SlurmdTimeout", "ok", f"a lost node is noticed after {seconds:g} s")


def _accounting(config: Mapping[str, str]) -> Finding:
    kind = config.get("AccountingStorageType", "accounting_storage/none").removeprefix("accounting_storage/")
    if kind != "none" and kind != "(null)":
        return Finding(_GROUP, "accounting", "ok", kind)
    found = "none: sacct knows nothing, so submitit cannot tell how jobs ended"
    return Finding(_GROUP, "accounting", "absent", found, "leave cluster.submit_with=sbatch, which does without")
