"""A captioner killed with SIGKILL at any moment goes on: every image has one caption, the same bytes, and none is made twice."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from data_shards.derive.request import CaptionRequest
from data_shards.index import ShardIndex
from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from data_shards.tars.verify import verify
from tests.derive_runs import files, ledger, members, prepared
from tests.distributed.forked_ranks import ForkedRanks
from tests.distributed.runs import rank_pids
from tests.tiny_models import tiny_blip

pytestmark = pytest.mark.distributed

_FACES, _BATCH, _KILLS = 160, 4, 5
_LIMIT_SECONDS = 120.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 faces in 8 shards, and a captioner."""
    root = tmp_path_factory.mktemp("captions")
    pack(FacesSource("open-peeps", _FACES), root / "faces", size=32, samples_per_shard=20)
    tiny_blip(root / "blip")
    return root


@pytest.fixture(scope="module")
def forked(folder: Path) -> Iterator[ForkedRanks]:
    ranks = ForkedRanks(["launch.worker", "data_shards.derive.caption", "trainer.visible", "trainer.engines.engine"], folder / "forked.log")
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def undisturbed(folder: Path, forked: ForkedRanks) -> Path:
    """The faces captioned on one rank."""
    run_dir = prepared(folder / "faces", folder / "undisturbed", request(folder))
    forked.start("caption", run_dir, ranks=1)
    assert forked.wait() == [0], (folder / "forked.log").read_text()
    return folder / "undisturbed"


def request(folder: Path) -> CaptionRequest:
    return CaptionRequest(model=str(folder / "blip"), batch_size=_BATCH, max_new_tokens=12, precision="bf16")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the moment to kill at never came"
        time.sleep(0.001)


def assert_one_caption_each(out: Path, reference: Path, *, lost: int) -> None:
    """lost: how many batches may have been finished without a line in the ledger, each by a kill between the two."""
    assert files(out) == files(reference)
    assert verify(out) == []
    captions = [name for name in members(out) if name.endswith(".txt") and not name.endswith(".original.txt")]
    assert len(captions) == len(set(captions)) == _FACES == ShardIndex.load(out).samples
    batches = _FACES // _BATCH
    assert batches - lost <= len(ledger(out / "run")) <= batches  # ledger() finds what was made twice


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_number_of_ranks_gives_the_same_bytes(
    folder: Path, forked: ForkedRanks, undisturbed: Path, tmp_path: Path, ranks: int
) -> None:
    run_dir = prepared(folder / "faces", tmp_path / "out", request(folder))
    forked.start("caption", run_dir, ranks=ranks)
    assert forked.wait() == [0] * ranks, (folder / "forked.log").read_text()
    assert_one_caption_each(tmp_path / "out", undisturbed, lost=0)
    assert len(list(run_dir.glob("ledger/rank_*.jsonl"))) == ranks


def test_five_kills_of_two_ranks_change_nothing_and_repeat_nothing(
    folder: Path, forked: ForkedRanks, undisturbed: Path, tmp_path: Path
) -> None:
    dice, out = random.Random(8), tmp_path / "out"
    run_dir = prepared(folder / "faces", out, request(folder))
    for kill in range(_KILLS):
        pids = forked.start("caption", run_dir, ranks=2)
        after = (kill + 1) * (_FACES // _BATCH) // (_KILLS + 1) - dice.randrange(4)
        wait_for(lambda after=after: len(ledger(run_dir)) >= after)
        time.sleep(dice.random() * 0.03)  # a batch takes about as long
        dice.shuffle(pids)
        for pid in pids:  # as when a node is lost; a rank that is alone would go on until it misses the other
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert forked.wait() == [-signal.SIGKILL] * 2, "it was over before the kill came"
        assert not (out / "index.json").exists()
    forked.start("caption", run_dir, ranks=2)
    assert forked.wait() == [0, 0], (folder / "forked.log").read_text()
    assert_one_caption_each(out, undisturbed, lost=2 * _KILLS)


def test_a_signal_to_one_rank_stops_both_after_a_batch_and_the_other_number_of_ranks_goes_on(
    folder: Path, forked: ForkedRanks, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = prepared(folder / "faces", tmp_path / "out", request(folder))
    pids = forked.start("caption", run_dir, ranks=2)
    wait_for(lambda: len(ledger(run_dir)) >= 5)
    os.kill(pids[1], signal.SIGTERM)
    codes = forked.wait()
    assert codes == [75, 75] and not (run_dir / "lease.json").exists()
    forked.start("caption", run_dir, ranks=1)
    assert forked.wait() == [0]
    assert_one_caption_each(tmp_path / "out", undisturbed, lost=0)


@pytest.mark.all_kills
@pytest.mark.parametrize("seed", range(5))
def test_the_command_itself_survives_kills_of_its_ranks(folder: Path, undisturbed: Path, tmp_path: Path, seed: int) -> None:
    dice, out = random.Random(seed), tmp_path / "out"
    words = [sys.executable, "-m", "launch", "shards", "caption", str(folder / "faces"), "--model", str(folder / "blip"), "--out", str(out)]
    words += ["--batch-size", str(_BATCH), "--max-new-tokens", "12", "--ranks", "2"]
    for _ in range(3):
        before = len(ledger(out / "run"))
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            wait_for(lambda before=before, process=process: len(ledger(out / "run")) > before + 3 or process.poll() is not None)
            time.sleep(dice.random() * 0.05)
            for pid in sorted(rank_pids(process.pid).values()) if process.poll() is None else ():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert process.wait(_LIMIT_SECONDS) == 70, "it was over before the kill came"
    finished = subprocess.run(words, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False)
    assert finished.returncode == 0, finished.stderr
    assert_one_caption_each(out, undisturbed, lost=6)
    status = subprocess.run([sys.executable, "-m", "launch", "status", str(out / "run")], capture_output=True, text=True, check=True)
    assert ": done, step 40/40" in status.stdout
    shutil.rmtree(out)
