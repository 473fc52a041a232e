"""What every test shares: golden files, and a last line that names what was skipped."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run: what passes here passes on any machine. HYPOTHESIS_PROFILE=explore draws new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
ROOT = Path(__file__).parents[1]
# Tests import the tree they stand in, also from a checkout that is not installed; so do the processes that they start.
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update-golden` writes golden files instead of comparing with them."""
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing with them")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """A function (name, text): compares the whole text with tests/golden/NAME; a missing file fails."""
    update = bool(request.config.getoption("--update-golden"))

    def compare(name: str, text: str) -> None:
        path = ROOT / "tests" / "golden" / name
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path} is missing; write it with pytest --update-golden, look at it and commit it"
        assert text == path.read_text(encoding="utf-8"), f"differs from {path}; if the change is meant: pytest --update-golden"

    return compare


def pytest_unconfigure(config: pytest.Config) -> None:
    """Name every skipped test with its reason in the last line of the run."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if not isinstance(terminal, pytest.TerminalReporter) or config.option.collectonly:
        return
    skipped = [report for report in terminal.stats.get("skipped", []) if isinstance(report.longrepr, tuple)]
    named = [f"{report.nodeid} ({report.longrepr[2].removeprefix('Skipped: ')})" for report in skipped]
    terminal.write_line(f"skipped on this machine: {'; '.join(named) or 'nothing'}")
