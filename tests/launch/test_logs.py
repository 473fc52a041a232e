"""Logs: which one is meant, its last lines, and following it to its end."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import logs
from launch.logs import log_path, rank_log, show_log, tail
from launch.submitted import Submission, record_submission
from launch.sweep import write_sweep
from tests.launch.slurm_on_path import SlurmOnPath


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(logs, "_LEFT_SECONDS", 0.02)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with logs of two ranks."""
    folder = tmp_path / "run"
    folder.mkdir()
    for rank in (0, 1):
        descriptor = rank_log(folder, rank)
        os.write(descriptor, f"rank {rank}\n".encode())
        os.close(descriptor)
    return folder


def submitted(run_dir: Path, job_id: str, text: str | None = None) -> None:
    run_dir.mkdir(exist_ok=True)
    record_submission(run_dir, Submission("slurm", job_id, f"job/slurm-{job_id}.out"))
    if text is not None:
        (run_dir / "job" / f"slurm-{job_id}.out").write_text(text)


@pytest.mark.parametrize(
    ("content", "lines", "shown"),
    [
        ("a\nb\nc\n", 2, "b\nc\n"),
        ("a\nb\nc", 2, "b\nc"),
        ("a\nb\nc\n", 3, "a\nb\nc\n"),
        ("a\n", 200, "a\n"),
        ("", 5, ""),
        ("a\n\n\n", 2, "\n\n"),
    ],
)
def test_the_last_lines_are_shown(content: str, lines: int, shown: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "logs" / "rank_0.log").write_text(content)
    assert show_log(run, rank=None, lines=lines, follow=False) == 0
    assert capsys.readouterr().out == shown


def test_what_is_no_text_is_shown_all_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "logs" / "rank_0.log").write_bytes(b"loss \xff\n")
    show_log(run, rank=0, lines=1, follow=False)
    assert capsys.readouterr().out == "loss \N{REPLACEMENT CHARACTER}\n"


def test_without_a_job_rank_0_speaks_and_any_rank_can_be_asked_for(run: Path) -> None:
    assert log_path(run, None) == log_path(run, 0) == run / "logs" / "rank_0.log"
    assert log_path(run, 1) == run / "logs" / "rank_1.log"


def test_with_a_job_its_output_speaks_the_newest_that_there_is(run: Path) -> None:
    submitted(run, "17", "first\n")
    submitted(run, "18", "second\n")
    submitted(run, "19")
    assert log_path(run, None) == run / "job" / "slurm-18.out"
    assert log_path(run, 1) == run / "logs" / "rank_1.log"


def test_a_log_that_is_not_there_lists_those_that_are(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        log_path(run, 7)
    assert str(caught.value) == (f"{run}/logs/rank_7.log: no such log yet; {run}/logs has rank_0.log, rank_1.log (halfstep status {run})")
    with pytest.raises(ValueError, match=r"/logs/rank_0\.log: no such log yet; .*/logs has none \(halfstep status"):
        log_path(tmp_path, None)


def test_a_sweep_names_the_folders_that_have_logs(tmp_path: Path) -> None:
    one, two = tmp_path / "000_seed=1", tmp_path / "001_seed=2"
    submitted(one, "17_0")
    submitted(two, "17_1")
    write_sweep(tmp_path, [one, two])
    with pytest.raises(ValueError) as caught:
        show_log(tmp_path, rank=None, lines=10, follow=True)
    assert str(caught.value) == f"{tmp_path}: its runs have logs of their own; give one of {one}, {two}"


def test_a_growing_log_is_shown_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    parts: Iterator[bytes] = iter([b"", b"one\ntw", b"o\n", b"", "\N{GREEK SMALL LETTER EPSILON}".encode()[:1]])

    def grow() -> bool:
        """Whether it is over; the last bytes come after that was seen."""
        part = next(parts, None)
        with open(path, "ab") as file:
            file.write("\N{GREEK SMALL LETTER EPSILON}".encode()[1:] + b" last\n" if part is None and not over else part or b"")
        over.extend([True] * (part is None))
        return bool(over)

    over: list[bool] = []
    tail(path, grow)
    assert capsys.readouterr().out == "one\ntwo\n\N{GREEK SMALL LETTER EPSILON} last\n"


def test_the_output_of_a_job_may_appear_after_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_LEFT_SECONDS", 5.0)
    late = threading.Timer(0.1, (tmp_path / "log").write_text, ["late\n"])
    late.start()
    tail(tmp_path / "log", lambda: True)
    late.join()
    assert capsys.readouterr().out == "late\n"


def test_an_output_that_never_comes_is_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tail(tmp_path / "log", lambda: True)
    assert capsys.readouterr().out == ""


def test_following_begins_with_the_last_lines_and_ends_with_the_job(
    tmp_path: Path, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    submitted(run, "17", "a\nb\nc\n")
    output = run / "job" / "slurm-17.out"
    slurm.job_is("17", "running")
    slurm.says("scontrol --oneliner show job 17", "JobId=17 JobState=COMPLETED\n", then=f"printf 'd\\n' >> '{output}'")
    slurm.says("scontrol --oneliner show job 17", "JobId=17 JobState=COMPLETED\n")
    assert show_log(run, rank=None, lines=1, follow=True) == 0
    assert capsys.readouterr().out == "c\nd\n"


def test_following_a_job_that_still_waits_waits_too_and_shows_no_older_one(
    tmp_path: Path, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    submitted(run, "17", "an older job\n")
    submitted(run, "18")
    output = run / "job" / "slurm-18.out"
    slurm.job_is("18", "pending", "pending")
    slurm.says("scontrol --oneliner show job 18", "JobId=18 JobState=COMPLETED\n", then=f"printf 'ran\\n' > '{output}'")
    assert show_log(run, rank=None, lines=200, follow=True) == 0
    shown = capsys.readouterr()
    assert shown.out == "ran\n" and shown.err == "job 18 is queued (Resources); its output comes here\n"


def test_following_a_job_that_is_held_ends_for_it_waits_for_a_person(
    tmp_path: Path, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(tmp_path / "run", "17", "No space left on device\n")
    slurm.job_is("17", "requeued in held state")
    assert show_log(tmp_path / "run", rank=None, lines=200, follow=True) == 0
    assert capsys.readouterr().out == "No space left on device\n"
