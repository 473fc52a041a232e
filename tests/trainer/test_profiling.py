"""What --profile writes, and that it changes nothing; where a step's time goes, from spans that are given."""

import gzip
import json
import timeit
from pathlib import Path

import pytest
import torch

from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from launch.run_dir import freeze
from trainer.config import RunConfig
from trainer.profiling import Launch, Part, Span, parts_of, table
from trainer.spans import span
from trainer.stop import StopRequest
from trainer.train import train
from trainer.watch import Watch


def test_time_counts_for_the_innermost_span() -> None:
    spans = [Span("rest", 0, 100), Span("reduction", 10, 60), Span("optimizer", 20, 50), Span("EMA", 60, 70)]
    assert parts_of(spans, []) == [Part("rest", 40, 0), Part("optimizer", 30, 0), Part("reduction", 20, 0), Part("EMA", 10, 0)]


def test_spans_of_one_name_add_up_and_gaps_count_for_nobody() -> None:
    assert parts_of([Span("forward", 0, 10), Span("backward", 10, 40), Span("forward", 50, 60)], []) == [
        Part("backward", 30, 0),
        Part("forward", 20, 0),
    ]


def test_a_devices_work_counts_for_the_span_in_which_it_was_given() -> None:
    spans = [Span("rest", 0, 100), Span("backward", 10, 20)]
    launches = [Launch(12, 500), Launch(19.5, 7), Launch(20, 3), Launch(500, 1000)]  # the last one is outside of all
    assert parts_of(spans, launches) == [Part("rest", 90, 3), Part("backward", 10, 507)]


def test_the_table_is_of_one_step_and_shows_a_device_where_there_is_one() -> None:
    parts = [Part("forward", 6000, 0), Part("EMA", 2000, 0)]
    assert table(parts, steps=2).splitlines() == [
        "part of a step    ms   share",
        "forward         3.00   75.0%",
        "EMA             1.00   25.0%",
        "the whole step  4.00  100.0%",
    ]
    assert "device ms" in table([Part("forward", 6000, 1)], steps=1)


def test_without_a_profiler_a_span_is_the_same_nothing_each_time() -> None:
    assert span("forward") is span("EMA")
    seconds = min(timeit.repeat("with span('forward'): pass", globals={"span": span}, number=1000, repeat=20)) / 1000
    assert seconds < 1e-6  # 0.18 us on a busy EPYC core


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight faces."""
    out = tmp_path_factory.mktemp("shards")
    pack(FacesSource("open-peeps", 8), out, size=8, workers=1)
    return out


def _train(run_dir: Path, shards: Path, *, profile: bool, **changes: object) -> int:
    recipe = {
        "data": {"shards": str(shards), "global_batch_size": 4, "micro_batch_size": 2},
        "model": {"channels": [8, 8], "attention": [False, False], "attention_heads": 1, "dropout": 0.1},
        "train": {"steps": 16, **changes},
        "checkpoint": {"every_steps": 6},
        "logging": {"sample_every_steps": 0},
    }
    freeze(run_dir, RunConfig.model_validate(recipe), shards=shards)
    watch = Watch(run_dir, rank=0, world_size=1, limit_seconds=300)
    try:
        return train(run_dir, StopRequest(), watch, profile=profile)
    finally:
        watch.close()


def _metrics(run_dir: Path) -> list[tuple[str, float]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["loss_hex"], line["gradient_norm"]) for line in lines]


def test_a_profile_is_written_again_at_a_resume_and_changes_no_loss(shards: Path, tmp_path: Path) -> None:
    assert _train(tmp_path / "plain", shards, profile=False) == 0
    watched = tmp_path / "watched"
    assert _train(watched, shards, profile=True, stop_after_steps=8) == 75
    assert _train(watched, shards, profile=True) == 0
    assert _metrics(watched) == _metrics(tmp_path / "plain") and len(_metrics(watched)) == 16
    assert (watched / "ledger" / "rank_0.jsonl").read_bytes() == (tmp_path / "plain" / "ledger" / "rank_0.jsonl").read_bytes()
    names = ["step_000003.trace.json.gz", "step_000003.txt", "step_000011.trace.json.gz", "step_000011.txt"]
    assert sorted(path.name for path in (watched / "profile").iterdir()) == names
    text = (watched / "profile" / "step_000003.txt").read_text()
    assert text.startswith("5 steps from step 3 on, rank 0 of 1, cpu\n")
    parts = ("data wait", "draws and encoding", "forward", "backward", "reduction", "clip and optimizer", "EMA", "logging", "checkpoint")
    assert [part for part in (*parts, "everything else", "aten::") if f"\n{part}" not in text and f" {part}" not in text] == []
    trace = json.loads(gzip.decompress((watched / "profile" / "step_000003.trace.json.gz").read_bytes()))
    calls = [event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"]
    assert calls.count("halfstep/forward") == 10 and calls.count("halfstep/EMA") == 5, "5 steps of 2 micro-batches"
    assert not (tmp_path / "plain" / "profile").exists()


def test_an_attempt_too_short_to_be_watched_says_so_and_one_that_ends_meanwhile_shows_what_it_has(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert _train(tmp_path / "run", shards, profile=True, stop_after_steps=3) == 75
    assert "the attempt ended before step 3 was over, the first to be watched" in caplog.text
    assert not (tmp_path / "run" / "profile").exists()
    assert _train(tmp_path / "run", shards, profile=True, stop_after_steps=5) == 75
    assert (tmp_path / "run" / "profile" / "step_000006.txt").read_text().startswith("2 steps from step 6 on, rank 0 of 1, cpu\n")
    assert not torch.autograd._profiler_enabled()
