"""Random weights, the same for the same seed, that let every input have an effect."""

import torch
from torch import nn
from torch.nn import functional

from data_shards.encoders.efficient_net import EfficientNetEncoder
from trainer.architectures import Component
from trainer.models.deprecated import PriorTransformer, WuerstchenPrior
from trainer.models.from_config import build_model

_STD = 0.02
_BRANCH = 0.1


def random_model(component: Component, *, seed: int) -> nn.Module:
    """The model with random weights, for evaluation; those that start at zero are drawn too.

    Outside of it no random number is drawn."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build_model(component)
        for name, weight in model.named_parameters():
            # a scalar gate of a residual branch, as Paella's gammas are, would else shut the branch
            if (weight.dim() > 1 or name.endswith("gammas")) and not weight.any():
                nn.init.normal_(weight, std=_STD)
        match model:
            case PriorTransformer():
                nn.init.ones_(model.clip_std)
            case WuerstchenPrior():
                # It puts out (x - a) / |1 - b|: a random b comes near 1 somewhere, and everything after it is rounding.
                for parameter in model.out.parameters():
                    parameter.mul_(_BRANCH)
            case EfficientNetEncoder():
                _calibrate(model)
            case _:
                pass
    return model.eval()


def _calibrate(model: EfficientNetEncoder) -> None:
    """Let the statistics of batch norms be those of random images: without it 40 random layers shrink every image to nothing.

    Residual branches are turned down, so that images unlike those stay within some ten times their spread."""
    for stage in list(model.backbone.children())[1:-1]:
        for block in list(stage.children())[1:]:
            nn.init.constant_(_batch_norms(block)[-1].weight, _BRANCH)
    for norm in _batch_norms(model):
        norm.momentum = None  # what is seen now, not mixed with what was before
    model.train()
    coarse = [torch.randn(8, 3, cells, cells) for cells in (1, 4, 16, 64)]
    model(torch.cat([functional.interpolate(image, 64, mode="bilinear") for image in coarse]))


def _batch_norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
