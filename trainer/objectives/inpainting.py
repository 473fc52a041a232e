"""Inpainting: how much an error counts inside the mask and outside it."""

import torch
from jaxtyping import Float
from torch import Tensor


def mask_weight(mask: Float[Tensor, "b 1 h w"], *, inside: float, outside: float = 1.0) -> Float[Tensor, "b 1 h w"]:
    """Factors of squared errors for `squared_error`: `inside` where the mask is 1, `outside` where it is 0, over their mean per image.

    mask: 0 .. 1 on the latent's grid; 1: painted. A mean of 1 keeps the loss's scale whatever the mask's area; a full or an empty mask
    gives 1 everywhere, also where the only weight that it has is 0. inside = outside is the plain loss over the whole latent.
    Raises: ValueError for negative weights or two zeros."""
    if min(inside, outside) < 0 or max(inside, outside) == 0:
        raise ValueError(f"mask weights are inside={inside}, outside={outside}; wanted none below 0 and one above it")
    weight = inside * mask + outside * (1 - mask)  # of 0.001 and 9 no difference is taken, which would lose the smaller one's digits
    mean = weight.flatten(1).mean(1).view(-1, 1, 1, 1)
    return torch.where(mean > 0, weight / torch.where(mean > 0, mean, 1.0), 1.0)
