"""Encoders store what diffusers and transformers say of images and captions, and a run with another encoder is refused."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from data_shards.derive.request import EncodeRequest
from data_shards.encoders.check import check_encoder
from data_shards.encoders.efficient_net import EfficientNetEncoder
from data_shards.encoders.files import encoder_sha256, find_model
from data_shards.encoders.npy import npy_bytes
from data_shards.encoders.text import TextEncoder
from data_shards.images import DecodeError
from data_shards.index import ShardIndex
from data_shards.packing.pack import pack
from data_shards.reading.decode import tensor_of
from data_shards.reading.read import read_all
from data_shards.sources.faces import FacesSource
from data_shards.tars.verify import verify
from tests.derive_runs import derived, files, ledger, members
from tests.tiny_models import tiny_clip_text, tiny_clip_vision, tiny_tokenizer, tiny_vae


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As ranks on the CPU have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_vae(root / "vae")
    tiny_clip_text(root / "text")
    tiny_clip_text(root / "projected", projects=True)
    tiny_clip_vision(root / "vision")
    return root


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 faces of 48 pixels in shards of 12 and 8."""
    out = tmp_path_factory.mktemp("faces")
    pack(FacesSource("open-peeps", 20), out, size=48, samples_per_shard=12)
    return out


@pytest.fixture(scope="module")
def everything(models: Path, faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The faces, encoded by all three kinds of encoder, in fp32."""
    out = tmp_path_factory.mktemp("everything") / "out"
    assert derived(faces, out, request(models)) == 0
    return out


def request(models: Path, *, keep_images: bool = False) -> EncodeRequest:
    return EncodeRequest(
        vae=str(models / "vae"),
        text_encoder=str(models / "text"),
        image_encoder=str(models / "vision"),
        size=32,
        batch_size=5,
        precision="fp32",
        dtype="fp32",
        pooled=True,
        keep_images=keep_images,
    )


def stored(out: Path, extension: str) -> dict[str, np.ndarray]:
    return {name.partition(".")[0]: tensor_of(content).numpy() for name, content in members(out).items() if name.endswith(f".{extension}")}


def squares(faces: Path) -> dict[str, Tensor]:
    """Each face at 32 pixels, as torch itself scales it."""
    batch = read_all(ShardIndex.load(faces))
    scaled = torch.nn.functional.interpolate(batch.images, (32, 32), mode="bicubic", antialias=True)
    return dict(zip(batch.keys, scaled, strict=True))


def captions(faces: Path) -> dict[str, str]:
    return {name.removesuffix(".txt"): text.decode() for name, text in members(faces).items() if name.endswith(".txt")}


def assert_close(found: dict[str, np.ndarray], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        np.testing.assert_allclose(found[key], tensor.numpy(), rtol=1e-5, atol=1e-5)


def test_moments_are_what_diffusers_gives(models: Path, faces: Path, everything: Path) -> None:
    vae = AutoencoderKL.from_pretrained(models / "vae", local_files_only=True)
    found = stored(everything, "latents.npy")
    wanted = {}
    for key, image in squares(faces).items():
        with torch.no_grad():
            (moments,) = vae.encode(image[None].float() / 127.5 - 1, return_dict=False)
        wanted[key] = torch.cat((moments.mean, moments.logvar), dim=1)[0]
    assert_close(found, wanted)
    assert next(iter(found.values())).shape == (8, 16, 16)


def test_text_and_pooled_are_what_transformers_gives(models: Path, faces: Path, everything: Path) -> None:
    tokenizer, model = tiny_tokenizer(), CLIPTextModel.from_pretrained(models / "text" / "text_encoder", local_files_only=True)
    hidden, pooled = {}, {}
    for key, caption in captions(faces).items():
        ids = tokenizer(caption, padding="max_length", truncation=True, max_length=16, return_tensors="pt").input_ids
        with torch.no_grad():
            output = model(ids)
        hidden[key], pooled[key] = output.last_hidden_state[0], output.pooler_output[0]
    assert_close(stored(everything, "text.npy"), hidden)
    assert_close(stored(everything, "pooled.npy"), pooled)
    (done,) = ShardIndex.load(everything).derived
    assert done["counts"] == {"captions_cut": 20}, "tiny words are letters, and each caption longer than 16 of them"


def test_image_embeddings_are_what_transformers_gives(models: Path, faces: Path, everything: Path) -> None:
    folder = models / "vision"
    model = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder", local_files_only=True)
    processor = CLIPImageProcessorPil.from_pretrained(folder / "image_processor", local_files_only=True)
    wanted = {}
    for key, image in squares(faces).items():
        pixels = processor(Image.fromarray(image.permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            wanted[key] = model(pixels).image_embeds[0]
    assert_close(stored(everything, "image.npy"), wanted)


def test_images_are_left_out_unless_they_are_kept_and_texts_stay(models: Path, faces: Path, everything: Path, tmp_path: Path) -> None:
    before, after = members(faces), members(everything)
    assert {name for name in after if not name.endswith(".npy")} == {name for name in before if not name.endswith(".png")}
    assert all(after[name] == before[name] for name in after.keys() & before.keys())
    index = ShardIndex.load(everything)
    assert index.image_size is None and verify(everything) == []
    assert not index.holds_images() and index.side() == 32, "what the latents are of, which a run on them has to know"
    assert derived(faces, tmp_path / "out", request(models, keep_images=True)) == 0
    kept = members(tmp_path / "out")
    assert kept == {**{name: content for name, content in before.items() if name.endswith(".png")}, **after}
    assert verify(tmp_path / "out") == []
    assert ShardIndex.load(tmp_path / "out").side() == 48


def test_the_reader_gives_what_was_stored(everything: Path) -> None:
    batch = read_all(ShardIndex.load(everything), ("latents.npy", "text.npy"))
    latents = stored(everything, "latents.npy")
    assert torch.equal(batch.tensors["latents.npy"], torch.stack([torch.tensor(latents[key]) for key in batch.keys]))


def test_half_precision_is_the_default_and_close(models: Path, faces: Path, everything: Path, tmp_path: Path) -> None:
    assert derived(faces, tmp_path / "out", EncodeRequest(vae=str(models / "vae"), size=32)) == 0
    found, exact = stored(tmp_path / "out", "latents.npy"), stored(everything, "latents.npy")
    assert all(values.dtype == np.float16 for values in found.values())
    difference = max(float(np.abs(found[key] - exact[key]).max()) for key in exact)
    assert 0 < difference < 0.05 * max(float(np.abs(values).max()) for values in exact.values())
    (done,) = ShardIndex.load(tmp_path / "out").derived
    assert done["members"] == {"latents.npy": {"shape": [8, 16, 16], "dtype": "float16"}}


def test_a_stop_changes_no_bit_and_nothing_is_encoded_twice(models: Path, faces: Path, everything: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert derived(faces, out, request(models), stop_after=2) == 75
    (part,) = out.glob(".derive/*.part")
    part.write_bytes(part.read_bytes() + b"deadbeef 99 {")
    assert derived(faces, out, request(models)) == 0
    assert files(out) == files(everything) and len(ledger(out / "run")) == 5


def test_another_encoder_than_the_shards_were_made_with_is_refused(models: Path, everything: Path) -> None:
    index, sha256 = ShardIndex.load(everything), encoder_sha256(models / "vae")
    check_encoder(index, "latents.npy", sha256)
    check_encoder(index, "pooled.npy", encoder_sha256(models / "text" / "text_encoder"))
    with pytest.raises(ValueError, match=rf"latents.npy was made by vae \(sha256 {sha256[:12]}\), wanted 000000000000; encode them"):
        check_encoder(index, "latents.npy", "0" * 64)
    with pytest.raises(ValueError, match=r"holds no depth.npy of an encoder; encode them"):
        check_encoder(index, "depth.npy", sha256)


def test_the_hash_follows_weights_and_config_but_not_what_libraries_note(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "vae", tmp_path / "vae"))
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"_diffusers_version": "', '"_diffusers_version": "9'))
    assert encoder_sha256(folder) == encoder_sha256(models / "vae")
    (folder / "config.json").write_text(config.replace('"scaling_factor": 0.18215', '"scaling_factor": 0.5'))
    assert encoder_sha256(folder) != encoder_sha256(models / "vae")
    (folder / "config.json").write_text(config)
    with open(folder / "diffusion_pytorch_model.safetensors", "r+b") as file:
        file.seek(-1, io.SEEK_END)
        file.write(b"\x7f")
    assert encoder_sha256(folder) != encoder_sha256(models / "vae")


def test_projected_and_penultimate_text(models: Path) -> None:
    folder = models / "projected"
    encoder = TextEncoder(str(folder), layer="penultimate", tokens=0, masks=True, precision="fp32", device=torch.device("cpu"))
    text = encoder.encode(["a cat", "a person of blue hair"])
    model = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", local_files_only=True)
    padded = tiny_tokenizer()(["a cat", "a person of blue hair"], padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        wanted = model(padded.input_ids, attention_mask=padded.attention_mask, output_hidden_states=True)
    assert torch.allclose(text.hidden, wanted.hidden_states[-2], atol=1e-6)
    assert text.pooled is not None and torch.allclose(text.pooled, wanted.text_embeds, atol=1e-6)
    assert torch.equal(text.mask, padded.attention_mask) and text.cut == [False, False]


def test_wuerstchens_compressor_shrinks_32_times(faces: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = EfficientNetEncoder()
    assert sum(weight.numel() for weight in model.parameters()) == 20_177_488 + 1280 * 16 + 32  # torchvision's features, the projection
    torch.save({"effnet_state_dict": model.state_dict()}, tmp_path / "model_v2_stage_b.pt")
    asked = EncodeRequest(image_encoder=str(tmp_path / "model_v2_stage_b.pt"), size=64, dtype="fp32", precision="fp32", batch_size=12)
    assert derived(faces, tmp_path / "out", asked) == 0
    found = stored(tmp_path / "out", "image.npy")
    batch = read_all(ShardIndex.load(faces))
    image = torch.nn.functional.interpolate(batch.images[:1], (64, 64), mode="bicubic", antialias=True).float() / 255
    mean, scale = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    wanted = model((image - mean[:, None, None]) / scale[:, None, None])[0]
    np.testing.assert_allclose(found[batch.keys[0]], wanted.numpy(), atol=1e-4)
    assert wanted.shape == (16, 2, 2)
    torch.save({"effnet_state_dict": {"backbone.0.0.weight": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="weights are missing, strange or of another shape"):
        derived(faces, tmp_path / "other", EncodeRequest(image_encoder=str(tmp_path / "other.pt")))


def test_kandinskys_movq_has_latents_without_a_variance(faces: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        movq = VQModel(
            block_out_channels=(8, 8),  # pyright: ignore[reportArgumentType]
            down_block_types=("DownEncoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
            up_block_types=("UpDecoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
            norm_num_groups=4,
            latent_channels=4,
        )
    movq.save_pretrained(tmp_path / "pipeline" / "movq")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    asked = EncodeRequest(vae=str(tmp_path / "pipeline"), size=32, precision="fp32", dtype="fp32")
    assert derived(faces, tmp_path / "out", asked) == 0
    key, image = next(iter(squares(faces).items()))
    with torch.no_grad():
        wanted = movq.encode(image[None].float() / 127.5 - 1).latents[0]
    np.testing.assert_allclose(stored(tmp_path / "out", "latents.npy")[key], wanted.numpy(), atol=1e-5)


def test_what_cannot_be_encoded_is_said(models: Path, faces: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to encode with"):
        EncodeRequest()
    with pytest.raises(ValueError, match="--pooled and --text-mask are of a text encoder"):
        EncodeRequest(vae="x", pooled=True)
    with pytest.raises(ValueError, match="--vae wants an AutoencoderKL or a VQModel"):
        derived(faces, tmp_path / "a", EncodeRequest(vae=str(models / "vision" / "image_encoder")))
    with pytest.raises(ValueError, match="--text-encoder wants CLIP's text encoder or T5's"):
        derived(faces, tmp_path / "b", EncodeRequest(text_encoder=str(models / "vision" / "image_encoder")))
    with pytest.raises(ValueError, match="--image-encoder wants CLIP's image encoder"):
        derived(faces, tmp_path / "c", EncodeRequest(image_encoder=str(models / "vae")))
    no_images = EncodeRequest(vae=str(models / "vae"), size=32)
    assert derived(faces, tmp_path / "d", no_images) == 0
    with pytest.raises(ValueError, match="it has no image"):
        derived(tmp_path / "d", tmp_path / "e", no_images)


def test_numbers_beyond_half_precision_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite in fp16; give --dtype fp32"):
        npy_bytes(torch.tensor([70000.0]), "fp16")
    assert tensor_of(npy_bytes(torch.tensor([70000.0]), "fp32"))[0] == 70000


@pytest.mark.parametrize("case", ["objects", "fortran", "short", "long", "no_npy"])
def test_a_tensor_that_is_not_plain_numbers_is_refused(case: str) -> None:
    file = io.BytesIO()
    array = {"objects": np.array([None, "x"], dtype=object), "fortran": np.asfortranarray(np.ones((2, 3)))}.get(case, np.ones((2, 3)))
    np.save(file, array)
    content = {"short": file.getvalue()[:-1], "long": file.getvalue() + b"x", "no_npy": b"PK\3\4"}.get(case, file.getvalue())
    with pytest.raises(DecodeError):
        tensor_of(content)


def test_a_model_is_found_at_the_top_and_within_a_pipeline(models: Path, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    shutil.copytree(models / "vae", tmp_path / "pipeline" / "vae")
    top, part = find_model(str(models / "vae"), part="vae"), find_model(str(tmp_path / "pipeline"), part="vae")
    assert (top.name, part.name) == ("vae", "pipeline/vae") and top.sha256 == part.sha256
    with pytest.raises(ValueError, match="is a local folder, which has no revision"):
        find_model(str(models / "vae"), revision="main")
    with pytest.raises(ValueError, match=r"no config\.json there nor in movq/"):
        find_model(str(tmp_path / "pipeline"), part="movq")
    (tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no weights; wanted model\.safetensors or"):
        find_model(str(tmp_path / "pipeline"), part="vae")
