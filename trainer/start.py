"""Fine-tuning a pixel model: the first weights are those of another run or export of the same network."""

from pathlib import Path

from diffusers.models.unets.unet_2d import UNet2DModel
from jaxtyping import Float64
from torch import Tensor

from trainer.config_sections import Prediction
from trainer.diffusion.schedule import alpha_bar_sha256
from trainer.source import load_source


def load_start(module: UNet2DModel, start: Path, *, prediction: Prediction, alpha_bar: Float64[Tensor, " T"]) -> str:
    """Put the EMA weights of a run or export into a network that was just built; returns their sha256.

    Raises: ValueError if there is none, or it predicts something else, on other noise levels, or is of another shape."""
    source = load_source(start)
    found = source.descriptor
    wanted = {
        "objective.prediction": (found.prediction_type, prediction),
        "noise_schedule (sha256 of its levels)": (found.alpha_bar_sha256, alpha_bar_sha256(alpha_bar)),
        "noise levels": (found.step_count, len(alpha_bar)),
    }
    for name, (its, ours) in wanted.items():
        if its != ours:
            raise ValueError(
                f"model.start={start}: its {name} is {its}, this recipe's {ours}; fine-tune with the sections that it was trained with"
            )
    weights, own = source.model.state_dict(), module.state_dict()
    for name in sorted(weights.keys() | own.keys()):
        got, expected = (tuple(tensors[name].shape) if name in tensors else "missing" for tensors in (weights, own))
        if got != expected:
            raise ValueError(
                f"model.start={start}: its weight {name} is {got}, this recipe's model section makes {expected}; "
                f"take the model section of {start / 'recipe.yaml'}"
            )
    module.load_state_dict(weights)
    return source.weights_sha256
