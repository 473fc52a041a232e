"""Pipelines from folders: which load, and as what; which are refused before anything of them is read."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline

from trainer.prompting.folder import is_pipeline_folder, load_pipeline, load_with_decoder, reads
from trainer.prompting.painters import painter
from trainer.prompting.pictures import PictureRequest, draw

MakePair = Callable[[], tuple[DiffusionPipeline, DiffusionPipeline]]
CPU = torch.device("cpu")


@pytest.fixture
def copied(text_folder: Path, tmp_path: Path) -> Path:
    """A folder that may be changed."""
    return Path(shutil.copytree(text_folder, tmp_path / "copy"))


def edit_index(folder: Path, **changes: object) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **changes}))


def test_a_folder_is_loaded_as_from_pretrained_loads_it(
    text_folder: Path, loaded_text_pipeline: StableDiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = load_pipeline(text_folder, device=CPU)
    assert not [record for record in caplog.records if "safety" in record.message]
    assert type(loaded) is StableDiffusionPipeline and reads(loaded) == "text"
    requests = [PictureRequest("a couple", 1, steps=2)]
    assert torch.equal(draw(painter(loaded), requests, batch_size=1), draw(painter(loaded_text_pipeline), requests, batch_size=1))


def test_an_inpainting_folder_reads_image_and_mask(inpainting_folder: Path) -> None:
    loaded = load_pipeline(inpainting_folder, device=CPU)
    assert type(loaded) is StableDiffusionInpaintPipeline and reads(loaded) == "inpainting"
    with pytest.raises(ValueError, match="give --image FILE and --mask FILE"):
        draw(painter(loaded), [PictureRequest("a couple", 1)], batch_size=1)


def test_a_safety_checker_is_left_out_though_the_folder_names_one(copied: Path) -> None:
    edit_index(copied, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    loaded = load_pipeline(copied, device=CPU)
    assert loaded.components["safety_checker"] is None


@pytest.mark.parametrize("library", ["diffusers", "wuerstchen"])
def test_wuerstchens_folders_load_whatever_library_they_name(make_wuerstchen: MakePair, tmp_path: Path, library: str) -> None:
    prior, decoder = make_wuerstchen()
    prior.save_pretrained(tmp_path / "prior")
    decoder.save_pretrained(tmp_path / "decoder")
    edit_index(tmp_path / "prior", prior=[library, "WuerstchenPrior"])
    requests = [PictureRequest("a couple", 1, steps=1, decoder_steps=1, size=(128, 128))]
    wanted = draw(painter(prior, decoder), requests, batch_size=1)
    for first, second in (("prior", "decoder"), ("decoder", "prior")):
        loaded = load_with_decoder(tmp_path / first, tmp_path / second, device=CPU)
        assert torch.equal(draw(painter(*loaded), requests, batch_size=1), wanted)


def test_kandinskys_folders_load(make_kandinsky: MakePair, tmp_path: Path) -> None:
    prior, decoder = make_kandinsky()
    prior.save_pretrained(tmp_path / "prior")
    decoder.save_pretrained(tmp_path / "decoder")
    requests = [PictureRequest("a couple", 1, steps=2, decoder_steps=1, size=(64, 64))]
    wanted = draw(painter(prior, decoder), requests, batch_size=1)
    loaded = load_with_decoder(tmp_path / "prior", tmp_path / "decoder", device=CPU)
    assert torch.equal(draw(painter(*loaded), requests, batch_size=1), wanted)
    with pytest.raises(ValueError, match="draws together with a KandinskyV22Pipeline; give that one's folder"):
        load_with_decoder(tmp_path / "prior", device=CPU)
    with pytest.raises(ValueError, match=r"is a KandinskyV22PriorPipeline.*wanted a KandinskyV22Pipeline"):
        load_with_decoder(tmp_path / "prior", tmp_path / "prior", device=CPU)


def test_a_second_folder_of_no_use_is_refused(text_folder: Path, inpainting_folder: Path) -> None:
    assert load_with_decoder(text_folder, device=CPU)[1] is None
    with pytest.raises(ValueError, match=r"draws on its own; leave .*inpainting out"):
        load_with_decoder(text_folder, inpainting_folder, device=CPU)


def test_a_folder_is_known_by_its_pipelines_class(text_folder: Path, copied: Path, tmp_path: Path) -> None:
    assert is_pipeline_folder(text_folder)
    edit_index(copied, _class_name="DDPMPipeline")
    assert not is_pipeline_folder(copied)
    assert not is_pipeline_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"_class_name": "FluxPipeline"}, "a FluxPipeline does not draw prompts here; wanted one of StableDiffusionPipeline"),
        ({"_class_name": ["my_code", "MyPipeline"]}, "does not draw prompts here"),
        ({"unet": ["my_code", "UNet2DConditionModel"]}, "unet is .*my_code"),
        ({"unet": ["diffusers", "MyUNet"]}, "unet is .*MyUNet"),
        ({"unet": ["os", "system"]}, "wanted a class of diffusers or transformers"),
        ({"../evil": ["diffusers", "UNet2DConditionModel"]}, "there is no folder"),
        ({"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}, "no folder image_encoder/"),
    ],
)
def test_strange_parts_are_refused(copied: Path, changes: dict[str, object], complaint: str) -> None:
    edit_index(copied, **changes)
    with pytest.raises(ValueError, match=complaint):
        load_pipeline(copied, device=CPU)


def test_pickles_and_damage_are_refused(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model_index\.json there"):
        load_pipeline(tmp_path, device=CPU)
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not read as StableDiffusionPipeline"):
        load_pipeline(copied, device=CPU)
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"only diffusion_pytorch_model\.bin, which could run code"):
        load_pipeline(copied, device=CPU)
