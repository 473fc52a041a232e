"""All benchmarks in one table: what is kept, what is run again, what fails, and whose peer is missing. The benchmarks here are small."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
RATIO = {"name": "one_ratio", "ratio": 1.25, "low": 1.1, "high": 1.3, "repeats": 5, "against": "a loop", "machine": "this one"}
SECONDS = {"name": "one_start", "seconds": 2.5, "low": 2.0, "high": 3.0, "repeats": 5}
Run = Callable[..., int]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The runner in a tree that has two benchmarks, of which each run leaves a line in a file; one of them wants diffusers."""
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("bench")
    (tmp_path / "benchmarks").mkdir()
    lines = "".join(f"print({json.dumps(json.dumps(line))})\n" for line in (RATIO, SECONDS))
    note = "import sys\nopen('ran', 'a').write(' '.join(sys.argv[1:]) + '\\n')\nprint('no JSON')\n"
    for name in ("one", "two"):
        (tmp_path / "benchmarks" / f"{name}.py").write_text(note + lines)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "HERE", tmp_path / "benchmarks")
    monkeypatch.setattr(module, "BENCHMARKS", (module.Benchmark("one"), module.Benchmark("two", peer="diffusers")))
    return module


@pytest.fixture
def run(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Its command line; returns the exit code."""

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bench.py", *words])
        with pytest.raises(SystemExit) as ended:
            bench.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return call


def ran(tree: Path) -> list[str]:
    return (tree / "ran").read_text().splitlines() if (tree / "ran").exists() else []


def test_the_table_has_ratios_and_seconds_and_names_who_lacks_a_peer(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    out = capfd.readouterr().out
    assert "| one_ratio | 1.25 | 1.1 | 1.3 | 5 | a loop |" in out
    assert "| one_start | 2.5 s | 2.0 s | 3.0 s | 5 |  |" in out
    assert "two: not run; it wants --diffusers DIR: git clone --depth 1 https://github.com/huggingface/diffusers DIR" in out
    kept = json.loads((tmp_path / "benchmarks" / "results" / "bench.json").read_text())
    assert [line["name"] for line in kept["benchmarks"]["one"]["lines"]] == ["one_ratio", "one_start"]


def test_what_has_ended_is_kept_until_it_is_asked_for_again(run: Run, tmp_path: Path) -> None:
    (tmp_path / "peer").mkdir()
    assert run("one") == run("one", "two", f"--diffusers={tmp_path / 'peer'}") == 0
    assert ran(tmp_path) == ["", f"--diffusers {tmp_path / 'peer'}"]
    assert run("one", "--again") == 0
    assert len(ran(tmp_path)) == 3


def test_one_with_other_baselines_runs_without_its_peer_and_again_with_it(
    bench: ModuleType, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "BENCHMARKS", (bench.Benchmark("one", peer="diffusers", others=True),))
    (tmp_path / "peer").mkdir()
    assert run() == run() == 0
    assert "one: run without its peer; it wants --diffusers DIR" in capfd.readouterr().out
    words = f"--diffusers={tmp_path / 'peer'}"
    assert run(words) == run(words) == run() == 0
    assert ran(tmp_path) == ["", f"--diffusers {tmp_path / 'peer'}"]


def test_a_smoke_test_does_not_touch_the_figures(run: Run, tmp_path: Path) -> None:
    assert run("one", "--quick") == 0
    assert ran(tmp_path) == ["--quick"]
    assert not (tmp_path / "benchmarks" / "results").exists()


def test_figures_of_another_machine_are_measured_anew(run: Run, tmp_path: Path) -> None:
    assert run("one") == 0
    path = tmp_path / "benchmarks" / "results" / "bench.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": "another"}))
    assert run("one") == 0
    assert len(ran(tmp_path)) == 2


def test_one_that_fails_is_told_and_not_kept_and_the_others_go_on(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "peer").mkdir()
    (tmp_path / "benchmarks" / "one.py").write_text("raise SystemExit(3)")
    assert run(f"--diffusers={tmp_path / 'peer'}") == 1
    told = capfd.readouterr()
    assert "one: exit code 3" in told.err and "one: failed, see above" in told.out
    assert list(json.loads((tmp_path / "benchmarks" / "results" / "bench.json").read_text())["benchmarks"]) == ["two"]


def test_a_name_or_a_folder_that_is_not_there_is_refused(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("ones") == 2
    assert "ones: not among one, two" in capfd.readouterr().err
    assert run("--diffusers", "nowhere") == 2
    assert "no such folder; git clone" in capfd.readouterr().err
