"""An interrupted run of the long tests goes on, and starts again when the code has changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASES = """
import os, pytest

@pytest.mark.parametrize("number", range(4))
def test_case(number):
    assert number != int(os.environ["FAILS"])

def test_skipped():
    pytest.skip("no GPU")
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with a few cases and the plugin under test."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_cases.py").write_text(CASES)
    (tmp_path / "tests" / "resumable.py").write_text((ROOT / "tests" / "resumable.py").read_text())
    (tmp_path / ".gitignore").write_text(".test-engines/\n__pycache__/\n")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    return tmp_path


def last_line(tree: Path, *options: str, fails: int, code: int) -> str:
    words = [sys.executable, "-m", "pytest", "-p", "tests.resumable", "-p", "no:cacheprovider", *options]
    environment = {**os.environ, "FAILS": str(fails), "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(words, cwd=tree, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == code, ran.stdout + ran.stderr
    return ran.stdout.splitlines()[-1]


def test_a_run_goes_on_where_the_one_before_ended(tree: Path) -> None:
    first = last_line(tree, "-x", fails=2, code=1)
    assert first == "passed on this tree: 2 of 5 (2 now, 0 in earlier runs); the same command goes on with the others"
    assert last_line(tree, fails=9, code=0).startswith("passed on this tree: 4 of 5 (2 now, 2 in earlier runs)")
    # What was skipped has not passed. With all passed there is nothing to run, and that is no failure.
    assert last_line(tree, "-k", "not skipped", fails=9, code=0) == "passed on this tree: 4 of 4 (0 now, 4 in earlier runs)"


def test_other_code_starts_again_and_other_words_do_not(tree: Path) -> None:
    last_line(tree, fails=2, code=1)
    (tree / "README.md").write_text("words")
    assert "(1 now, 3 in earlier runs)" in last_line(tree, fails=9, code=0)
    (tree / "code.py").write_text("1")
    assert "(4 now, 0 in earlier runs)" in last_line(tree, fails=9, code=0)
