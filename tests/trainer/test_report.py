"""The report of runs and chains on disk: all of it inside one file, complete, also half-way through a chain."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from tests.trainer.conftest import WriteRun
from tests.trainer.test_evaluation import ROW
from trainer.evaluation import write_rows
from trainer.report import report_job

WriteChain = Callable[[dict[int, Path]], Path]


class _Page(HTMLParser):
    """Collects what a page would load, its text, and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "xlink:href", "action", "poster", "data")
        ]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def write_metrics(run_dir: Path, steps: int = 7) -> None:
    """metrics.jsonl of a run that was killed while it wrote a line."""
    speeds = {"images_per_second": 64.0, "step_seconds": 0.5, "data_wait_seconds": 0.01, "gradient_norm": 1.0}
    lines = [json.dumps({"step": step, "loss": 0.5 * math.exp(-step / 5), **speeds}) for step in range(steps)]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 7, "lo')


@pytest.fixture
def chain(write_run: WriteRun, write_chain: WriteChain, tmp_path: Path) -> Path:
    """A teacher of 16 steps, its students of 2 and 1 steps, one of 4 that has not been started, and what was measured."""
    runs = {16: write_run(tmp_path / "teacher", levels=16), 4: tmp_path / "stage_02_0004_steps"}
    runs |= {steps: write_run(tmp_path / f"stage_{steps}", student_steps=steps, levels=16, seed=steps) for steps in (2, 1)}
    for run_dir in runs.values():
        if run_dir.exists():
            write_metrics(run_dir)
    pack(FacesSource("open-peeps", 4), tmp_path / "teacher" / "shards", size=8)
    (tmp_path / "recipe.yaml").write_text((tmp_path / "teacher" / "recipe.yaml").read_text())
    rows = [replace(ROW, steps=2, frechet_distance=2.5), replace(ROW, steps=1, frechet_distance=5.0)]
    write_rows(tmp_path / "evaluation.json", [*rows, *(replace(row, model="teacher", frechet_distance=9.0) for row in rows)])
    return write_chain(runs)


def test_a_chains_page_shows_everything_and_loads_nothing(chain: Path) -> None:
    out = chain / "pages" / "report.html"
    assert report_job(chain, {"out": str(out)}) == 0
    page = read_page(out)
    assert page.addresses and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert "url(" not in out.read_text() and "@import" not in out.read_text()
    assert page.tags.count("img") == 8 * (4 - 1 + 2)
    for text in (
        "The same noise",
        "Student of 2 steps",
        "Teacher",
        "Training speed",
        "2.00",
        "cosine_clamped",
        "open-peeps by Pablo Stanley",
        "CC0-1.0",
    ):
        assert text in page.text
    assert "model:" in page.text  # the recipe


def test_the_grid_stands_beside_the_page_and_is_drawn_once(chain: Path) -> None:
    report_job(chain, {})
    with Image.open(chain / "grid.png") as grid:
        assert grid.height > 3 * 64 and grid.width > 2 * 8 * 64
    drawn = {path: path.stat().st_mtime_ns for path in (chain / "pictures").iterdir()}
    assert len(drawn) == 3 + 2
    report_job(chain, {})
    assert {path: path.stat().st_mtime_ns for path in (chain / "pictures").iterdir()} == drawn


def test_a_single_run_has_its_curve_and_its_samples(write_run: WriteRun, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "a <b> run", levels=16)
    write_metrics(run_dir)
    (run_dir / "samples").mkdir()
    for step in range(0, 900, 100):
        Image.new("RGB", (400, 400), (step % 256, 0, 0)).save(run_dir / "samples" / f"step_{step:06d}.png")
    Image.new("RGB", (8, 8)).save(run_dir / "samples" / "step_000000_raw.png")
    report_job(run_dir, {})
    page = read_page(run_dir / "report.html")
    assert "a <b> run" in page.text
    assert page.tags.count("img") == 6
    assert "after 0 steps" in page.text and "after 800 steps" in page.text
    assert not (run_dir / "grid.png").exists() and not (run_dir / "pictures").exists()


def test_a_run_without_a_checkpoint_and_metrics_still_has_a_page(write_run: WriteRun, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", levels=16)
    (run_dir / "checkpoints").rename(tmp_path / "gone")
    report_job(run_dir, {})
    assert "noise schedule of 16 levels" in read_page(run_dir / "report.html").text


def test_directories_are_compared_in_one_page(chain: Path, write_run: WriteRun, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other" / "teacher", levels=16)
    write_metrics(other)
    write_rows(other / "evaluation.json", [replace(ROW, model="teacher", steps=2, frechet_distance=4.0)])
    out = tmp_path / "both.html"
    report_job(chain, {"dirs": [str(chain), str(other)], "out": str(out)})
    page = read_page(out)
    assert f"{chain.name} against teacher" in page.text
    assert "4.00" in page.text and "Not compared" not in page.text


def test_distances_of_different_feature_nets_are_not_compared(chain: Path, write_run: WriteRun, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", levels=16)
    write_rows(other / "evaluation.json", [replace(ROW, model="teacher", steps=2, feature_net="faces-attributes-ffffffffffff")])
    out = tmp_path / "both.html"
    report_job(chain, {"dirs": [str(chain), str(other)], "out": str(out)})
    page = read_page(out)
    assert "Not compared." in page.text and "faces-attributes-ffffffffffff" in page.text


def test_a_file_that_mixes_feature_nets_is_refused(chain: Path) -> None:
    write_rows(
        chain / "evaluation.json",
        [replace(ROW, steps=2), replace(ROW, model="teacher", steps=2, feature_net="faces-attributes-ffffffffffff")],
    )
    with pytest.raises(ValueError, match="cannot be compared"):
        report_job(chain, {})
    assert not (chain / "report.html").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither a RUN_DIR, a chain's directory nor an export"):
        report_job(tmp_path, {})
