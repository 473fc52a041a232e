"""The report of runs and chains on disk: all of it inside one file, complete, also half-way through a chain."""

import base64
import io
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
from trainer.report.job import report_job

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
        if tag not in ("meta", "img", "br"):
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


def write_metrics(run_dir: Path, steps: int = 7, scale: float = 1.0) -> None:
    """metrics.jsonl of a run that was killed while it wrote a line."""
    speeds = {"images_per_second": 64.0, "step_seconds": 0.5, "data_wait_seconds": 0.01, "gradient_norm": 1.0}
    lines = [json.dumps({"step": step, "loss": scale * 0.5 * math.exp(-step / 5), **speeds}) for step in range(steps)]
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
        "What the halvings cost",
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


def test_without_drawing_only_pictures_that_are_there_are_shown(chain: Path) -> None:
    report_job(chain, {"draw": False})
    assert read_page(chain / "report.html").tags.count("img") == 0 and not (chain / "pictures").exists()
    report_job(chain, {})
    drawn = next((chain / "pictures").glob("student_0001*"))
    for path in (chain / "pictures").iterdir():
        if path != drawn:
            path.unlink()
    (chain / "grid.png").unlink()
    report_job(chain, {"draw": False})
    assert read_page(chain / "report.html").tags.count("img") == 8 and not (chain / "grid.png").exists()


def test_quality_and_seconds_have_a_line_a_model_and_count(chain: Path) -> None:
    rows = json.loads((chain / "evaluation.json").read_text())
    more = {"cmmd": 0.125, "timings": [{"batch_images": 8, "seconds_per_image": 0.1, "images_per_second": 77.0}]}
    previous = [{**row, **more, "model": "previous", "frechet_distance": 7.0} for row in rows if row["model"] == "teacher"]
    (chain / "sheets").mkdir()
    Image.new("RGB", (8, 8)).save(chain / "sheets" / "one.png")
    previous[0]["neighbours_sheet"] = "sheets/one.png"
    timed = [{**rows[0], "steps": 16, "model": "teacher", "frechet_distance": None, "kid": None, "seconds_per_image": 4.0}]
    (chain / "evaluation.json").write_text(json.dumps([*rows, *previous, *timed]))
    report_job(chain, {})
    page = read_page(chain / "report.html")
    assert "StepsModelFréchet distanceOf 2 steps" in page.text
    assert "2Student2.50× 1.00" in page.text and "Previous student7.00" in page.text and "Teacher9.00" in page.text
    assert "CMMD" in page.text and "0.125" in page.text
    assert "previous student" in page.text  # the third line's legend
    assert "Steps8 at once" in page.text and "2 · previous student77" in page.text
    assert "The nearest training images" in page.text and "previous, 2 steps" in page.text
    assert "164 s" in page.text.replace("–", "") and "400 ×" in page.text  # 4 s against 0.01 s


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


def test_runs_of_a_sweep_are_a_table_of_what_differs(write_run: WriteRun, tmp_path: Path) -> None:
    runs = []
    for number, heads in enumerate((1, 2, 4)):
        run_dir = write_run(tmp_path / f"{number:03d}_attention_heads={heads}", levels=16)
        recipe = run_dir / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("attention_heads: 2", f"attention_heads: {heads}"))
        write_metrics(run_dir, steps=5 + number, scale=1.0 / heads)
        runs.append(run_dir)
    write_rows(runs[0] / "evaluation.json", [replace(ROW, model="teacher", steps=2, frechet_distance=4.0)])
    write_rows(runs[2] / "evaluation.json", [replace(ROW, model="teacher", steps=2, frechet_distance=3.0)])
    out = tmp_path / "report.html"
    report_job(tmp_path, {"dirs": [str(run) for run in runs], "out": str(out), "title": "heads", "steps": 2})
    page, source = read_page(out), out.read_text()
    assert "RunattentionheadsOptimizerstepsLossattheend" in "".join(page.text.split()).replace("Whatdiffers,andwhatcameofit", "", 1)
    assert "5 of 7" in page.text and "Not at their end yet: 000_attention_heads=1, 001_attention_heads=2." in page.text
    assert source.count('class="best"') >= 2 and "Quality is that of 2 steps." in page.text
    assert "The same seeds, model by model" in page.text and page.tags.count("img") == 3 * 8


