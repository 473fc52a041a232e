"""Ranks that do not share RUN_DIR: who is at fault, and what a rank leaves there."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from data_shards import ranks
from trainer import visible
from trainer.visible import at_fault, check_visible

HOSTS = ["node0", "node1", "node2"]
NONE: list[list[int]] = [[], [], []]


def _another(rank: int) -> str:
    return f"another folder: the file that rank {rank} on node{rank} wrote is not there"


@pytest.mark.parametrize(
    ("troubles", "missed", "found"),
    [
        (["", "", ""], NONE, None),
        (["", "", "no such folder"], NONE, (2, "no such folder")),
        (["", "no run there", "no such folder"], NONE, (1, "no run there")),
        (["no run there", "", ""], NONE, (0, "no run there")),
        (["", "", ""], [[], [0, 2], []], (1, _another(0))),
        (["", "", ""], [[2], [2], [0, 1]], (2, _another(0))),
        (["", "", ""], [[1, 2], [0, 2], [0, 1]], (1, _another(0))),
        (["", "", ""], [[], [], [1]], (2, _another(1))),
    ],
)
def test_the_rank_that_does_not_share_the_folder_of_rank_0_is_named(
    troubles: list[str], missed: list[list[int]], found: tuple[int, str] | None
) -> None:
    assert at_fault(troubles, missed, HOSTS) == found


def test_one_rank_shares_the_folder_with_itself(tmp_path: Path) -> None:
    check_visible(tmp_path / "nowhere")


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """This process as rank 0 of 2; of each collective's text the other rank's is made from ours."""

    def as_rank_0(*others: Callable[[str], str]) -> None:
        told = iter(others)
        monkeypatch.setattr(ranks, "world_size", lambda: 2)
        monkeypatch.setattr(visible.ranks, "all_gather_text", lambda text: [text, next(told)(text)])

    return as_rank_0


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").touch()
    return tmp_path


def test_tokens_are_new_each_time_and_are_taken_away(run_dir: Path, two_ranks: Callable[..., None]) -> None:
    names: list[str] = []

    def see(name: str) -> str:
        assert os.listdir(run_dir / "heartbeats") == [name]
        names.append(name)
        return name

    for _ in range(2):
        two_ranks(see, str, str, str)
        check_visible(run_dir, patience_seconds=0)
    assert len(set(names)) == 2 and os.listdir(run_dir / "heartbeats") == []


def test_a_token_that_a_network_file_system_shows_late_is_waited_for(run_dir: Path, two_ranks: Callable[..., None]) -> None:
    late = threading.Timer(0.2, lambda: (run_dir / "heartbeats" / "token_1_late").touch())
    two_ranks(lambda _: "token_1_late", str, str, str)
    late.start()
    check_visible(run_dir, patience_seconds=30)


def test_a_token_that_never_appears_ends_in_a_message_that_says_what_to_do(run_dir: Path, two_ranks: Callable[..., None]) -> None:
    two_ranks(lambda _: "token_1_elsewhere", lambda _: "node1", str, lambda _: "0")
    message = rf"^{run_dir}: rank 1 on node1 sees another folder: .* must lie on a file system that every node mounts at the same path"
    with pytest.raises(ValueError, match=message):
        check_visible(run_dir, patience_seconds=0)


def test_where_a_rank_has_no_folder_at_all_nobody_waits_for_its_token(run_dir: Path, two_ranks: Callable[..., None]) -> None:
    two_ranks(lambda _: "token_1_never", lambda _: "node1", lambda _: "no such folder", str)
    with pytest.raises(ValueError, match=rf"^{run_dir}: rank 1 on node1 sees no such folder; .*: give such a --run-dir"):
        check_visible(run_dir, patience_seconds=3600)


def test_a_folder_without_a_run_or_that_cannot_be_written_is_said(tmp_path: Path, two_ranks: Callable[..., None]) -> None:
    two_ranks(str, str, lambda _: "", str)
    with pytest.raises(ValueError, match=r"rank 0 on .* sees no run there"):
        check_visible(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "heartbeats").touch()  # not a folder: also root cannot write below it
    two_ranks(str, str, lambda _: "", str)
    with pytest.raises(ValueError, match=r"rank 0 on .* sees a folder that it cannot write into \((File exists|Not a directory)\)"):
        check_visible(tmp_path)
