"""LoRA files on stock pipelines."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.prompting.adapter import FILE_NAME, apply_lora, lora_file
from trainer.prompting.painters import painter
from trainer.prompting.pictures import PictureRequest, draw

MakePair = Callable[[], tuple[DiffusionPipeline, DiffusionPipeline]]
REQUEST = PictureRequest("a couple", 1, steps=2, guidance_scale=2.0)


def write_lora(path: Path, model: nn.Module, prefix: str, *, layers: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")) -> Path:
    """A LoRA of rank 2 for all attention layers in diffusers' keys, of one generator."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(layers):
            tensors[f"{prefix}.{name}.lora_A.weight"] = torch.randn((2, layer.in_features), generator=generator)
            tensors[f"{prefix}.{name}.lora_B.weight"] = torch.randn((layer.out_features, 2), generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


@torch.no_grad()
def add_products(model: nn.Module, file: Path, prefix: str, *, scale: float) -> None:
    """W + scale * B A by hand."""
    tensors = load_file(file)
    for name, layer in model.named_modules():
        if (key := f"{prefix}.{name}.lora_A.weight") in tensors:
            assert isinstance(layer, nn.Linear)
            layer.weight += scale * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_a_lora_counts_as_often_as_its_scale_says(text_pipeline: StableDiffusionPipeline, tmp_path: Path, scale: float) -> None:
    file = write_lora(tmp_path / FILE_NAME, text_pipeline.unet, "unet")
    x_t, text = torch.ones(1, 4, 8, 8), torch.ones(1, 4, 32)
    base = text_pipeline.unet(x_t, 500, text).sample
    apply_lora(text_pipeline, tmp_path, scale=scale)
    adapted = text_pipeline.unet(x_t, 500, text).sample
    text_pipeline.unload_lora_weights()
    add_products(text_pipeline.unet, file, "unet", scale=scale)
    assert torch.allclose(adapted, text_pipeline.unet(x_t, 500, text).sample, atol=1e-4)
    assert torch.allclose(adapted, base, atol=1e-6) == (scale == 0)


def test_a_lora_of_unet_and_text_encoder_changes_both(text_pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    base = draw(painter(text_pipeline), [REQUEST], batch_size=1)
    text_layers = ("q_proj", "v_proj")
    write_lora(tmp_path / "lora.safetensors", text_pipeline.text_encoder, "text_encoder", layers=text_layers)
    apply_lora(text_pipeline, tmp_path / "lora.safetensors")
    assert not torch.equal(draw(painter(text_pipeline), [REQUEST], batch_size=1), base)


@torch.no_grad()
def test_a_lora_of_wuerstchens_prior(make_wuerstchen: MakePair, tmp_path: Path) -> None:
    prior, _ = make_wuerstchen()
    inputs = torch.ones(1, 4, 3, 3), torch.ones(1), torch.ones(1, 4, 32)
    file = write_lora(tmp_path / FILE_NAME, prior.prior, "prior")
    apply_lora(prior, file, scale=0.5)
    by_hand, _ = make_wuerstchen()
    add_products(by_hand.prior, file, "prior", scale=0.5)
    assert torch.allclose(prior.prior(*inputs), by_hand.prior(*inputs), atol=1e-4)
    assert not torch.allclose(prior.prior(*inputs), make_wuerstchen()[0].prior(*inputs), atol=1e-2)


def test_loras_of_kandinsky(make_kandinsky: MakePair, tmp_path: Path) -> None:
    request = replace(REQUEST, size=(64, 64), decoder_steps=1)
    base = draw(painter(*make_kandinsky()), [request], batch_size=1)
    for number, (attribute, prefix) in enumerate((("prior", "prior"), ("unet", "unet"))):
        pair = make_kandinsky()
        file = write_lora(tmp_path / prefix / FILE_NAME, getattr(pair[number], attribute), prefix)
        apply_lora(pair[number], file)
        assert not torch.equal(draw(painter(*pair), [request], batch_size=1), base)
        with pytest.raises(ValueError, match="none of them for the Kandinsky"):
            apply_lora(pair[1 - number], file)


def test_a_file_for_another_model_is_refused(text_pipeline: StableDiffusionPipeline, make_wuerstchen: MakePair, tmp_path: Path) -> None:
    prior, decoder = make_wuerstchen()
    file = write_lora(tmp_path / FILE_NAME, prior.prior, "prior")
    with pytest.raises(ValueError, match=r"such as prior.*none of them for the StableDiffusionPipeline"):
        apply_lora(text_pipeline, file)
    with pytest.raises(ValueError, match="does not fit the WuerstchenDecoderPipeline"):
        apply_lora(decoder, file)
    wrong = {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 7)}
    wrong |= {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.ones(7, 2)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=r"does not fit the StableDiffusionPipeline(.|\n)*size mismatch"):
        apply_lora(text_pipeline, tmp_path / "wrong.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"plain\.safetensors does not fit"):
        apply_lora(text_pipeline, tmp_path / "plain.safetensors")


def test_the_file_is_found_in_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.safetensors file there"):
        lora_file(tmp_path)
    (tmp_path / "a.safetensors").touch()
    assert lora_file(tmp_path).name == "a.safetensors"
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(ValueError, match=r"2 \.safetensors files and no pytorch_lora"):
        lora_file(tmp_path)
    (tmp_path / FILE_NAME).touch()
    assert lora_file(tmp_path).name == FILE_NAME
    with pytest.raises(ValueError, match="not there"):
        lora_file(tmp_path / "c.safetensors")
    (tmp_path / "d.bin").touch()
    with pytest.raises(ValueError, match=r"is not a \.safetensors file"):
        lora_file(tmp_path / "d.bin")
    with pytest.raises(ValueError, match="not read as safetensors"):
        apply_lora(DiffusionPipeline(), tmp_path / "a.safetensors")
