"""What follows the end of an attempt: every launcher asks the same rule."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.ends import End, Restarts, committed_steps, log_end, read_end, record_end, take_end
from trainer.stop import clear_stop_request, request_stop

LOST = End(70, "rank 1 was killed by SIGKILL", 1)


def commit(run_dir: Path, step: int) -> None:
    (run_dir / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)


def first(run_dir: Path, *, limit: int = 2) -> Restarts:
    return Restarts.begin(run_dir, limit=limit, first=True)


def again(run_dir: Path, *, limit: int = 2) -> Restarts:
    return Restarts.begin(run_dir, limit=limit, first=False)


@pytest.mark.parametrize(
    ("code", "decision", "why"),
    [
        (0, "done", "reason"),
        (75, "again", "stopped with its state committed; goes on from step 0"),
        (70, "again", "reason; goes on from step 0"),
        (1, "again", "reason; goes on from step 0"),
        (134, "again", "reason; goes on from step 0"),
        (-9, "again", "reason; goes on from step 0"),
        (64, "stop", "reason; starting again would not mend it"),
        (65, "stop", "reason; starting again would not mend it"),
        (66, "stop", "reason; starting again would not mend it"),
        (130, "stop", "reason; starting again would not mend it"),
        (74, "hold", "reason; make room or mend the file system, then give the same command again"),
    ],
)
def test_each_exit_code_has_its_decision(code: int, decision: str, why: str, tmp_path: Path) -> None:
    assert first(tmp_path).decide(End(code, "reason")) == (decision, why)


@pytest.mark.parametrize("code", [75, 70, 1, 64, 74])
def test_a_stop_that_was_asked_for_wins_over_everything_but_done(code: int, tmp_path: Path) -> None:
    restarts = first(tmp_path)
    request_stop(tmp_path)
    asked = "halfstep stop was asked for; the same command goes on from the checkpoint"
    assert restarts.decide(End(code, "reason")) == ("stop", asked)
    assert restarts.decide(End(0, "done")) == ("done", "done")
    clear_stop_request(tmp_path)
    assert restarts.decide(LOST)[0] == "again"


def _attempts(run_dir: Path, ends: Sequence[tuple[End, int | None]], *, limit: int) -> list[str]:
    """The decisions after each attempt, whose end comes after a commit at the given step, if any."""
    decisions: list[str] = []
    for end, step in ends:
        restarts = Restarts.begin(run_dir, limit=limit, first=not decisions)
        if step is not None:
            commit(run_dir, step)
        decisions.append(restarts.decide(end)[0])
    return decisions


@pytest.mark.parametrize("limit", [0, 1, 2, 5])
def test_a_run_that_never_gets_further_is_started_so_many_times_again(limit: int, tmp_path: Path) -> None:
    assert _attempts(tmp_path, [(LOST, None)] * (limit + 1), limit=limit) == ["again"] * limit + ["stop"]


def test_the_last_word_says_how_often_and_which_key_bounds_it(tmp_path: Path) -> None:
    commit(tmp_path, 40)
    first(tmp_path)
    again(tmp_path)
    assert again(tmp_path).decide(LOST) == (
        "stop",
        "rank 1 was killed by SIGKILL; 3 attempts in a row came no further than step 40 (cluster.max_restarts=2)",
    )


def test_progress_begins_the_count_anew(tmp_path: Path) -> None:
    ends = [(LOST, None), (LOST, None), (LOST, 10), (LOST, None), (LOST, None), (LOST, 20), (LOST, None), (LOST, None), (LOST, None)]
    assert _attempts(tmp_path, ends, limit=2) == [*["again"] * 8, "stop"]


def test_an_older_checkpoint_is_no_progress(tmp_path: Path) -> None:
    commit(tmp_path, 20)
    assert _attempts(tmp_path, [(LOST, 10), (LOST, 15)], limit=1) == ["again", "stop"]


def test_preemptions_without_progress_count_too(tmp_path: Path) -> None:
    assert _attempts(tmp_path, [(End(75, "asked to stop"), None), (LOST, None)], limit=1) == ["again", "stop"]


def test_a_person_who_starts_it_begins_the_count_anew(tmp_path: Path) -> None:
    assert _attempts(tmp_path, [(LOST, None)] * 3, limit=2)[-1] == "stop"
    assert first(tmp_path).decide(LOST)[0] == "again"


def test_an_attempt_after_ends_that_nobody_could_count_is_spent(tmp_path: Path) -> None:
    assert [first(tmp_path).spent, again(tmp_path).spent, again(tmp_path).spent] == [False, False, False]
    third = again(tmp_path)  # a machine was lost each time: no attempt asked what to do
    assert third.spent and third.without_progress == 3
    commit(tmp_path, 10)
    assert not again(tmp_path).spent


def test_the_count_is_kept_for_people_to_read(tmp_path: Path) -> None:
    commit(tmp_path, 10)
    first(tmp_path)
    again(tmp_path)
    assert json.loads((tmp_path / "job" / "restarts.json").read_text()) == {"committed_steps": 10, "without_progress": 1}


def _chain(path: Path) -> list[Path]:
    """A chain of two halvings of a teacher from elsewhere: its stages' folders."""
    folders = [path.parent / "teacher", path / "stage_01_0002_steps", path / "stage_02_0001_steps"]
    stages = [
        {"name": folder.name, "steps": steps, "run_dir": str(folder) if steps == 4 else folder.name}
        for folder, steps in zip(folders, (4, 2, 1), strict=True)
    ]
    (path / "chain.json").write_text(json.dumps({"schema_version": 1, "stages": stages}))
    return folders


