"""A caption command checks everything before a rank starts, goes on by the same words, and status, ends and stop know its folder."""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from data_shards.derive.request import CaptionRequest, DeriveJob, DrawRequest
from data_shards.files import json_text
from data_shards.index import ShardIndex, index_text
from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from launch.ends import Restarts, committed_steps
from launch.shards.start_derive import Then, local_model, start_derive, start_draw
from launch.start import How
from launch.status import is_done, print_status, run_status


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faces")
    pack(FacesSource("open-peeps", 10), out, size=16, samples_per_shard=6)
    return out


@pytest.fixture
def out(faces: Path, tmp_path: Path) -> Path:
    """An OUT of which 2 of 6 batches are finished, on two ranks that were told to stop."""
    run_dir = tmp_path / "out" / "run"
    (run_dir / "ledger").mkdir(parents=True)
    job = DeriveJob.of(ShardIndex.load(faces), request())
    job.write(run_dir)
    (tmp_path / "out" / ".derive").mkdir()
    (tmp_path / "out" / ".derive" / "wanted.json").write_text(json_text({**job.wanted(), "models": {}}))
    for rank in range(2):
        (run_dir / "ledger" / f"rank_{rank}.jsonl").write_text('{"shard": "shard-000000.tar", "batch": 0}\n')
    (run_dir / "attempts.jsonl").write_text('{"world_size": 2, "hosts": ["n1"]}\n')
    (run_dir / "progress.json").write_text('{"images_per_second": 3.5, "remaining_seconds": 40.0}')
    (run_dir / "exit.json").write_text('{"code": 75, "reason": "asked to stop"}')
    (run_dir / ".lock").touch()
    return tmp_path / "out"


@pytest.fixture
def finish(faces: Path, out: Path) -> Callable[[], None]:
    """A function: gives OUT its index, as if the ranks had finished it."""

    def write() -> None:
        index = ShardIndex.load(faces)
        for shard in index.shards:
            (out / shard.name).write_bytes((faces / shard.name).read_bytes())
        done = {**DeriveJob.of(index, request()).wanted(), "counts": {"captions": 10}, "left_out": 2}
        text = index_text(image_size=16, licence=index.licence, source=index.source, pack=index.pack, shards=index.shards, derived=[done])
        (out / "index.json").write_text(text)

    return write


def request(prompt: str = "") -> CaptionRequest:
    return CaptionRequest(model="/models/blip", prompt=prompt, batch_size=2)


def test_what_cannot_be_started_is_said_and_nothing_is_written(faces: Path, out: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    with pytest.raises(ValueError, match="the folder of shards itself, which is never changed"):
        start_derive(str(faces), faces, request(), How())
    with pytest.raises(ValueError, match=r"train.steps=3: only cluster.KEY=VALUE"):
        start_derive(str(faces), fresh, request(), How(), overrides=["train.steps=3"])
    with pytest.raises(ValueError, match="--ranks 2 is for this machine"):
        start_derive(str(faces), fresh, request(), How(cluster="slurm", ranks=2))
    with pytest.raises(ValueError, match=r"beginning of something else \(request.prompt is \"\", wanted \"a cat\"\)"):
        start_derive(str(faces), out, request("a cat"), How())
    assert not fresh.exists()


def test_a_finished_folder_is_told_about_and_shown_without_any_rank(
    faces: Path, out: Path, finish: Callable[[], None], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish()
    pushed: list[tuple[Path, str]] = []
    monkeypatch.setattr("data_shards.hub.push.push_shards", lambda root, repo: pushed.append((root, repo)))
    assert start_derive(str(faces), out, request(), How(), then=Then(tmp_path / "sheet.png", "me/told")) == 0
    told = capsys.readouterr()
    assert "10 samples in 2 shards, 2 samples left out" in told.out and "captions: 10" in told.out
    assert (tmp_path / "sheet.png").exists() and pushed == [(out, "me/told")]
    with pytest.raises(ValueError, match="holds other shards"):
        start_derive(str(faces), out, request("a cat"), How())


def test_status_knows_the_folder(out: Path, finish: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = out / "run"
    stopped = run_status(run_dir, ended=None)
    assert (stopped.state, stopped.step, stopped.total_steps, stopped.attempts) == ("stopped", 2, 5, 1)
    assert stopped.images_per_second == 3.5 and stopped.remaining_seconds is None and not is_done(run_dir)
    (run_dir / "exit.json").write_text('{"code": 64, "reason": "no such model"}')
    assert run_status(run_dir, ended=None).state == "failed"
    descriptor = os.open(run_dir / ".lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    running = run_status(run_dir, ended=None)
    os.close(descriptor)
    assert (running.state, running.remaining_seconds, running.nodes) == ("running", 40.0, ("n1",))
    finish()
    print_status(run_dir, as_json=False)
    assert ": done, step 5/5" in capsys.readouterr().out and is_done(run_dir)


def test_finished_batches_are_progress(out: Path) -> None:
    run_dir = out / "run"
    assert committed_steps(run_dir) == 2
    restarts = Restarts.begin(run_dir, limit=1, first=True)
    with open(run_dir / "ledger" / "rank_0.jsonl", "a") as file:
        file.write("{}\n")
    assert Restarts.begin(run_dir, limit=1, first=False).without_progress == 0
    assert Restarts.begin(run_dir, limit=1, first=False).without_progress == 1 and restarts.committed == 2


def test_a_record_of_another_halfstep_is_said(out: Path) -> None:
    record = json.loads((out / "run" / "derive.json").read_text())
    (out / "run" / "derive.json").write_text(json.dumps({**record, "request": {"model": "x", "colour": "blue"}}))
    with pytest.raises(ValueError, match="not written by this halfstep"):
        DeriveJob.read(out / "run")


def test_a_model_in_a_folder_is_named_absolutely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blip").mkdir()
    monkeypatch.chdir(tmp_path)
    assert local_model("blip") == str(tmp_path / "blip") and local_model("someone/blip") == "someone/blip" and local_model("") == ""


def test_drawing_is_checked_before_a_rank_starts_and_goes_on_by_the_same_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, Path]] = []
    monkeypatch.setattr("launch.shards.start_derive.launch_job", lambda job, *_: started.append((job.kind, job.path)) or 75)
    request = DrawRequest(str(tmp_path / "model"), count=9, batch_size=4, samples_per_shard=6)
    with pytest.raises(ValueError, match=r"model: neither a RUN_DIR \(recipe.yaml\), a chain"):
        start_draw(tmp_path / "out", request, How())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "recipe.yaml").touch()
    assert start_draw(tmp_path / "out", request, How()) == 75 and started == [("draw", tmp_path / "out" / "run")]
    job = DeriveJob.read(tmp_path / "out" / "run")
    assert job.request == request and (job.samples, job.batches) == (9, 3)
    assert "from_sha256" not in job.wanted() and str(tmp_path) not in json.dumps(job.wanted()), "no path of this machine"
    assert run_status(tmp_path / "out" / "run", ended=None).total_steps == 3
