"""Requests from a command line: what is asked for, what is refused, and what is written."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.prompting.folder import Reads
from trainer.prompting.requests import Asked, asked, parse_size, refuse_prompts, requests_from, write_pictures

COUPLE = Asked(prompts=("a couple",))


@pytest.fixture
def files(tmp_path: Path, picture: Image.Image, mask: Image.Image) -> dict[str, Path]:
    """image.png, mask.png, and some that do not fit."""
    pictures = {"image": picture, "mask": mask, "wide": picture.resize((96, 65)), "black": Image.new("L", (64, 64))}
    for name, image in pictures.items():
        image.save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("no image")
    return {name: tmp_path / f"{name}.png" for name in (*pictures, "text", "nowhere")}


def test_every_prompt_is_asked_for_with_the_same_seeds() -> None:
    requests = requests_from(Asked(prompts=("a couple", "a woman"), images=3, seed=7, guidance_scale=5.0, size="96x64"), "text")
    assert [(request.prompt, request.seed) for request in requests] == [(p, 7 + i) for p in ("a couple", "a woman") for i in range(3)]
    assert {(request.guidance_scale, request.size, request.steps) for request in requests} == {(5.0, (64, 96), None)}


def test_options_of_a_job_are_read() -> None:
    options = {"prompts": ["a car"], "images": None, "seed": 3, "guidance": 4, "steps": 20, "image": "a.png", "mask": None, "out": "x"}
    read = asked(options, images=6)
    assert read == Asked(prompts=("a car",), images=6, seed=3, guidance_scale=4, steps=20, image=Path("a.png"))
    assert asked({}) == Asked()


def test_an_image_is_inpainted_with_its_mask(files: dict[str, Path], picture: Image.Image) -> None:
    (request,) = requests_from(replace(COUPLE, images=1, image=files["image"], mask=files["mask"]), "inpainting")
    assert request.image is not None and request.mask is not None and request.mask.mode == "L"
    assert np.array_equal(np.asarray(request.image), np.asarray(picture))


@pytest.mark.parametrize(("text", "size"), [("512", (512, 512)), ("768x512", (512, 768)), ("64X128", (128, 64))])
def test_a_size_is_a_side_or_width_by_height(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "complaint"), [("101", "give 104"), ("512x", "no size"), ("1x2x3", "no size"), ("-8", "no size"), ("0", "give 8")]
)
def test_a_wrong_size_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_size(text)


@pytest.mark.parametrize(
    ("changes", "reads", "complaint"),
    [
        ({"prompts": ()}, "text", "give --prompt TEXT"),
        ({"prompts": ("a", "a")}, "text", "twice"),
        ({"images": 0}, "text", "--images 0"),
        ({"steps": 0}, "text", "--steps 0"),
        ({"seed": -1}, "text", "--seed -1"),
        ({"guidance_scale": -1.0}, "text", "--guidance -1"),
        ({"guidance_scale": float("nan")}, "text", "--guidance nan"),
        ({"guidance_rescale": 2.0}, "text", "--guidance-rescale 2"),
        ({"guidance_rescale": 0.5}, "inpainting", "alone; leave it out"),
        ({"guidance_scale": 1.0, "negative_prompt": "a hat"}, "text", "no effect at --guidance 1"),
        ({"decoder_steps": 3}, "text", "--decoder-steps: this model has no second network"),
        ({"image": Path("image.png")}, "text", "does not inpaint"),
        ({"mask": Path("mask.png")}, "text", "does not inpaint"),
        ({}, "inpainting", "give --image FILE"),
    ],
)
def test_what_a_model_cannot_do_is_refused(changes: dict[str, object], reads: Reads, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        requests_from(replace(COUPLE, **changes), reads)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("given", "masked", "complaint"),
    [
        ("image", None, "give --mask FILE"),
        ("image", "nowhere", "--mask .*not there"),
        ("text", "mask", "--image .*not read as an image"),
        ("wide", "mask", "64x64 pixels, --image .* is 96x65"),
        ("wide", "wide", "not square.*--size 96x64"),
        ("image", "black", "black all over"),
    ],
)
def test_images_and_masks_that_do_not_fit_are_refused(files: dict[str, Path], given: str, masked: str | None, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        requests_from(replace(COUPLE, image=files[given], mask=files[masked] if masked else None), "inpainting")


def test_a_model_of_pixels_refuses_prompts() -> None:
    refuse_prompts(Asked(images=3, seed=4, steps=5))
    for name, option in {"prompts": "--prompt", "guidance_scale": "--guidance", "mask": "--mask"}.items():
        with pytest.raises(ValueError, match=f"^{option}: this model .*reads no text"):
            refuse_prompts(replace(Asked(), **{name: ("a",)}))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^--size: this model draws images of the size that it was trained on"):
        refuse_prompts(Asked(size="64"))


def test_one_prompt_is_written_as_a_grid_several_as_a_sheet(tmp_path: Path) -> None:
    images = torch.full((4, 64, 64, 3), 50, dtype=torch.uint8)
    one = requests_from(replace(COUPLE, images=4), "text")
    assert Image.open(write_pictures(tmp_path / "one.png", one, images, title="EMA")).size == (2 * 128 + 1, 2 * 128 + 1)
    two = requests_from(Asked(prompts=("a couple", "a woman"), images=2), "text")
    written = write_pictures(tmp_path / "two", two, images, title="EMA")
    assert written == tmp_path / "two" / "grid.png"
    assert Image.open(written).width > 2 * 128 + 60
    assert sorted(path.name for path in written.parent.iterdir()) == ["grid.png", *(f"image_{i:05d}.png" for i in range(4))]


def test_inpainted_pictures_stand_beside_what_was_masked(tmp_path: Path, files: dict[str, Path]) -> None:
    requests = requests_from(replace(COUPLE, images=2, image=files["image"], mask=files["mask"]), "inpainting")
    written = write_pictures(tmp_path / "out.png", requests, torch.full((2, 64, 64, 3), 50, dtype=torch.uint8), title="EMA")
    pixels = np.asarray(Image.open(written))
    assert (pixels == 50).all(axis=2).sum() >= 2 * 128 * 128
    assert (pixels == 128).all(axis=2).sum() >= 56 * 56