def test_a_chain_adds_up_its_own_stages(tmp_path: Path) -> None:
    chain = tmp_path / "chain"
    chain.mkdir()
    teacher, one, two = _chain(chain)
    commit(teacher, 1000)
    assert committed_steps(chain) == 0
    commit(one, 10)
    commit(one, 20)
    assert committed_steps(chain) == 20
    restarts = first(chain, limit=0)
    commit(two, 5)  # fewer steps than the stage before has, but the chain came further
    assert committed_steps(chain) == 25
    assert restarts.decide(LOST) == ("again", "rank 1 was killed by SIGKILL; goes on from step 25")


def test_an_end_is_read_and_taken_once(tmp_path: Path) -> None:
    assert read_end(tmp_path) is None and take_end(tmp_path) is None
    record_end(tmp_path, LOST)
    assert read_end(tmp_path) == LOST and str(LOST) == "70: rank 1 was killed by SIGKILL"
    assert take_end(tmp_path) == LOST and take_end(tmp_path) is None


def test_an_end_of_which_only_the_reason_is_known_counts_as_a_crash(tmp_path: Path) -> None:
    (tmp_path / "exit.json").write_text('{"reason": "unknown", "code": null, "rank": "1"}')
    assert read_end(tmp_path) == End(1, "unknown", None)


def test_each_end_is_a_line_with_what_followed(tmp_path: Path) -> None:
    log_end(tmp_path, LOST, "again", "goes on from step 0", job_id="17")
    commit(tmp_path, 10)
    log_end(tmp_path, End(0, "done"), "done", "done", job_id="18")
    lines = [json.loads(line) for line in (tmp_path / "job" / "ends.jsonl").read_text().splitlines()]
    assert [line.pop("ended_at")[-1] for line in lines] == ["Z", "Z"]
    assert lines == [
        {
            "job_id": "17",
            "code": 70,
            "reason": "rank 1 was killed by SIGKILL",
            "decision": "again",
            "why": "goes on from step 0",
            "committed_steps": 0,
        },
        {"job_id": "18", "code": 0, "reason": "done", "decision": "done", "why": "done", "committed_steps": 10},
    ]


def test_a_disk_that_takes_no_more_loses_the_record_and_not_the_decision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job").touch()  # a file where the folder would be
    log_end(tmp_path, LOST, "again", "why", job_id="17")
    record_end(tmp_path / "nowhere", LOST)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in said] == [
        f"cannot write {tmp_path / 'job' / 'ends.jsonl'}",
        f"cannot write {tmp_path / 'nowhere' / 'exit.json'}",
    ]
