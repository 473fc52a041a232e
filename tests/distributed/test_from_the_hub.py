"""From the Hub with its real clients: packed, captioned, pushed, encoded, trained from there; and again without a network."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from data_shards.index import ShardIndex
from data_shards.tars.verify import verify
from tests.hub_double import HubDouble
from tests.tiny_models import tiny_blip, tiny_vae

pytestmark = pytest.mark.distributed
TOKEN = "hf_right"
ROWS = 48
_LIMIT_SECONDS = 240.0


def halfstep(*words: str | Path, environment: Mapping[str, str]) -> str:
    """Runs a command; what it said."""
    command = [sys.executable, "-m", "launch", *map(str, words)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False)
    assert ran.returncode == 0, ran.stderr
    assert TOKEN not in ran.stdout + ran.stderr
    return ran.stdout


def write_cartoons(folder: Path) -> None:
    """A data set of the Hub: 48 faces with captions in two Parquet files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_shards.images import encode_image
    from data_shards.sources.faces import FacesSource
    from data_shards.sources.rows import Part, Row

    faces = [row for row in FacesSource("open-peeps", ROWS).read(Part(0, 0, ROWS), 24) if isinstance(row, Row)]
    features = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    (folder / "data").mkdir(parents=True)
    for number in range(2):
        part = faces[number * ROWS // 2 : (number + 1) * ROWS // 2]
        images = [{"bytes": row.image if isinstance(row.image, bytes) else encode_image(row.image, "png"), "path": None} for row in part]
        table = pa.table({"image": images, "text": [row.caption for row in part]})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, folder / "data" / f"train-0000{number}-of-00002.parquet")
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\nCartoon faces.\n")


def hashes(run_dir: Path, environment: Mapping[str, str]) -> str:
    return halfstep("hash", run_dir, environment=environment)


def train_words(run_dir: Path) -> list[str | Path]:
    data = ["data.faces=null", "data.shards=hf://datasets/tester/told", "data.image_size=16"]
    return [
        "train",
        "smoke",
        "--run-dir",
        run_dir,
        "--ranks",
        "2",
        *data,
        "train.steps=4",
        "lr_schedule.warmup_steps=0",
        "logging.sample_every_steps=0",
    ]


def test_from_the_hub_to_a_trained_run_and_again_offline(tmp_path: Path) -> None:
    write_cartoons(tmp_path / "hub" / "datasets" / "tester" / "cartoons")
    tiny_blip(tmp_path / "hub" / "models" / "tester" / "blip")
    tiny_vae(tmp_path / "hub" / "models" / "tester" / "vae")
    with HubDouble(tmp_path / "hub", token=TOKEN) as hub:
        hub.private.add("datasets/tester/cartoons")
        online = {**hub.environment(tmp_path / "home", token=TOKEN), "HALFSTEP_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        first = tmp_path / "first"
        pack = ["shards", "pack", "--source", "hub", "tester/cartoons", "--size", "24", "--samples-per-shard", "10"]
        caption = ["--model", "tester/blip", "--precision", "fp32", "--max-new-tokens", "8", "--ranks", "2"]
        halfstep(*pack, "--out", first / "packed", environment=online)
        halfstep("shards", "caption", first / "packed", *caption, "--out", first / "told", "--push", "tester/told", environment=online)
        encode = ["--vae", "tester/vae", "--size", "16", "--precision", "fp32", "--ranks", "1"]
        halfstep("shards", "encode", "hf://datasets/tester/told", *encode, "--out", first / "latents", environment=online)
        halfstep(*train_words(first / "run"), environment=online)

        packed, told, latents = (ShardIndex.load(first / name) for name in ("packed", "told", "latents"))
        assert (packed.samples, told.samples, latents.samples) == (ROWS, ROWS, ROWS)
        assert packed.licence["name"] == "cc0-1.0" and packed.source["name"] == "tester/cartoons"
        assert not [problem for name in ("packed", "told", "latents") for problem in verify(first / name)]
        assert [entry["kind"] for entry in latents.derived] == ["caption", "encode"]
        frozen = next((first / "run" / "shards").glob("*/index.json"))
        pinned = ShardIndex.load(frozen.parent)
        assert pinned.location == f"hf://datasets/tester/told@{hub.head('datasets/tester/told')}" and pinned.sha256 == told.sha256
        assert (first / "run" / "export" / "model_index.json").exists()

        asked = len(hub.requests)
        hub.unplugged = True
        offline = {**online, "HF_HUB_OFFLINE": "1"}
        del offline["HF_TOKEN"]
        again = tmp_path / "again"
        halfstep(*pack, "--out", again / "packed", environment=offline)
        halfstep("shards", "caption", again / "packed", *caption, "--out", again / "told", environment=offline)
        halfstep(*train_words(again / "run"), environment=offline)
        assert ShardIndex.load(again / "told").sha256 == told.sha256
        assert hashes(again / "run", offline) == hashes(first / "run", offline)
        assert len(hub.requests) == asked, "nothing was asked of the network"
    assert TOKEN not in "".join(path.read_text(errors="replace") for path in first.rglob("*") if path.suffix in (".json", ".yaml", ".log"))
    assert os.environ.get("HF_TOKEN") != TOKEN
