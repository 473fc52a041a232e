"""The report in a real browser: at a phone's and a desktop's width, light, dark and on paper."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
import torch

from trainer.pictures import Model, PictureRow
from trainer.report.page import page
from trainer.report.subject import Measured, Sheet, Stage, Subject
from trainer.sample import png

pytestmark = [pytest.mark.browser, pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium: apt-get install chromium")]

_BROWSER = ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
# What does not fit: elements that reach over the page's right edge outside of a box that scrolls; the page's own width; curves drawn.
_PROBE = """<script>addEventListener('load', () => {
  const wide = [...document.querySelectorAll('main *')].filter(e => e.checkVisibility()
    && e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll') && !e.closest('pre'));
  const told = {width: innerWidth, scroll: document.documentElement.scrollWidth, page: getComputedStyle(document.body).backgroundColor,
    wide: wide.map(e => e.tagName + '.' + e.className), plots: [...document.querySelectorAll('svg.plot')].filter(
      e => e.checkVisibility() && e.getBoundingClientRect().width > 100).length};
  document.body.dataset.told = JSON.stringify(told);
})</script>"""


def subject(name: str, *, seed: int, stages: int = 1) -> Subject:
    """A chain of so many stages, or a single run, with everything that a page can show."""
    generator = torch.Generator().manual_seed(seed)
    steps = tuple(range(200))
    losses = [tuple((torch.rand(200, generator=generator) * 0.1 + 1 / (1 + torch.arange(200) / 20)).tolist()) for _ in range(stages)]
    counts = [1000, *(2 ** (6 - number) for number in range(1, stages))]
    titles = ["Training" if stages == 1 else "Teacher", *(f"Student of {count} steps" for count in counts[1:])]
    ones = (1.0,) * 200

    def drawn(model: Model, count: int) -> PictureRow:
        images = torch.randint(0, 256, (8, 8, 8, 3), generator=generator, dtype=torch.uint8)
        return PictureRow(model, count, "ddim", images, count * 0.01)

    pictures = [drawn("teacher", count) for count in counts] + [drawn("student", count) for count in counts[1:]]
    rows = [
        Measured(
            model, count, {"frechet_distance": 3.0 + number + place, "kid": 0.001 * place, "manifold_recall": 0.5, "seconds_per_image": 0.1}
        )
        for number, model in enumerate(("student", "teacher", "previous"))
        for place, count in enumerate(counts[1:] or [50])
        if stages > 1 or model == "teacher"
    ]
    sheet = Sheet("after 200 steps", png_of(generator, 64))
    return Subject(
        name=name,
        kind="A teacher of 1000 sampling steps and its students.",
        facts=(("Directory", f"/a/long/path/without/any/space/in/it/{'x' * 80}/{name}"),),
        stages=tuple(Stage(title, title, 200, steps, loss, ones, ones, ones) for title, loss in zip(titles, losses, strict=True)),
        pictures=tuple(pictures),
        measured=tuple(rows),
        progress=(sheet,) * 6,
        latest=sheet,
        settings={"optim.learning_rate": f"{seed}e-4", "data.role": name, "seed": "1"},
        recipe="train:\n  steps: 200\n" + "x" * 300,
    )


def png_of(generator: torch.Generator, side: int) -> bytes:
    from PIL import Image

    return png(Image.fromarray(torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8).numpy()))


WIDTHS = (390, 1280)
PAGES = {
    "chain": [subject("chain", seed=1, stages=4)],
    "roles": [subject(name, seed=number, stages=3) for number, name in enumerate(("source", "fine_tuning", "mixture"))],
    "sweep": [subject(f"{number:03d}_learning_rate={number}e-4_attention_heads=8", seed=number) for number in range(7)],
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What the browser says of every page at every width, as `name width`, and of one in the dark."""
    folder = tmp_path_factory.mktemp("pages")
    policy = r'<meta http-equiv="Content-Security-Policy"[^>]*>'
    for name, subjects in PAGES.items():
        html = page(subjects)
        assert re.search(policy, html), "the page forbids scripts; without that line the probe may run"
        (folder / f"{name}.html").write_text(re.sub(policy, "", html).replace("</body>", f"{_PROBE}</body>"))
    light = [(name, width) for name in PAGES for width in WIDTHS]
    return {**_ask(folder, light, dark=False), "dark": _ask(folder, [("sweep", WIDTHS[0])], dark=True)[f"sweep {WIDTHS[0]}"]}


def _ask(folder: Path, pages: list[tuple[str, int]], *, dark: bool) -> dict[str, dict[str, object]]:
    """One browser with a frame for each page and width: a window itself is never narrower than 500 pixels."""
    frames = [f'<iframe src="{name}.html" style="border:0;width:{width}px;height:3000px"></iframe>' for name, width in pages]
    script = (
        "setInterval(() => { const told = [...document.querySelectorAll('iframe')].map(f => f.contentDocument?.body?.dataset.told);"
        "if (told.every(Boolean)) document.title = '[' + told.join(',') + ']'; }, 50)"
    )
    outer = folder / "outer.html"
    outer.write_text(f'<body style="margin:0">{"".join(frames)}<script>{script}</script>')
    words = [*_BROWSER, f"--user-data-dir={folder / 'profile'}", "--allow-file-access-from-files", "--window-size=1400,3000"]
    words += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=10000", "--dump-dom", outer.as_uri()]
    dom = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title, dom[:500]
    answers = json.loads(unescape(title[1]))
    return {f"{name} {width}": answer for (name, width), answer in zip(pages, answers, strict=True)}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_wider_than_the_page(name: str, width: int, told: dict[str, dict[str, object]]) -> None:
    answer = told[f"{name} {width}"]
    assert answer["width"] == width and answer["scroll"] == width, answer
    assert answer["wide"] == []
    plots = answer["plots"]
    assert isinstance(plots, int) and plots >= {"chain": 7, "roles": 6, "sweep": 7}[name]


def test_dark_is_dark(told: dict[str, dict[str, object]]) -> None:
    assert (told["sweep 390"]["page"], told["dark"]["page"]) == ("rgb(251, 250, 248)", "rgb(21, 21, 23)")


def test_paper_holds_the_folded_parts_too(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page(PAGES["sweep"]))
    paper = tmp_path / "page.pdf"
    words = [*_BROWSER, f"--user-data-dir={tmp_path / 'profile'}", "--no-pdf-header-footer", f"--print-to-pdf={paper}"]
    subprocess.run([*words, (tmp_path / "page.html").as_uri()], capture_output=True, timeout=120, check=True)
    pages = paper.read_bytes().count(b"/Type /Page\n")
    assert pages > 10, f"{pages} pages: the folded parts of seven runs are not on paper"
