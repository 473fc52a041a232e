"""`halfstep shards bench`: its numbers agree with each other, its advice follows from them, and bad input is named."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_shards.index import ShardIndex
from data_shards.reading.bench import Measured, Verdict, measure, verdict
from data_shards.reading.sample import BadSampleError
from launch.shards.bench import advice, bench_shards, table, worker_counts
from launch.shards.commands import shards
from tests.data_shards.store_server import StoreServer

pytest_plugins = ["tests.data_shards.store_fixtures"]

DECODING = Measured(
    cores=4,
    sample_bytes=1000.0,
    disk=90_000.0,
    network=None,
    decode=500.0,
    resize=None,
    device_pinned=None,
    device_unpinned=None,
    readers={0: 480.0, 1: 470.0, 2: 950.0, 4: 1800.0, 8: 1850.0},
)


def found(measured: Measured) -> Mapping[str, object]:
    return json.loads(json.dumps({**asdict(measured), "verdict": asdict(verdict(measured))}))


def test_the_fewest_workers_that_are_nearly_as_quick_as_any_are_advised() -> None:
    assert verdict(DECODING) == Verdict("decoding", 4, 1800.0)
    assert "Decoding is the bottleneck: 500 images/s a core, 4 cores here; set data.workers=4: about 1,800" in advice(found(DECODING))


def test_what_is_slower_than_the_reader_is_the_bottleneck_and_no_more_workers_are_advised_than_it_can_feed() -> None:
    assert verdict(replace(DECODING, disk=700.0)) == Verdict("disk", 2, 700.0)
    assert verdict(replace(DECODING, disk=None, network=300.0)) == Verdict("network", 0, 300.0)
    assert "until the shards are in the cache; set data.workers=0: about 300" in advice(found(replace(DECODING, disk=None, network=300.0)))
    with_device = replace(DECODING, device_pinned=900.0, device_unpinned=400.0)
    assert verdict(with_device) == Verdict("transfer", 2, 900.0)
    assert verdict(replace(with_device, disk=600.0)) == Verdict("disk", 2, 600.0)


def test_with_a_device_a_worker_reads_while_it_computes() -> None:
    quick = replace(DECODING, device_pinned=9e9, device_unpinned=9e9, readers={0: 500.0, 1: 400.0})
    assert verdict(quick) == Verdict("decoding", 1, 400.0)
    assert verdict(replace(quick, readers={0: 500.0})) == Verdict("decoding", 0, 500.0)


def test_a_table_has_a_line_for_each_part() -> None:
    lines = table(found(replace(DECODING, resize=3000.0, device_pinned=2e6, device_unpinned=1e6)))
    assert [line.split("  ")[0] for line in lines] == [
        "disk, one process",
        "decoding, one core",
        "scaling, one core",
        "to the device, pinned",
        "to the device, unpinned",
        "reader in the process",
        "reader, 1 worker",
        "reader, 2 workers",
        "reader, 4 workers",
        "reader, 8 workers",
    ]
    assert lines[0].endswith("90,000 images/s  (90 MB/s)")


@pytest.mark.parametrize("image_size", [None, 8])
def test_its_numbers_are_consistent(image_size: int | None, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_shards(packed, image_size=image_size, batch_size=4, workers=[0, 1], as_json=True, scale=0.01)
    told = json.loads(capsys.readouterr().out)
    index = ShardIndex.load(packed)
    assert told["shards"] == str(packed) and told["batch_size"] == 4 and told["image_size"] == image_size and told["cores"] >= 1
    assert told["sample_bytes"] == sum(shard.size_bytes for shard in index.shards) / 30
    assert told["disk"] > 0 and told["network"] is None and told["decode"] > 0
    assert (told["resize"] is None) == (image_size is None)
    assert (told["device_pinned"] is None) == (told["device_unpinned"] is None)
    assert set(told["readers"]) == {"0", "1"} and all(speed > 0 for speed in told["readers"].values())
    assert told["verdict"]["images_per_second"] <= told["readers"][str(told["verdict"]["workers"])]
    assert f"set data.workers={told['verdict']['workers']}" in told["advice"]


def test_progress_comes_to_its_end(packed: Path) -> None:
    shown: list[tuple[int, int]] = []
    index = ShardIndex.load(packed)
    measure(index, image_size=None, batch_size=30, workers=[0], progress=lambda done, total: shown.append((done, total)), scale=0.01)
    assert shown == [(done, 5) for done in range(6)]


def test_remote_shards_are_fetched_for_a_try_and_leave_nothing(
    packed: Path, store: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    index = ShardIndex.load(packed)
    for shard in index.shards:
        store.put(f"/faces/{shard.name}", (packed / shard.name).read_bytes())
    remote = replace(index, location=f"{store.url}/faces")
    measured = measure(remote, image_size=None, batch_size=13, workers=[0], scale=0.01)
    assert measured.network is not None and measured.network > 0 and measured.disk is None
    assert not list(tmp_path.glob("halfstep-bench-*"))


def test_bad_input_is_named(damaged: Path, tmp_path: Path) -> None:
    index = ShardIndex.load(damaged)
    with pytest.raises(ValueError, match=r"--batch-size 31: .* holds 30 samples"):
        measure(index, image_size=None, batch_size=31, workers=[0])
    with pytest.raises(ValueError, match="several sizes; give --image-size"):
        measure(replace(index, image_size=None), image_size=None, batch_size=4, workers=[0])
    for text in ("", "two", "-1", "1,,2", "65", "1.5"):
        with pytest.raises(ValueError, match=f"--workers {text}: wanted numbers from 0 to 64"):
            worker_counts(text)
    assert worker_counts("4, 0,4") == [0, 4]
    for words in ([str(tmp_path / "none")], [str(damaged), "--workers", "x"]):
        result = CliRunner().invoke(shards, ["bench", *words])
        assert isinstance(result.exception, ValueError)


def test_a_damaged_sample_ends_in_one_message(damaged: Path) -> None:
    for path in damaged.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(BadSampleError, match="halfstep shards verify"):
        measure(ShardIndex.load(damaged), image_size=None, batch_size=4, workers=[0], scale=0.01)
    with pytest.raises(ValueError, match=r"shard-00000\d\.tar: sample .*`halfstep shards verify"):
        bench_shards(damaged, image_size=None, batch_size=4, workers=[0], as_json=False)
