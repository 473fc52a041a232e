"""What stands in a stock pipeline for its network while a model trains: it calls the engine, which may have it sharded over ranks."""

from collections.abc import Callable, Mapping
from typing import final

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from trainer.models.deprecated import PriorTransformer, WuerstchenPrior
from trainer.models.network import Network
from trainer.prompting.pictures import Tick

MASK_CHANNELS = 1


@final
class EngineStandIn:
    """A pipeline's `unet` or `prior`: called as the real one is, and with those of its attributes that pipelines read."""

    def __init__(
        self,
        forward: Callable[..., object],
        *,
        config: Mapping[str, object],
        device: torch.device,
        add_embedding: nn.Module | None = None,
        post_process_latents: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """forward: takes a pipeline's arguments and returns what the pipeline expects of its network."""
        self._forward = forward
        self.config = config
        self.device = device
        self.dtype = torch.float32
        self.add_embedding = add_embedding
        self.post_process_latents = post_process_latents

    def __call__(self, *inputs: object, **named: object) -> object:
        """Collective where the engine's network is."""
        return self._forward(*inputs, **named)


@final
class PriorOutput:
    """What Kandinsky's prior pipeline reads of its network's output."""

    def __init__(self, predicted_image_embedding: Tensor) -> None:
        self.predicted_image_embedding = predicted_image_embedding


def stand_in_for_unet(unet: UNet2DConditionModel, predict: Network, *, device: torch.device, tick: Tick) -> EngineStandIn:
    """For StableDiffusionPipeline: predict(x_t, timestep, cond) with cond {"text"}.

    Also for StableDiffusionXLPipeline, then with "pooled" and "time_ids", and for a U-Net of 4 channels that inpaints.
    unet: its configuration is read, it is not run. The doubled batch of guidance is passed on as one batch."""

    def forward(sample: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, **others: object) -> tuple[Tensor]:
        tick()
        cond = {"text": encoder_hidden_states, **_added(others)}
        return (predict(sample.float(), _timesteps(timestep, sample), cond).to(sample.dtype),)

    return EngineStandIn(forward, config=unet.config, device=device, add_embedding=getattr(unet, "add_embedding", None))


def stand_in_for_inpainting_unet(unet: UNet2DConditionModel, predict: Network, *, device: torch.device, tick: Tick) -> EngineStandIn:
    """For StableDiffusionInpaintPipeline and a U-Net of 9 channels: cond is {"text", "mask", "masked_latents"}, x_t the first 4 of them."""
    channels = (int(unet.config["in_channels"]) - MASK_CHANNELS) // 2

    def forward(sample: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, **others: object) -> tuple[Tensor]:
        tick()
        _assert_none(others)
        x_t, mask, masked_latents = sample.float().split([channels, MASK_CHANNELS, channels], dim=1)
        cond = {"text": encoder_hidden_states, "mask": mask, "masked_latents": masked_latents}
        return (predict(x_t, _timesteps(timestep, sample), cond).to(sample.dtype),)

    return EngineStandIn(forward, config=unet.config, device=device)


def stand_in_for_wuerstchen_prior(prior: WuerstchenPrior, predict: Network, *, device: torch.device, tick: Tick) -> EngineStandIn:
    """For WuerstchenPriorPipeline: cond is {"text"}, timestep in [0, 1]."""

    def forward(sample: Tensor, *, r: Tensor, c: Tensor) -> Tensor:
        tick()
        return predict(sample.float(), r.float(), {"text": c}).to(sample.dtype)

    return EngineStandIn(forward, config=prior.config, device=device)


def stand_in_for_kandinsky_prior(
    prior: PriorTransformer,
    predict: Network,
    *,
    device: torch.device,
    tick: Tick,
    post_process_latents: Callable[[Tensor], Tensor] | None = None,
) -> EngineStandIn:
    """For KandinskyV22PriorPipeline: cond is {"text", "pooled", "text_mask"}, x_t [b d].

    post_process_latents: embeddings back to CLIP's scale; None for the prior's own, which needs its clip_mean and clip_std whole."""

    def forward(
        sample: Tensor, *, timestep: Tensor, proj_embedding: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor
    ) -> PriorOutput:
        tick()
        cond = {"text": encoder_hidden_states, "pooled": proj_embedding, "text_mask": attention_mask}
        return PriorOutput(predict(sample.float(), _timesteps(timestep, sample), cond).to(sample.dtype))

    return EngineStandIn(
        forward, config=prior.config, device=device, post_process_latents=post_process_latents or prior.post_process_latents
    )


def stand_in_for_kandinsky_decoder(unet: UNet2DConditionModel, predict: Network, *, device: torch.device, tick: Tick) -> EngineStandIn:
    """For KandinskyV22Pipeline: cond is {"image"}, CLIP's image embeddings; predict returns all 8 channels, noise and variance."""
    wanted = unet.config["out_channels"]

    def forward(
        *, sample: Tensor, timestep: Tensor, encoder_hidden_states: None, added_cond_kwargs: Mapping[str, Tensor], return_dict: bool
    ) -> tuple[Tensor]:
        tick()
        prediction = predict(sample.float(), _timesteps(timestep, sample), {"image": added_cond_kwargs["image_embeds"]})
        assert prediction.shape[1] == wanted, f"the decoder's pipeline takes {wanted} channels, not {prediction.shape[1]}"
        return (prediction.to(sample.dtype),)

    return EngineStandIn(forward, config=unet.config, device=device)


def _timesteps(timestep: Tensor, sample: Tensor) -> Tensor:
    """A pipeline's one timestep for every image of the batch, as float."""
    return timestep.to(sample.device, torch.float32).expand(len(sample))


def _added(others: Mapping[str, object]) -> dict[str, Tensor]:
    """What an XL pipeline adds to the text; nothing for the others."""
    added = others.get("added_cond_kwargs")
    _assert_none({name: value for name, value in others.items() if name != "added_cond_kwargs"})
    if added is None:
        return {}
    assert isinstance(added, dict) and added.keys() == {"text_embeds", "time_ids"}, f"unknown conditioning: {added}"
    return {"pooled": added["text_embeds"], "time_ids": added["time_ids"]}


def _assert_none(others: Mapping[str, object]) -> None:
    """A trained model does not take adapters' scales, images or a guidance embedding; no pipeline passes any on its own."""
    strange = {name: value for name, value in others.items() if name != "return_dict" and value is not None}
    assert not strange, f"a training model takes no {', '.join(strange)}"