def test_runs_of_more_levels_than_are_drawn_are_compared_in_fewer_steps(write_run: WriteRun, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(seed), levels=64, seed=seed) for seed in range(2)]
    report_job(tmp_path, {"dirs": [str(run) for run in runs], "out": str(tmp_path / "page.html")})
    page = read_page(tmp_path / "page.html")
    assert "The same seeds, model by model" in page.text and page.tags.count("img") == 2 * 8


def test_more_runs_than_colours_have_a_small_curve_each(write_run: WriteRun, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run_{number}", levels=16) for number in range(7)]
    for number, run_dir in enumerate(runs):
        if number:  # one has not begun
            write_metrics(run_dir, scale=number)
    report_job(tmp_path, {"dirs": [str(run) for run in runs], "out": str(tmp_path / "page.html"), "draw": False})
    source = (tmp_path / "page.html").read_text()
    assert source.count('class="behind"') == 6 * 5 and "7 runs" in source


def test_runs_of_every_kind_and_state_stand_on_one_page(chain: Path, write_run: WriteRun, tmp_path: Path) -> None:
    fresh, broken = write_run(tmp_path / "fresh", levels=16), write_run(tmp_path / "broken", levels=16)
    (fresh / "checkpoints").rename(tmp_path / "gone")
    (fresh / "evaluation.json").write_text("[{}, ")
    (broken / "recipe.yaml").write_text("train: {stepz: 1}\n")
    latent = tmp_path / "latent"
    (latent / "samples").mkdir(parents=True)
    (latent / "recipe.yaml").write_text("model: {kind: stable_diffusion, base: some/base}\ndata: {shards: x}\ntrain: {steps: 9}\n")
    write_metrics(latent)
    Image.new("RGB", (2000, 900), "white").save(latent / "samples" / "step_000000.png")
    out = tmp_path / "all.html"
    report_job(chain, {"dirs": [str(path) for path in (chain, fresh, broken, latent)], "out": str(out)})
    page = read_page(out)
    assert "not valid JSON" in page.text and "stepz: unknown key" in page.text
    assert "latent diffusion model (stable diffusion)" in page.text and "Fine-tuning" in page.text
    assert "and 1 more" in page.text or "What differs" in page.text


def test_a_latent_runs_sheet_is_shown_as_large_as_the_page(tmp_path: Path) -> None:
    latent = tmp_path / "latent"
    (latent / "samples").mkdir(parents=True)
    (latent / "recipe.yaml").write_text("model: {kind: stable_diffusion, base: some/base}\ndata: {shards: x}\ntrain: {steps: 9}\n")
    for step in (0, 5):
        Image.new("RGB", (2000, 900), "white").save(latent / "samples" / f"step_{step:06d}.png")
    report_job(latent, {})
    page = read_page(latent / "report.html")
    sizes = [Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).size for address in page.addresses]
    assert sizes == [(1200, 540), (300, 135), (300, 135)]


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


def test_rows_of_different_feature_nets_stand_apart(chain: Path) -> None:
    write_rows(
        chain / "evaluation.json",
        [replace(ROW, steps=2), replace(ROW, model="teacher", steps=2, feature_net="faces-attributes-ffffffffffff")],
    )
    report_job(chain, {})
    page = read_page(chain / "report.html")
    others = page.text.count("Training speed") + page.text.count("What the halvings cost")
    assert page.tags.count("table") - others == 2 + 1  # one a feature net, and the seconds
    assert "Measured in 2 ways, which are not compared: feature net: faces-attributes-0123456789ab, faces-attributes-ffff" in page.text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither a RUN_DIR, a chain's directory nor an export"):
        report_job(tmp_path, {})
