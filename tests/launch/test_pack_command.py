"""`halfstep shards pack`: from recipes, files and the Hub; what is wrong is said in one message before anything is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_shards.hub.source import HubSource
from data_shards.index import ShardIndex
from launch.shards.commands import shards
from launch.shards.pack_recipe import FOLDER, PackRecipe, is_recipe, pack_recipe
from launch.shards.pack_source import open_source
from tests.hub_double import HubDouble
from trainer.config_io import shipped

PAPER = {
    "biglam/dating-historical-color-images",
    "dlcvproj/historic_images",
    "Norod78/cartoon-blip-captions",
    "Skittoo/cartoon-faces",
    "korexyz/celeba-hq-256x256",
    "uoft-cs/cifar10",
}


def run(*words: str) -> str:
    """What the command says, or the message of what stopped it."""
    done = CliRunner().invoke(shards, ["pack", *words])
    assert done.exception is None or isinstance(done.exception, ValueError | OSError), done.output
    return str(done.exception) if done.exception is not None else done.output


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for number in range(6):
        Image.new("RGB", (20 + 10 * number, 30), (40 * number, 0, 0)).save(tmp_path / "mine" / f"{number}.png")
    return tmp_path


def test_the_shipped_recipes_are_those_of_the_papers_data_sets_and_speak_of_their_licence() -> None:
    recipes = {file.stem: pack_recipe(file.stem, {}) for file in shipped(FOLDER)}
    assert {recipe.repo for recipe in recipes.values()} == PAPER
    assert all(recipe.source == "hub" and is_recipe(name) for name, recipe in recipes.items())
    assert all("# Licence: " in file.read_text() for file in shipped(FOLDER))


@pytest.mark.parametrize("file", shipped(FOLDER), ids=lambda file: file.stem)
def test_a_recipe_opens_its_data_set_with_its_columns(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setattr(HubSource, "open", lambda repo, **wanted: asked.append((repo, wanted)))
    recipe = pack_recipe(file.stem, {"revision": "v1"})
    open_source(recipe, [])
    [(repo, wanted)] = asked
    assert repo == recipe.repo and wanted["split"] == "train" and wanted["revision"] == "v1"
    assert (wanted["image_column"], wanted["text_column"]) == (recipe.image_column, recipe.text_column)


def test_the_command_line_goes_before_the_recipe(here: Path) -> None:
    (here / "mine.yaml").write_text("source: folder\nsize: 64\nimage_format: webp\nmin_size: 30\nlicence: CC0-1.0\n")
    said = run("--recipe", "mine.yaml", "mine", "--size", "16", "--workers", "1")
    assert said.startswith("shards/mine: 5 images of 16 pixels in 1 shard, ") and "CC0-1.0; left out 1 too small\n" in said
    index = ShardIndex.load(here / "shards" / "mine")
    assert index.pack["image_format"] == "webp" and index.pack["dropped"] == {"too_small": 1}


def test_images_of_their_own_sizes_are_said_to_be(here: Path) -> None:
    said = run("--source", "folder", "mine", "--out", "o", "--size", "own", "--max-size", "24", "--image-format", "keep", "--workers", "1")
    assert said.startswith("o: 6 images of their own sizes in 1 shard, ")
    assert "use it:  halfstep train RECIPE data.shards=o" in said
    [shard] = ShardIndex.load(here / "o").shards
    assert shard.widths is not None and sorted(shard.widths) == [20, 24, 32, 40, 48, 56]


def test_parquet_files_and_tars_are_packed(here: Path) -> None:
    rows = [(here / "mine" / f"{number}.png").read_bytes() for number in range(6)]
    pq.write_table(pa.table({"png": rows, "text": list("abcdef")}), here / "t.parquet")
    assert run("--source", "parquet", "t.parquet", "--size", "8", "--out", "p", "--workers", "1").startswith("p: 6 images of 8 pixels")
    assert run("--source", "tar", "p/shard-{000000..000000}.tar", "--size", "8", "--out", "q", "--workers", "1").startswith("q: 6 images")
    assert ShardIndex.load(here / "q").source["kind"] == "tar"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "wanted --source faces, folder, parquet, tar or hub, or a data set's recipe"),
        (["cifar11"], "wanted --source"),
        (["--recipe", "cifar11"], "did you mean 'cifar10'?"),
        (["--source", "folder", "mine"], "--out OUT is missing"),
        (["--source", "folder", "mine", "--size", "big", "--out", "o"], "--size big: wanted pixels such as 256, or own"),
        (["--source", "folder", "mine", "--split", "train", "--out", "o"], "split is an option of the source hub, not of folder"),
        (["--source", "folder", "mine", "--count", "3", "--out", "o"], "count is an option of the source faces"),
        (["--source", "folder", "mine", "--max-size", "3", "--out", "o"], "max_size is for images of their own size"),
        (["--source", "folder", "mine", "--crop", "none", "--out", "o"], "crop none keeps the shape"),
        (["--source", "folder", "mine", "--image-format", "keep", "--out", "o"], "keep leaves files as they are"),
        (["--source", "folder", "mine", "--min-caption", "3", "--max-caption", "2", "--out", "o"], "no caption has 3 characters or more"),
        (["--source", "folder", "mine", "other", "--out", "o"], "--source folder wants the folder of images"),
        (["--source", "faces", "mine", "--out", "o"], "faces are drawn here and read no folder, got mine"),
        (["--source", "faces", "--size", "own", "--out", "o"], "faces are drawn at the wanted size"),
        (["--source", "hub", "--size", "8", "--out", "o"], "--source hub OWNER/NAME"),
        (["--source", "hub", "a/b", "c", "--size", "8", "--out", "o"], "the data set is a/b, got c"),
        (["--source", "parquet", "a.parquet", "--out", "o"], "the source parquet wants a size"),
        (["--source", "parquet", "--size", "8", "--out", "o"], "--source parquet wants files"),
        (["--source", "tar", "--size", "8", "--out", "o"], "--source tar wants tars"),
    ],
)
def test_what_is_wrong_is_one_message_and_nothing_is_written(words: list[str], message: str, here: Path) -> None:
    assert message in run(*words)
    assert [path.name for path in here.iterdir()] == ["mine"]


def test_mistakes_of_a_recipe_are_named_with_their_lines(here: Path) -> None:
    (here / "r.yaml").write_text("source: hub\nrepo: a/b\nsizes: 32\nsize: 8\ndedupe: pixel\n")
    said = run("r.yaml")
    assert "r.yaml:3: sizes: unknown key - did you mean 'size'?" in said and "r.yaml:5: dedupe: " in said


def test_every_option_of_a_recipe_says_what_it_is() -> None:
    assert all(about.description for about in PackRecipe.model_fields.values())


def test_a_recipe_packs_a_data_set_of_the_hub(here: Path) -> None:
    root = here / "hub" / "datasets" / "me" / "squares"
    (root / "data").mkdir(parents=True)
    rows = [{"bytes": (here / "mine" / f"{number}.png").read_bytes(), "path": None} for number in range(6)]
    features = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    table = pa.table({"image": rows, "text": [f"square {number}" for number in range(6)]})
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}),
        root / "data" / "train-00000-of-00001.parquet",
    )
    (root / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# Squares\n")
    (here / "squares.yaml").write_text("source: hub\nrepo: me/squares\nsize: 8\nmin_size: 30\n")
    with HubDouble(here / "hub") as hub:
        environment = {**os.environ, **hub.environment(here / "home")}
        words = ["-m", "launch", "shards", "pack", "squares.yaml", "--workers", "2"]
        done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("shards/squares: 5 images of 8 pixels in 1 shard, ") and "left out 1 too small" in done.stdout
    index = ShardIndex.load(here / "shards" / "squares")
    assert index.source["name"] == "me/squares" and len(str(index.source["revision"])) == 40
    assert "cc0" in str(index.licence["name"]).lower()
