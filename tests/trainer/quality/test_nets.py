"""Feature nets: what is taken of each, against the library's own calls, and that a name says all that decides the numbers."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

from trainer.feature_net import Attribute, FeatureNet, TrainedFeatureNet, features_of, read_attributes
from trainer.quality.faces_net import NamedFeatureNet
from trainer.quality.inception import load_inception
from trainer.quality.nets import FacesFeatures, InceptionFeatures, TransformerFeatures, default_resize, net_kind
from trainer.quality.resize import Resize, resize
from trainer.tiny_models.make import make_tiny

CPU = torch.device("cpu")


def _images(count: int = 3, size: int = 12) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP, text and image."""
    folder = tmp_path_factory.mktemp("nets") / "clip"
    make_tiny("clip", folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2 of 28 px."""
    folder = tmp_path_factory.mktemp("nets") / "dinov2"
    config = Dinov2Config(hidden_size=16, num_hidden_layers=6, num_attention_heads=2, image_size=28, patch_size=14, initializer_range=0.3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Dinov2Model(config).save_pretrained(folder)
    return folder


def test_clips_features_are_its_image_embeddings(clip: Path) -> None:
    net = TransformerFeatures("clip", str(clip), "bicubic-antialias", CPU)
    model = CLIPVisionModelWithProjection.from_pretrained(clip, local_files_only=True).eval()
    side = int(str(model.config.image_size))
    # at the net's own size nothing is resized, and the processor only normalises
    images = _images(size=side)
    pixels = CLIPImageProcessorPil.from_pretrained(clip, local_files_only=True)(list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = model(pixel_values=pixels).image_embeds
    assert torch.allclose(net.features(images), wanted, atol=1e-5) and float(wanted.std()) > 1e-3
    assert net.resize == f"bicubic-antialias-{side}" and net.name.startswith("clip-") and net.name.endswith(net.resize)
    layers = net.layers(images)
    assert all(layer.shape[:2] == (3, model.config.hidden_size) for layer in layers)
    assert not torch.equal(net.features(_images(size=8)), net.features(_images(size=8).flip(3)))


def test_dinov2s_features_are_its_normalised_class_token(dinov2: Path) -> None:
    net = TransformerFeatures("dinov2", str(dinov2), "bicubic-antialias", CPU)
    model = Dinov2Model.from_pretrained(dinov2, local_files_only=True).eval()
    images = _images()
    values = resize(images.float() / 255, 28, "bicubic-antialias").clamp(0, 1)
    mean, deviation = (torch.tensor(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        output = model(pixel_values=(values - mean) / deviation, output_hidden_states=True)
    assert torch.allclose(net.features(images), output.last_hidden_state[:, 0], atol=1e-5)
    # six layers: after the first, third, fourth and sixth
    assert len(net.layers(images)) == 4
    for layer, number in zip(net.layers(images), (1, 3, 4, 6), strict=True):
        assert torch.allclose(layer, output.hidden_states[number].transpose(1, 2), atol=1e-5)


def test_a_name_and_an_identity_change_with_weights_and_resize(clip: Path, dinov2: Path, tmp_path: Path) -> None:
    make_tiny("clip", tmp_path / "other", seed=1)
    cases: list[tuple[Literal["clip", "dinov2"], Path, Resize]] = [
        ("clip", clip, "bicubic-antialias"),
        ("clip", clip, "bilinear"),
        ("clip", tmp_path / "other", "bicubic-antialias"),
        ("dinov2", dinov2, "bicubic-antialias"),
    ]
    nets = [TransformerFeatures(kind, str(folder), method, CPU) for kind, folder, method in cases]
    assert len({net.name for net in nets}) == len({net.identity for net in nets}) == 4
    again = TransformerFeatures("clip", str(clip), "bicubic-antialias", CPU)
    assert (again.name, again.identity) == (nets[0].name, nets[0].identity)


def test_another_normalisation_is_another_net(clip: Path, tmp_path: Path) -> None:
    make_tiny("clip", tmp_path / "clip", seed=0)
    same = TransformerFeatures("clip", str(tmp_path / "clip"), "bilinear", CPU)
    path = tmp_path / "clip" / "preprocessor_config.json"
    path = path if path.exists() else tmp_path / "clip" / "processor_config.json"
    path.unlink()
    (tmp_path / "clip" / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    other = TransformerFeatures("clip", str(tmp_path / "clip"), "bilinear", CPU)
    assert other.name != same.name and not torch.equal(other.features(_images()), same.features(_images()))


def test_a_model_of_another_kind_is_refused(clip: Path, dinov2: Path) -> None:
    with pytest.raises(ValueError, match="is of type dinov2; --feature-net clip= wants CLIP"):
        TransformerFeatures("clip", str(dinov2), "bilinear", CPU)
    with pytest.raises(ValueError, match="is of type clip; --feature-net dinov2= wants DINOv2"):
        TransformerFeatures("dinov2", str(clip), "bilinear", CPU)


def test_inceptions_pixels_are_those_of_the_tool_whose_resize_is_chosen(inception_file: Path) -> None:
    nets = {method: InceptionFeatures(inception_file, method, CPU) for method in ("bilinear-tf1", "bilinear")}
    images = _images(1, size=20)
    fidelity = (resize(images.float(), 299, "bilinear-tf1") - 128) / 128
    pytorch_fid = 2 * torch.nn.functional.interpolate(images.float() / 255, size=(299, 299), mode="bilinear") - 1
    assert torch.equal(nets["bilinear-tf1"]._pixels(images), fidelity)
    assert torch.allclose(nets["bilinear"]._pixels(images), pytorch_fid, atol=1e-6)
    with torch.inference_mode():
        wanted = load_inception(inception_file)(fidelity)
    assert torch.allclose(nets["bilinear-tf1"].features(images), wanted, rtol=1e-4, atol=1e-6)
    assert nets["bilinear"].name.endswith("-bilinear-299") and nets["bilinear"].name != nets["bilinear-tf1"].name


def test_the_projects_own_net_reads_and_compares() -> None:
    net = FeatureNet((Attribute("a", ("x", "y")),), torch.Generator().manual_seed(0)).eval()
    own = FacesFeatures(NamedFeatureNet("faces-attributes-0", TrainedFeatureNet(net, (), {}), "ab"), CPU)
    images = _images(4, size=16)
    assert torch.equal(own.features(images), features_of(net, images))
    assert torch.equal(own.classify(own.features(images)), read_attributes(net, images))
    assert [layer.shape[1:] for layer in own.layers(images)] == [(32, 256), (64, 64), (96, 16)]
    assert own.resize == "area-64" and own.identity == "faces ab"


def test_kinds_and_their_places() -> None:
    assert net_kind("faces") == ("faces", "") and net_kind("faces=shards") == ("faces", "shards")
    assert net_kind("clip=openai/clip-vit-large-patch14") == ("clip", "openai/clip-vit-large-patch14")
    assert default_resize("inception") == "bilinear-tf1" and default_resize("clip") == "bicubic-antialias"
    for text in ("clip", "inception=", "vgg=a.pth", ""):
        with pytest.raises(ValueError, match="--feature-net"):
            net_kind(text)
