"""A pytest plugin (-p tests.resumable) that goes on where an interrupted run of the same tree ended.

Cases that pass are written to .test-engines/TREE/passed, TREE being the hash of every file that a test may depend on; the next
run leaves them out, and its last line says how many of all have passed."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / ".test-engines"
_NO_CODE = (":!docs", ":!*.md")
"""What may change without the passed cases having to run again."""


def pytest_configure(config: pytest.Config) -> None:
    """Start recording."""
    config.pluginmanager.register(Progress(ROOT, RECORDS), "resumable-progress")


class Progress:
    """Which of the selected cases have passed on this tree, in this run or an earlier one."""

    def __init__(self, root: Path, records: Path) -> None:
        self.root = root
        self.tree = tree_hash(root)
        self.path = records / self.tree / "passed"
        self.earlier = set(self.path.read_text(encoding="utf-8").splitlines()) if self.path.exists() else set()
        self.selected: set[str] = set()
        self.failed: set[str] = set()
        self.now: set[str] = set()
        self.changed = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what has passed; after pytest's own choice by marker."""
        self.selected = {item.nodeid for item in items}
        left = [item for item in items if item.nodeid not in self.earlier]
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.earlier])
        items[:] = left

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record a case when its teardown too is done, so that a kill at any moment loses only the case that ran."""
        if not report.passed:
            self.failed.add(report.nodeid)
        if report.when != "teardown" or report.nodeid in self.failed:
            return
        # An edit while tests run makes a tree of which nobody knows what passed on it.
        self.changed = self.changed or tree_hash(self.root) != self.tree
        if self.changed:
            return
        self.now.add(report.nodeid)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{report.nodeid}\n")
            file.flush()
            os.fsync(file.fileno())

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Nothing left to run is success, where pytest's own code says that no test was found."""
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.selected and self.selected <= self.earlier:
            session.exitstatus = pytest.ExitCode.OK

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self, config: pytest.Config) -> None:
        """The last line: how far this tree has come."""
        terminal = config.pluginmanager.get_plugin("terminalreporter")
        if isinstance(terminal, pytest.TerminalReporter) and not config.option.collectonly:
            terminal.write_line(self.summary())

    def summary(self) -> str:
        """How many of the selected cases have passed, and when."""
        earlier, now = len(self.selected & self.earlier), len(self.now)
        text = f"passed on this tree: {earlier + now} of {len(self.selected)} ({now} now, {earlier} in earlier runs)"
        if self.changed:
            return f"{text}; files were edited while tests ran, what passed since then does not count: give the command again"
        return text if earlier + now == len(self.selected) else f"{text}; the same command goes on with the others"


def tree_hash(root: Path) -> str:
    """sha256 of all files that git tracks or would add, documentation apart, by name and content."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", ".", *_NO_CODE]
    names = subprocess.run(command, capture_output=True, check=True).stdout.split(b"\0")
    digest = hashlib.sha256()
    for name in sorted({os.fsdecode(name) for name in names if name}):
        path = root / name
        if path.is_file():  # a file may be deleted, but not yet in git's index
            digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
