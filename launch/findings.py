"""What `halfstep doctor` has found, as text and JSON; and how it asks other programs without ever waiting long."""

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, final

_LINE_LENGTH = 200

Status = Literal["ok", "warning", "problem", "absent"]
"""ok: as it should be; warning: works, with a cost; problem: to be mended first; absent: not there, and not needed by every run."""


@final
@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    group: str
    """The heading it stands under."""
    name: str
    status: Status
    found: str
    mend: str = ""
    """What to do about it; empty where there is nothing to do."""


def findings_text(findings: Sequence[Finding]) -> str:
    """A list for people: aligned, under headings, what mends it indented below."""
    width = max((len(finding.name) for finding in findings), default=0)
    lines: list[str] = []
    for heading, members in groupby(findings, key=lambda finding: finding.group):
        lines.append(heading)
        for finding in members:
            lines.append(f"  {finding.status:7}  {finding.name:{width}}  {finding.found}")
            if finding.mend:
                lines.append(f"  {'':7}  {'':{width}}    -> {finding.mend}")
    return "\n".join([*lines, _summary(findings)]) + "\n"


def findings_json(findings: Sequence[Finding]) -> dict[str, object]:
    """The same for programs."""
    listed = [{"group": f.group, "name": f.name, "status": f.status, "found": f.found, "mend": f.mend} for f in findings]
    return {"findings": listed, "problems": count(findings, "problem")}


def count(findings: Iterable[Finding], status: Status) -> int:
    """How many findings have a status."""
    return sum(finding.status == status for finding in findings)


def ask(words: Sequence[str], *, seconds: float, environment: Mapping[str, str] | None = None) -> str:
    """What another program writes to stdout.

    Raises: RuntimeError saying in a line why there is no answer: not installed, failed, or not within `seconds`."""
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=seconds, check=False, env=environment
        )
    except FileNotFoundError:
        raise RuntimeError(f"{words[0]}: no such command") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer within {seconds:.0f} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(said[-1][:_LINE_LENGTH] if said else f"{words[0]} ended with exit code {done.returncode}")
    return done.stdout


def _summary(findings: Sequence[Finding]) -> str:
    counts = [(count(findings, "problem"), "problem"), (count(findings, "warning"), "warning")]
    return ", ".join(f"{number or 'no'} {word}{'' if number == 1 else 's'}" for number, word in counts)
