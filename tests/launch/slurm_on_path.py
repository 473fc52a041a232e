"""Slurm's commands as small shell scripts on PATH, which print what the real Slurm 22.05 has printed."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import final

import pytest

_CAPTURED = Path(__file__).parent / "captured" / "slurm_22_05_jobs.txt"

# Of the answers to a command the last one is given again and again; an unforeseen command is an error of the test.
_SCRIPT = """\
#!/bin/sh
words="${{0##*/}} $*"
printf '%s\\n' "$words" >> {folder}/calls
answers={folder}/answers/$(printf %s "$words" | tr / :)
[ -d "$answers" ] || answers={folder}/answers/${{0##*/}}
set -- "$answers"/*
[ -e "$1/code" ] || {{ echo "no answer to: $words" >&2; exit 99; }}
cat "$1/out"; cat "$1/err" >&2; code=$(cat "$1/code")
. "$1/then"
[ $# -eq 1 ] || rm -r "$1"
exit "$code"
"""


def captured(name: str, job_id: str | None = None) -> str:
    """A line of `scontrol --oneliner show job`, as the real one printed it; of another job where its id is given."""
    lines = dict(line.split(": ", 1) for line in _CAPTURED.read_text(encoding="utf-8").splitlines())
    words = lines[name].split(" ")
    if job_id is None:
        return lines[name]
    array, _, element = job_id.partition("_")
    new = {"JobId": array, **({"ArrayJobId": array, "ArrayTaskId": element} if element else {})}
    return " ".join(f"{key}={new[key]}" if (key := word.partition("=")[0]) in new else word for word in words)


@final
@dataclass(frozen=True)
class SlurmOnPath:
    """What Slurm will say, and what it was asked."""

    folder: Path

    @classmethod
    def install(cls, folder: Path, monkeypatch: pytest.MonkeyPatch) -> "SlurmOnPath":
        """Put the commands in front of all others."""
        (folder / "bin").mkdir(parents=True)
        (folder / "answers").mkdir()
        for name in ("scontrol", "sbatch", "scancel", "srun"):
            script = folder / "bin" / name
            script.write_text(_SCRIPT.format(folder=shlex.quote(str(folder))))
            script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        return cls(folder)

    def says(self, words: str, out: str = "", *, err: str = "", code: int = 0, then: str = "") -> None:
        """Answer a command from now on, or after its earlier answers have been given once each.

        words: all of them, or the command's name alone for any other words. then: what the script does last of all."""
        answers = self.folder / "answers" / words.replace("/", ":")
        answer = answers / f"{len(list(answers.glob('*'))) if answers.exists() else 0:03d}"
        answer.mkdir(parents=True)
        (answer / "out").write_text(out)
        (answer / "then").write_text(then)
        (answer / "err").write_text(err)
        (answer / "code").write_text(f"{code}\n")

    def job_is(self, job_id: str, *names: str) -> None:
        """The states of a job, one after the other: names of captured lines."""
        for name in names:
            self.says(show(job_id), captured(name, job_id) + "\n")

    def does_not_know(self, job_id: str) -> None:
        """What Slurm says of a job that is long over."""
        if "_" in job_id:
            self.says(show(job_id), f"Job {job_id} not found\n", code=1)
        else:
            self.says(show(job_id), err="slurm_load_jobs error: Invalid job id specified\n", code=1)

    def is_dead(self, job_id: str) -> None:
        """What the commands say where slurmctld does not answer, though at once."""
        self.says(show(job_id), err="slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n", code=1)

    @property
    def calls(self) -> list[str]:
        """Every command so far but the questions about jobs."""
        calls = self.folder / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        return [line for line in lines if not line.startswith("scontrol --oneliner show job")]


def show(job_id: str) -> str:
    """The question about a job."""
    return f"scontrol --oneliner show job {job_id}"
