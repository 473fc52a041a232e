"""Activations computed again give the gradients of activations kept."""

from unittest.mock import patch

import pytest
import torch
import torch.utils.checkpoint
from diffusers.models.transformers.prior_transformer import PriorTransformer
from torch import Tensor

from trainer.config import TinyUNetConfig
from trainer.models.activation_checkpointing import enable_activation_checkpointing
from trainer.models.tiny_unet import build_tiny_unet

TINY = TinyUNetConfig(channels=(16, 32), attention=(False, True), attention_heads=2, norm_groups=4, dropout=0.3)


def gradients(*, checkpointing: bool) -> tuple[list[Tensor], int]:
    """Gradients of a network with dropout, and how many blocks were computed again."""
    torch.manual_seed(0)
    model, images = build_tiny_unet(TINY, 8).train(), torch.randn(2, 3, 8, 8)
    if checkpointing:
        enable_activation_checkpointing(model)
    torch.manual_seed(1)
    with patch("torch.utils.checkpoint.checkpoint", wraps=torch.utils.checkpoint.checkpoint) as counted:
        model(images, torch.tensor([3.0, 700.0])).sample.square().mean().backward()
    assert all(call.kwargs == {"use_reentrant": False} for call in counted.call_args_list)
    found = [parameter.grad for parameter in model.parameters()]
    return [gradient for gradient in found if gradient is not None], counted.call_count


def test_gradients_keep_their_bits_dropout_included() -> None:
    (kept, none), (again, blocks) = gradients(checkpointing=False), gradients(checkpointing=True)
    assert none == 0 and blocks > 4
    assert len(kept) == len(again) > 50
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


def test_a_model_without_it_is_named() -> None:
    model = PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=12, num_embeddings=5)
    with pytest.raises(ValueError, match=r"diffusers has none for PriorTransformer; set train\.activation_checkpointing=false"):
        enable_activation_checkpointing(model)
