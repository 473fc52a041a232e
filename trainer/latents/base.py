"""A base on this machine: the folder of its pipeline, its parts, and the noise schedule that it was trained on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, final

from jaxtyping import Float64
from torch import Tensor

from data_shards.encoders.files import ModelFiles, find_model
from trainer.config_sections import Prediction
from trainer.diffusion.schedule import alpha_bar_of_scheduler, zero_terminal_snr
from trainer.stock import SCHEDULER, scheduler_of

_PREDICTIONS: Mapping[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}


@final
@dataclass(frozen=True, eq=False)
class Levels:
    """A base's noise levels and what it puts out at each."""

    alpha_bar: Float64[Tensor, " T"]
    prediction: Prediction


def find_part(base: str, part: str, *, revision: str | None) -> ModelFiles:
    """A part of a pipeline, such as unet, from a folder or the Hub.

    Raises: ValueError if there is none, or none of safetensors."""
    return find_model(base, part=part, revision=revision)


def scheduler_config(files: ModelFiles) -> dict[str, object]:
    """The configuration of the scheduler beside a part, in a folder of its own or, as early pipelines had it, beside model_index.json.

    Raises: ValueError if there is none."""
    found = scheduler_of(files.root)
    if found is None:
        path = files.root / "scheduler" / SCHEDULER
        raise ValueError(f"{path} is missing, which says on what noise levels the base was trained; give a whole pipeline in model.base")
    return found


def base_levels(
    scheduler: Mapping[str, object], *, prediction: Literal["base", "v", "eps", "x_0"] = "base", zero_terminal: bool = False
) -> Levels:
    """The noise levels of a base's scheduler_config.json.

    prediction: other than the base's own; zero_terminal: with a last level of noise alone.

    Raises: ValueError for a prediction that is not known, or eps at zero signal."""
    own = scheduler.get("prediction_type", "epsilon")
    if own not in _PREDICTIONS:
        raise ValueError(f"scheduler_config.json: prediction_type is {own!r:.40}, wanted one of {', '.join(_PREDICTIONS)}")
    chosen = _PREDICTIONS[cast("str", own)] if prediction == "base" else prediction
    alpha_bar = alpha_bar_of_scheduler(scheduler)
    if zero_terminal and float(alpha_bar[-1]) > 0:
        alpha_bar = zero_terminal_snr(alpha_bar)
    if zero_terminal and chosen == "eps":
        raise ValueError(
            "objective.zero_terminal_snr=true: the base predicts eps, which says nothing about the image where there is noise alone; "
            "set objective.prediction=v to teach it another prediction, or objective.zero_terminal_snr=false"
        )
    return Levels(alpha_bar, chosen)
