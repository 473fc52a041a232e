"""A model's own images as shards: each a function of (seed, number), the same bytes after a stop, with where they come from."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_shards.derive.request import DeriveJob, DrawRequest
from data_shards.index import ShardIndex
from data_shards.reading.read import read_all
from data_shards.tars.verify import verify
from tests.derive_runs import Silent, StopAfter, files, ledger, members
from trainer.draw_shards import draw_job
from trainer.sample import draw_images
from trainer.source import load_source

COUNT, BATCH, PER_SHARD = 11, 2, 4
WriteRun = Callable[..., Path]


@dataclass
class Counting(Silent):
    """A heartbeat that counts its ticks."""

    ticks: int = 0

    def tick(self) -> None:
        """One more."""
        self.ticks += 1


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As ranks on the CPU have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def request_of(write_run: WriteRun, tmp_path: Path) -> DrawRequest:
    """Eleven images of a student of 4 steps."""
    run_dir = write_run(tmp_path / "model", student_steps=4)
    return DrawRequest(str(run_dir), COUNT, seed=5, batch_size=BATCH, samples_per_shard=PER_SHARD)


def drawn(out: Path, request: DrawRequest, *, stop_after: int | None = None, beat: Counting | None = None) -> int:
    """The exit code of a rank that is alone."""
    run_dir = out / "run"
    run_dir.mkdir(parents=True, exist_ok=True)
    DeriveJob.drawing(request).write(run_dir)
    stop = Silent() if stop_after is None else StopAfter(run_dir, stop_after)
    return draw_job(run_dir, {}, stop, beat or Counting())


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content), formats=("PNG",)))


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_image_i_is_what_sample_draws_from_seed_and_i(request_of: DrawRequest, tmp_path: Path, sampler: str) -> None:
    request = replace(request_of, sampler=sampler, steps=2)
    assert drawn(tmp_path / "out", request) == 0
    found = members(tmp_path / "out")
    assert sorted(found) == [f"{number:08d}.png" for number in range(COUNT)]
    source = load_source(Path(request.source))
    alone = draw_images(source, steps=2, seed=5 + 7, count=1, sampler=request.sampler)[0]
    difference = np.abs(pixels(found["00000007.png"]).astype(int) - alone.numpy().astype(int))
    assert difference.max() <= 1, "sums may differ with what else is in the batch, pixels by a rounding at most"
    assert not np.array_equal(pixels(found["00000007.png"]), pixels(found["00000008.png"]))


def test_the_index_says_where_they_come_from_and_a_run_can_read_them(request_of: DrawRequest, tmp_path: Path) -> None:
    beat = Counting()
    assert drawn(tmp_path / "out", request_of, beat=beat) == 0
    index, source = ShardIndex.load(tmp_path / "out"), load_source(Path(request_of.source))
    assert index.samples_per_shard == (4, 4, 3) and index.side() == 8 and verify(tmp_path / "out") == []
    assert index.source == {"kind": "drawn", "weights_sha256": source.weights_sha256, "steps": 4, "sampler": "ddim", "seed": 5}
    (done,) = json.loads((tmp_path / "out" / "index.json").read_text())["derived"]
    assert done["kind"] == "draw" and done["counts"] == {"drawn": COUNT} and done["request"]["source"] == "model"
    assert done["models"]["model"]["descriptor"] == source.descriptor.to_json()
    assert read_all(index, ("image",)).images.shape == (COUNT, 3, 8, 8)
    assert beat.ticks == 4 * 6, "every sampling step of every batch is a sign of life"


def test_a_stop_changes_no_bit_and_nothing_is_drawn_twice(request_of: DrawRequest, tmp_path: Path) -> None:
    assert drawn(tmp_path / "whole", request_of) == 0
    out = tmp_path / "out"
    for batches in (1, 3):
        assert drawn(out, request_of, stop_after=batches) == 75
    assert not (out / "index.json").exists()
    assert drawn(out, request_of) == 0
    assert files(out) == files(tmp_path / "whole") and len(ledger(out / "run")) == 6


def test_another_model_does_not_go_on_with_what_one_has_begun(request_of: DrawRequest, write_run: WriteRun, tmp_path: Path) -> None:
    assert drawn(tmp_path / "out", request_of, stop_after=1) == 75
    other = write_run(tmp_path / "elsewhere" / "model", student_steps=4, seed=1)
    with pytest.raises(ValueError, match=r"beginning of something else \(models.model.weights_sha256 is"):
        drawn(tmp_path / "out", replace(request_of, source=str(other)))


def test_more_steps_than_the_model_has_are_refused_and_nothing_is_written(request_of: DrawRequest, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this model samples in 4 steps or fewer"):
        drawn(tmp_path / "out", replace(request_of, steps=5))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run"]
    with pytest.raises(ValueError, match="--count 0 must be at least 1"):
        replace(request_of, count=0)


def test_a_seed_is_the_whole_difference(request_of: DrawRequest, tmp_path: Path) -> None:
    assert drawn(tmp_path / "five", request_of) == 0 and drawn(tmp_path / "six", replace(request_of, seed=6)) == 0
    five, six = members(tmp_path / "five"), members(tmp_path / "six")
    assert np.abs(pixels(five["00000003.png"]).astype(int) - pixels(six["00000002.png"]).astype(int)).max() <= 1
