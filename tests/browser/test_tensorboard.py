"""What a run reports can be seen in a real TensorBoard, in a real browser."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from trainer.metrics import Drawn, Reporter, StepMetrics

pytestmark = [pytest.mark.browser, pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium: apt-get install chromium")]


def _report(run_dir: Path, *, start_step: int, steps: int) -> None:
    run_dir.mkdir(exist_ok=True)
    values = {"seed": 0, "model.channels": [8, 16]}
    reporter = Reporter(run_dir, start_step=start_step, total_steps=steps, recipe_text="seed: 0", hyperparameters=values, title="test")
    for step in range(start_step, steps):
        reporter.write_step(StepMetrics(step, 1 / (step + 1), (1 / (step + 1)).hex(), 1.0, 1e-3, 100.0, 0.1, 0.01))
    reporter.write_samples(
        start_step, {name: Drawn(Image.new("RGB", (64, 64), colour)) for name, colour in (("ema", "red"), ("raw", "blue"))}
    )
    reporter.close()


@pytest.fixture(scope="module")
def tensorboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a TensorBoard that shows a chain of two stages, the first of them resumed."""
    chain = tmp_path_factory.mktemp("chain")
    _report(chain / "stage_00_1000_steps", start_step=0, steps=30)
    _report(chain / "stage_00_1000_steps", start_step=20, steps=40)
    _report(chain / "stage_01_0500_steps", start_step=0, steps=10)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "tensorboard.main", "--logdir", str(chain), "--port", str(port), "--host", "127.0.0.1"]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/data/plugin/scalars/tags", "stage_01_0500_steps")
        yield address
    finally:
        server.terminate()
        server.wait(20)


def _wait_for(address: str, text: str) -> str:
    deadline = time.monotonic() + 60
    while True:
        try:
            body = urllib.request.urlopen(address, timeout=5).read().decode()
            if text in body:
                return body
        except OSError:
            pass
        assert time.monotonic() < deadline, f"{address} never showed {text}"
        time.sleep(0.2)


def _page(address: str, profile: Path) -> str:
    """The words of the page that a browser builds, without spaces: a name may lie in several elements."""
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--window-size=1400,6000"]
    words = [*browser, "--virtual-time-budget=30000", "--dump-dom", address]
    page = subprocess.run(words, capture_output=True, text=True, timeout=90, check=True).stdout
    return re.sub(r"<[^>]*>|\s", "", re.sub(r"<(style|script).*?</\1>|<!--.*?-->", "", page, flags=re.DOTALL))


def test_loss_speed_and_grids_are_on_the_page(tensorboard: str, tmp_path: Path) -> None:
    # With a filter the page opens every card that matches; without one it folds most groups.
    address = f"{tensorboard}/?tagFilter=loss%7Cspeed%7Csamples#timeseries"
    names = ("train/loss", "speed/images_per_second", "samples/ema", "samples/raw", "stage_00_1000_steps", "stage_01_0500_steps")
    missing = list(names)
    for attempt in range(6):  # on a busy machine a page may not be complete when the browser's clock runs out
        page = _page(address, tmp_path / str(attempt))
        missing = [name for name in names if name not in page]
        if not missing:
            break
    assert not missing, f"not on TensorBoard's page: {missing}"


def test_a_resumed_run_shows_each_step_once(tensorboard: str) -> None:
    run = "stage_00_1000_steps/tensorboard"
    points = json.loads(_wait_for(f"{tensorboard}/data/plugin/scalars/scalars?tag=train%2Floss&run={run.replace('/', '%2F')}", "["))
    assert [point[1] for point in points] == list(range(40))
