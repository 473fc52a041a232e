"""A pipeline with a stand-in draws, bit for bit, what it draws with the network itself."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from trainer.prompting.engine_stand_in import (
    stand_in_for_inpainting_unet,
    stand_in_for_kandinsky_decoder,
    stand_in_for_kandinsky_prior,
    stand_in_for_unet,
    stand_in_for_wuerstchen_prior,
)
from trainer.prompting.painters import painter
from trainer.prompting.pictures import PictureRequest, draw
from trainer.prompting.samplers import choose_sampler

MakePair = Callable[[], tuple[DiffusionPipeline, DiffusionPipeline]]
CPU = torch.device("cpu")
REQUESTS = [PictureRequest("a couple", 1, guidance_scale=5.0, steps=2), PictureRequest("a woman", 2, guidance_scale=5.0, steps=2)]


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("sampler", ["pndm", "euler"])
def test_text_to_image(text_pipeline: StableDiffusionPipeline, guidance_scale: float, sampler: str) -> None:
    choose_sampler(text_pipeline, sampler)
    requests = [replace(request, guidance_scale=guidance_scale) for request in REQUESTS]
    stock = draw(painter(text_pipeline), requests, batch_size=2)
    unet, seen = text_pipeline.unet, list[tuple[Tensor, Tensor]]()

    def predict(x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        seen.append((x_t, timestep))
        assert cond.keys() == {"text"} and len(cond["text"]) == len(x_t) == len(timestep)
        return unet(x_t, timestep, encoder_hidden_states=cond["text"]).sample

    ticks: list[None] = []
    text_pipeline.unet = stand_in_for_unet(unet, predict, device=CPU, tick=lambda: ticks.append(None))
    assert torch.equal(draw(painter(text_pipeline), requests, batch_size=2), stock)
    assert len(ticks) == len(seen) > 1
    assert all(timestep.dtype == x_t.dtype == torch.float32 for x_t, timestep in seen)
    assert {len(x_t) for x_t, _ in seen} == {2 if guidance_scale == 1 else 4}


def test_inpainting(inpainting_pipeline: StableDiffusionInpaintPipeline, picture: Image.Image, mask: Image.Image) -> None:
    requests = [replace(request, image=picture, mask=mask) for request in REQUESTS]
    stock = draw(painter(inpainting_pipeline), requests, batch_size=2)
    unet = inpainting_pipeline.unet

    def predict(x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        assert x_t.shape[1] == 4 and cond["mask"].shape[1] == 1 and cond["masked_latents"].shape[1] == 4
        assert set(cond["mask"].unique().tolist()) == {0.0, 1.0}
        channels = torch.cat([x_t, cond["mask"], cond["masked_latents"]], dim=1)
        return unet(channels, timestep, encoder_hidden_states=cond["text"]).sample

    inpainting_pipeline.unet = stand_in_for_inpainting_unet(unet, predict, device=CPU, tick=lambda: None)
    assert torch.equal(draw(painter(inpainting_pipeline), requests, batch_size=2), stock)


def test_a_pipeline_can_be_built_around_a_stand_in(text_pipeline: StableDiffusionPipeline) -> None:
    stock = draw(painter(text_pipeline), REQUESTS, batch_size=2)
    unet = text_pipeline.unet
    stand_in = stand_in_for_unet(
        unet, lambda x_t, timestep, cond: unet(x_t, timestep, encoder_hidden_states=cond["text"]).sample, device=CPU, tick=lambda: None
    )
    built = StableDiffusionPipeline(**{**text_pipeline.components, "unet": stand_in}, requires_safety_checker=False)
    assert torch.equal(draw(painter(built), REQUESTS, batch_size=2), stock)


def test_stable_diffusion_xl(xl_pipeline: StableDiffusionXLPipeline) -> None:
    stock = draw(painter(xl_pipeline), REQUESTS, batch_size=2)
    unet = xl_pipeline.unet

    def predict(x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
        return unet(x_t, timestep, encoder_hidden_states=cond["text"], added_cond_kwargs=added).sample

    xl_pipeline.unet = stand_in_for_unet(unet, predict, device=CPU, tick=lambda: None)
    assert torch.equal(draw(painter(xl_pipeline), REQUESTS, batch_size=2), stock)


def test_wuerstchens_prior(make_wuerstchen: MakePair) -> None:
    prior, decoder = make_wuerstchen()
    requests = [replace(request, size=(128, 128), decoder_steps=1) for request in REQUESTS]
    stock = draw(painter(prior, decoder), requests, batch_size=2)
    network = prior.prior

    def predict(x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        assert 0 < timestep.min() <= timestep.max() <= 1
        return network(x_t, timestep, cond["text"])

    prior.prior = stand_in_for_wuerstchen_prior(network, predict, device=CPU, tick=lambda: None)
    assert torch.equal(draw(painter(prior, decoder), requests, batch_size=2), stock)


def test_kandinskys_prior_and_decoder(make_kandinsky: MakePair) -> None:
    prior, decoder = make_kandinsky()
    requests = [replace(request, size=(64, 64), decoder_steps=2) for request in REQUESTS]
    stock = draw(painter(prior, decoder), requests, batch_size=2)
    network, unet = prior.prior, decoder.unet

    def embed(x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        states = {"proj_embedding": cond["pooled"], "encoder_hidden_states": cond["text"], "attention_mask": cond["text_mask"]}
        return network(x_t, timestep, **states).predicted_image_embedding

    def predict(x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return unet(x_t, timestep, None, added_cond_kwargs={"image_embeds": cond["image"]}).sample

    prior.prior = stand_in_for_kandinsky_prior(network, embed, device=CPU, tick=lambda: None)
    decoder.unet = stand_in_for_kandinsky_decoder(unet, predict, device=CPU, tick=lambda: None)
    assert torch.equal(draw(painter(prior, decoder), requests, batch_size=2), stock)
    decoder.unet = stand_in_for_kandinsky_decoder(unet, lambda *inputs: predict(*inputs)[:, :4], device=CPU, tick=lambda: None)
    with pytest.raises(AssertionError, match="takes 8 channels, not 4"):
        draw(painter(prior, decoder), requests, batch_size=2)
