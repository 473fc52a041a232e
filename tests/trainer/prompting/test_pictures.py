"""Drawing: what a stock pipeline draws of the same seed, whatever is drawn with it."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from PIL import Image
from torch import Generator, Tensor

from data_shards import ranks
from trainer.models.deprecated import WuerstchenCombinedPipeline
from trainer.prompting.painters import painter
from trainer.prompting.pictures import PictureRequest, Tick, draw, draw_on_ranks
from trainer.prompting.samplers import choose_sampler

MakePair = Callable[[], tuple[DiffusionPipeline, DiffusionPipeline]]


def request(seed: int, prompt: str = "a couple", **settings: object) -> PictureRequest:
    return replace(PictureRequest(prompt, seed, guidance_scale=5.0, steps=2), **settings)  # pyright: ignore[reportArgumentType]


def difference(one: Tensor, other: Tensor | Image.Image) -> int:
    second = other.numpy() if isinstance(other, Tensor) else np.asarray(other)
    return int(np.abs(one.numpy().astype(int) - second.astype(int)).max())


def stock(pipeline: object) -> Callable[..., SimpleNamespace]:
    """A pipeline, whose calls are annotated as returning tuples too."""
    return cast("Callable[..., SimpleNamespace]", pipeline)


def generator(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def test_a_picture_is_what_a_plain_call_of_the_pipeline_draws(text_pipeline: StableDiffusionPipeline) -> None:
    choose_sampler(text_pipeline, "ddpm")
    drawn = draw(painter(text_pipeline), [request(7), request(8, "a woman", negative_prompt="a hat")], batch_size=1)
    first = stock(text_pipeline)("a couple", num_inference_steps=2, guidance_scale=5.0, generator=generator(7)).images[0]
    second = stock(text_pipeline)(
        "a woman", negative_prompt="a hat", num_inference_steps=2, guidance_scale=5.0, generator=generator(8)
    ).images[0]
    assert np.array_equal(drawn[0].numpy(), np.asarray(first))
    assert np.array_equal(drawn[1].numpy(), np.asarray(second))


def test_what_is_not_said_is_the_pipelines_own_default(text_pipeline: StableDiffusionPipeline) -> None:
    choose_sampler(text_pipeline, "ddim")
    drawn = draw(painter(text_pipeline), [PictureRequest("a couple", 3, steps=2)], batch_size=1)
    assert np.array_equal(
        drawn[0].numpy(), np.asarray(stock(text_pipeline)("a couple", num_inference_steps=2, generator=generator(3)).images[0])
    )


def test_a_picture_depends_on_its_own_request_alone(text_pipeline: StableDiffusionPipeline) -> None:
    choose_sampler(text_pipeline, "ddpm")
    paint = painter(text_pipeline)
    requests = [request(1), request(2, "a woman", guidance_scale=2.0), request(3, negative_prompt="a hat"), request(4), request(5)]
    together = draw(paint, requests, batch_size=2)
    backwards = draw(paint, requests[::-1], batch_size=5).flip(0)
    alone = torch.cat([draw(paint, [each], batch_size=1) for each in requests])
    assert difference(together, backwards) <= 1
    assert difference(together, alone) <= 1
    assert difference(together[0], together[3]) > 20


def test_every_step_ticks(text_pipeline: StableDiffusionPipeline) -> None:
    choose_sampler(text_pipeline, "ddim")
    ticks: list[None] = []
    draw(painter(text_pipeline), [request(1), request(2), request(3)], batch_size=2, tick=lambda: ticks.append(None))
    assert len(ticks) == 2 * 2


def test_inpainting_draws_what_its_stock_pipeline_draws(
    inpainting_pipeline: StableDiffusionInpaintPipeline, picture: Image.Image, mask: Image.Image
) -> None:
    paint = painter(inpainting_pipeline)
    requests = [request(seed, image=picture, mask=mask) for seed in (1, 2)]
    drawn = draw(paint, requests, batch_size=2)
    image = stock(inpainting_pipeline)(
        "a couple", image=picture, mask_image=mask, num_inference_steps=2, guidance_scale=5.0, generator=generator(2)
    ).images[0]
    assert difference(drawn[1], image) <= 1
    assert difference(drawn[0], drawn[1]) > 20
    small = draw(paint, [replace(requests[0], size=(32, 48))], batch_size=1)
    assert small.shape == (1, 32, 48, 3)


def test_wuerstchen_draws_what_its_combined_pipeline_draws(make_wuerstchen: MakePair) -> None:
    prior, decoder = make_wuerstchen()
    both = {"size": (128, 128), "decoder_steps": 2}
    requests = [request(1, **both), request(2, **both), request(3, "a woman", **both)]
    drawn = draw(painter(prior, decoder), requests, batch_size=3)
    combined = WuerstchenCombinedPipeline(**decoder.components, **{f"prior_{name}": part for name, part in prior.components.items()})
    settings = {"height": 128, "width": 128, "prior_num_inference_steps": 2, "num_inference_steps": 2, "prior_guidance_scale": 5.0}
    for number, (prompt, seed) in enumerate([("a couple", 1), ("a couple", 2), ("a woman", 3)]):
        image = stock(combined)(prompt, generator=generator(seed), **settings).images[0]
        assert difference(drawn[number], image) <= 1
        assert difference(draw(painter(prior, decoder), [requests[number]], batch_size=1)[0], image) == 0
    assert difference(drawn[0], drawn[1]) > 5


@pytest.mark.parametrize("negative", [None, "a hat"])
def test_kandinsky_draws_what_its_two_pipelines_draw(make_kandinsky: MakePair, negative: str | None) -> None:
    prior, decoder = make_kandinsky()
    both = {"size": (64, 64), "decoder_steps": 2, "negative_prompt": negative}
    drawn = draw(painter(prior, decoder), [request(1, **both), request(2, "a woman", **both)], batch_size=2)
    own = generator(2)
    embeds = stock(prior)("a woman", negative_prompt=negative, num_inference_steps=2, guidance_scale=5.0, generator=own)
    found = stock(decoder)(embeds.image_embeds, embeds.negative_image_embeds, height=64, width=64, num_inference_steps=2, generator=own)
    assert difference(drawn[1], found.images[0]) <= 1
    assert difference(drawn[0], drawn[1]) > 5


def counted(calls: list[int]) -> Callable[[list[PictureRequest], list[Generator], Tick], Tensor]:
    """A painter of one pixel, the seed, that notes how many it is asked for."""

    def paint(requests: list[PictureRequest], generators: list[Generator], tick: Tick) -> Tensor:
        calls.append(len(requests))
        return torch.tensor([each.seed for each in requests], dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 1, 3)

    return paint


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_draw_shares_in_equally_many_calls(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    """Every rank in turn, each told of the others' shares as a gather would."""
    requests = [request(seed, steps=2 + (seed == 3)) for seed in range(6)]
    shares: list[list[Tensor]] = []
    calls: list[list[int]] = []
    monkeypatch.setattr(ranks, "world_size", lambda: world_size)
    for number in range(world_size):
        monkeypatch.setattr(ranks, "rank", lambda number=number: number)
        kept: list[Tensor] = []
        monkeypatch.setattr(
            ranks, "all_gather_tensor", lambda part, kept=kept: (kept.append(part), part.expand(world_size, *part.shape))[1]
        )
        calls.append([])
        draw_on_ranks(counted(calls[-1]), requests, batch_size=2)  # pyright: ignore[reportArgumentType]
        shares.append(kept)
    assert all(each == calls[0] for each in calls)
    gathers = iter([torch.stack([share[group] for share in shares]) for group in range(2)])
    monkeypatch.setattr(ranks, "all_gather_tensor", lambda part: next(gathers))
    whole = draw_on_ranks(counted([]), requests, batch_size=2)  # pyright: ignore[reportArgumentType]
    assert whole[:, 0, 0, 0].tolist() == list(range(6))


def test_no_prompt_or_several_sizes_are_refused(text_pipeline: StableDiffusionPipeline) -> None:
    paint = painter(text_pipeline)
    with pytest.raises(ValueError, match="no prompt"):
        draw(paint, [], batch_size=1)
    with pytest.raises(ValueError, match=r"32x32 and 64x64 pixels.*one size"):
        draw(paint, [request(1, size=(32, 32)), request(2)], batch_size=1)


def test_pipelines_that_do_not_go_together_are_refused(make_wuerstchen: MakePair, text_pipeline: StableDiffusionPipeline) -> None:
    prior, _ = make_wuerstchen()
    with pytest.raises(ValueError, match="WuerstchenPriorPipeline does not draw"):
        painter(prior)
    with pytest.raises(ValueError, match="with StableDiffusionPipeline does not draw"):
        painter(prior, text_pipeline)


def test_rescaled_guidance_is_refused_where_it_would_be_ignored(make_wuerstchen: MakePair) -> None:
    with pytest.raises(ValueError, match=r"guidance_rescale=0\.7"):
        draw(painter(*make_wuerstchen()), [request(1, guidance_rescale=0.7)], batch_size=1)
