"""Captioners and encoders run in this process, as one rank does it, and what shards then hold."""

import json
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data_shards.derive.caption import caption_job
from data_shards.derive.encode import encode_job
from data_shards.derive.request import CaptionRequest, DeriveJob, EncodeRequest
from data_shards.index import ShardIndex


@dataclass
class StopAfter:
    """A stop request that comes once rank 0 has finished so many batches."""

    run_dir: Path
    batches: int

    @property
    def reason(self) -> str:
        return "SIGTERM" if len(ledger(self.run_dir)) >= self.batches else ""


@dataclass
class Silent:
    """A heartbeat that nobody looks at, and a stop request that never comes."""

    reason: str = ""

    def phase(self, name: str, step: int) -> None:
        """Nobody listens."""


def prepared(shards: Path, out: Path, request: CaptionRequest | EncodeRequest) -> Path:
    """OUT/run with the request in it, as the command line leaves it for the ranks."""
    run_dir = out / "run"
    run_dir.mkdir(parents=True, exist_ok=True)
    DeriveJob.of(ShardIndex.load(shards), request).write(run_dir)
    return run_dir


def derived(shards: Path, out: Path, request: CaptionRequest | EncodeRequest, *, stop_after: int | None = None) -> int:
    """The exit code of a rank that is alone."""
    run_dir = prepared(shards, out, request)
    stop = Silent() if stop_after is None else StopAfter(run_dir, stop_after)
    job = caption_job if isinstance(request, CaptionRequest) else encode_job
    return job(run_dir, {}, stop, Silent())


def members(folder: Path) -> dict[str, bytes]:
    """Every member of every tar by its name; two of one name are an error."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None and member.name not in found, member.name
                found[member.name] = file.read()
    return found


def files(out: Path) -> dict[str, bytes]:
    """All that OUT consists of when it is whole, but for the logs of its making."""
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".tar") == ["index.json", "run"]
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def ledger(run_dir: Path) -> list[tuple[str, int]]:
    """Shard and number of every batch that a model was run on and that was finished, in any attempt; none stands there twice."""
    lines = [json.loads(line) for path in sorted(run_dir.glob("ledger/rank_*.jsonl")) for line in path.read_text().splitlines()]
    found = [(line["shard"], line["batch"]) for line in lines]
    twice = [batch for batch, count in Counter(found).items() if count > 1]
    assert not twice, f"made twice: {twice}"
    return found
