"""A recipe's data as a run freezes it: mixtures, other sizes, buckets, and remote shards that a resume finds without the network."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data_shards.index import ShardIndex, index_text
from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from launch.data import data_folders, data_identity, with_data
from launch.run_dir import freeze
from tests.data_shards.store_server import StoreServer
from trainer.config import RunConfig
from trainer.stop import StopRequest
from trainer.train import train
from trainer.watch import Watch


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets of faces: `small` of 8 at 16 px, `large` of 12 at 24 px."""
    root = tmp_path_factory.mktemp("sets")
    pack(FacesSource("open-peeps", 8), root / "small", size=16, samples_per_shard=5)
    pack(FacesSource("critters", 12), root / "large", size=24, samples_per_shard=5)
    return root


@pytest.fixture
def server(sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreServer]:
    """`small` on a web server."""
    for name in ("HF_HUB_OFFLINE", "HALFSTEP_OFFLINE", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HALFSTEP_CACHE", str(tmp_path / "cache"))
    with StoreServer().running() as running:
        for file in (sets / "small").iterdir():
            running.put(f"/small/{file.name}", file.read_bytes())
        yield running


def recipe(data: dict[str, object], *, steps: int = 3) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"global_batch_size": 4, "micro_batch_size": 2, **data},
            "model": {"channels": [8, 8], "attention": [False, False], "attention_heads": 1},
            "train": {"steps": steps},
            "logging": {"sample_every_steps": 0},
        }
    )


def run(config: RunConfig, run_dir: Path) -> Counter[str]:
    """Freezes and trains as `halfstep train` does; how often each sample was delivered."""
    folders = data_folders(config, run_dir / "shards")
    freeze(run_dir, with_data(config, folders, run_dir=run_dir, root=run_dir), shards=folders)
    watch = Watch(run_dir, rank=0, world_size=1, limit_seconds=300)
    try:
        assert train(run_dir, StopRequest(), watch) == 0
    finally:
        watch.close()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(config.train.steps))
    return Counter(json.loads(line)["step"] for line in (run_dir / "ledger" / "rank_0.jsonl").read_text().splitlines())


def test_data_sets_of_several_sizes_are_mixed_and_brought_to_one(sets: Path, tmp_path: Path) -> None:
    mixture = [{"shards": str(sets / "small"), "weight": 1.0}, {"shards": str(sets / "large"), "weight": 2.0}]
    config = recipe({"mixture": mixture, "image_size": 8})
    assert run(config, tmp_path / "run") == {0: 2, 1: 2, 2: 2}
    identity = json.loads((tmp_path / "run" / "identity.json").read_text())
    assert identity["data.mixture weights"] == [1.0, 2.0] and len(identity["data.mixture sha256"]) == 2
    descriptor = json.loads((tmp_path / "run" / "export" / "descriptor.json").read_text())
    assert descriptor["image_size"] == 8


def test_another_weight_is_another_run(sets: Path) -> None:
    folders = [sets / "small", sets / "large"]
    data = [recipe({"mixture": [{"shards": "a", "weight": 1.0}, {"shards": "b", "weight": weight}]}).data for weight in (1.0, 2.0)]
    assert data_identity(data[0], folders) != data_identity(data[1], folders)


def test_data_sets_of_several_sizes_want_a_size(sets: Path, tmp_path: Path) -> None:
    mixture = [{"shards": str(sets / "small")}, {"shards": str(sets / "large")}]
    with pytest.raises(ValueError, match=r"small: 16, large: 24 pixels\); set data.image_size"):
        run(recipe({"mixture": mixture}), tmp_path / "run")


def test_a_run_trains_on_buckets(sets: Path, tmp_path: Path) -> None:
    """Faces are square, so all are of one bucket; the shapes are tested with the reader."""
    run(recipe({"shards": str(sets / "small"), "image_size": 16, "aspect_buckets": {"multiple_of": 8}}), tmp_path / "run")


def test_remote_shards_are_frozen_once_and_resumed_without_the_network(
    sets: Path, tmp_path: Path, server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = f"{server.url}/small"
    run(recipe({"shards": location}, steps=2), tmp_path / "run")
    [folder] = data_folders(recipe({"shards": location}), tmp_path / "run" / "shards")
    index = ShardIndex.load(folder)
    assert (index.location, index.sha256) == (location, ShardIndex.load(sets / "small").sha256)
    assert json.loads((tmp_path / "run" / "identity.json").read_text())["data.shards sha256"] == index.sha256
    assert max(Counter(asked.path for asked in server.asked).values()) == 1

    server.put("/small/index.json", b"{}")  # changed, and then down: neither matters to a run that has begun
    monkeypatch.setenv("HALFSTEP_OFFLINE", "1")
    run(recipe({"shards": location}, steps=4), tmp_path / "run")


def test_the_frozen_recipe_sees_remote_shards_in_its_own_folder(tmp_path: Path, server: StoreServer) -> None:
    config = recipe({"shards": f"{server.url}/small"})
    [folder] = data_folders(config, tmp_path / "run" / "shards")
    frozen = with_data(config, [folder], run_dir=tmp_path / "run", root=tmp_path / "run")
    assert frozen.data.shards == f"shards/{folder.name}"


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("http://user:secret@{host}/small", "would lie in the run's recipe.yaml; put it into ~/.netrc"),
        ("http://{host}/small?token=secret", "would lie in the run's recipe.yaml"),
        ("http://{host}/nothing", "404"),
        ("ftp://{host}/small", "not a scheme that shards are read from"),
        ("pipe:cat /etc/passwd", "not a scheme that shards are read from"),
        ("http://{host}/broken", "broken/index.json: not valid JSON"),
    ],
)
def test_a_location_that_can_not_be_is_refused(tmp_path: Path, server: StoreServer, location: str, message: str) -> None:
    server.put("/broken/index.json", b"<html>")
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        data_folders(recipe({"shards": location.format(host=server.url.removeprefix("http://"))}), tmp_path / "own")
    assert "secret" not in str(caught.value)


def test_latents_without_images_are_nothing_for_a_pixel_model(sets: Path, tmp_path: Path) -> None:
    index = ShardIndex.load(sets / "small")
    shards = [replace(shard, members={"txt": shard.members["txt"]}) for shard in index.shards]
    text = index_text(image_size=None, licence={}, source={}, pack={}, shards=shards, location=str(sets / "small"))
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match="holds txt and no images, which this model learns from"):
        run(recipe({"shards": str(tmp_path), "image_size": 16}), tmp_path / "run")


def test_only_images_that_a_model_has_drawn_are_a_teachers_samples(tmp_path: Path) -> None:
    pack(FacesSource("open-peeps", 4), tmp_path / "faces", size=16)
    with pytest.raises(
        ValueError, match=r"data.role=teacher_samples, but the images of .*faces are from faces; make the teacher's own first"
    ):
        data_folders(recipe({"shards": str(tmp_path / "faces"), "role": "teacher_samples"}), tmp_path / "own")
    assert data_folders(recipe({"shards": str(tmp_path / "faces"), "role": "source"}), tmp_path / "own") == [tmp_path / "faces"]
