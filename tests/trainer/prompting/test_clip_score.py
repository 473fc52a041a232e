"""CLIP scores of a tiny CLIP model, against its features computed by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from trainer.prompting.clip_score import ClipScore, mean_scores, score
from trainer.tiny_models.make import make_tiny

CPU = torch.device("cpu")
PROMPTS = ["a couple", "a woman", "a girl writing a letter in candlelight"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP."""
    return make_tiny("clip", tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture
def images() -> UInt8[Tensor, "b h w c"]:
    """Three of 40 x 56 pixels."""
    return torch.randint(0, 256, (3, 40, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def cosines(folder: Path, images: UInt8[Tensor, "b h w c"], prompts: list[str]) -> list[float]:
    """Of each pair alone: projected features by numpy, as torchmetrics' clip_score normalises and multiplies them."""
    model, tokenizer = CLIPModel.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        with torch.no_grad():
            pixels = processor(image.numpy(), return_tensors="pt")["pixel_values"]
            seen = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0].double().numpy()
            read = model.text_projection(model.text_model(**tokenizer(prompt, return_tensors="pt")).pooler_output)[0].double().numpy()
        found.append(float((seen / np.linalg.norm(seen)) @ (read / np.linalg.norm(read))))
    return found


def test_a_score_is_the_cosine_of_image_and_prompt_in_hundredths(folder: Path, images: UInt8[Tensor, "b h w c"]) -> None:
    wanted = cosines(folder, images, PROMPTS)
    scores = ClipScore(str(folder), device=CPU).scores(images, PROMPTS)
    assert scores.tolist() == pytest.approx([100 * max(value, 0.0) for value in wanted], abs=1e-3)
    assert len(set(scores.tolist())) > 1, "a model of which all cosines are negative would show nothing"


def test_opposite_features_score_zero() -> None:
    embeds = torch.tensor([[1.0, 0.0], [3.0, 4.0], [-2.0, 0.0]])
    assert score(embeds, torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0]])).tolist() == pytest.approx([100.0, 60.0, 0.0])


def test_a_score_does_not_depend_on_the_other_images(folder: Path, images: UInt8[Tensor, "b h w c"]) -> None:
    clip = ClipScore(str(folder), device=CPU)
    together = clip.scores(images.repeat(12, 1, 1, 1), PROMPTS * 12)
    assert together[33:].tolist() == pytest.approx(clip.scores(images, PROMPTS).tolist(), abs=1e-3)


def test_a_long_prompt_is_cut_and_grey_images_are_scored(folder: Path, images: UInt8[Tensor, "b h w c"]) -> None:
    assert ClipScore(str(folder), device=CPU).scores(images[:1, ..., :1], ["a woman " * 100]).shape == (1,)


def test_means_are_taken_by_prompt() -> None:
    assert mean_scores(torch.tensor([10.0, 20.0, 5.0]), ["b", "b", "a"]) == {"b": 15.0, "a": 5.0}


def test_another_kind_of_model_is_refused(text_folder: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clip_text_model; a CLIP score wants a whole CLIP model"):
        ClipScore(str(text_folder / "text_encoder"), device=CPU)
    with pytest.raises(ValueError, match="no such folder"):
        ClipScore("./nowhere", device=CPU)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pytorch_model\.bin.*safetensors"):
        ClipScore(str(tmp_path), device=CPU)
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    ClipScore(str(tmp_path), device=CPU)
