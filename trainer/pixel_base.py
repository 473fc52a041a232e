"""What a stock pixel model says of itself: the shape of its U-Net, the noise levels of its scheduler and how it is sampled."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn, final

from jaxtyping import Float64
from torch import Tensor

from trainer.config_sections import NoiseScheduleConfig, Prediction, PredictionOrBase, Sampler
from trainer.diffusion.sampler import Variance
from trainer.diffusion.schedule import build_alpha_bar
from trainer.latents.base import Levels, base_levels

UNET_CLASS = "UNet2DModel"
_SAMPLERS: Mapping[object, Sampler] = {"DDPMScheduler": "ancestral", "DDIMScheduler": "ddim"}
# fixed_small_log is the same variance by way of its logarithm
_VARIANCES: Mapping[object, Variance] = {"fixed_small": "fixed_small", "fixed_small_log": "fixed_small", "fixed_large": "fixed_large"}
_SPACINGS = ("leading", "linspace", "trailing")
_MOST_DIFFERENCE = 1e-9
"""Of two tables of alpha_bar that are the same: rounding in fp64."""


@final
@dataclass(frozen=True)
class PixelBase:
    """A stock UNet2DModel and its scheduler by their configs, as they were found; what is not known here is refused when it is made."""

    sha256: str
    """Of the U-Net: of its config and the bytes of its weights."""
    unet: Mapping[str, object]
    """config.json, without what libraries note of themselves."""
    scheduler: Mapping[str, object]
    """scheduler_config.json; its class says the sampler."""

    def __post_init__(self) -> None:
        self._check_unet()
        self._check_scheduler()

    @cached_property
    def levels(self) -> Levels:
        """The noise levels that it was trained on, and what it predicts."""
        return base_levels(self.scheduler)

    @property
    def sampler(self) -> Sampler:
        """ancestral for DDPM's scheduler, ddim for DDIM's."""
        return _SAMPLERS[self.scheduler.get("_class_name")]

    @property
    def variance(self) -> Variance:
        """Of the ancestral sampler's noise; DDIM's scheduler has no say in it."""
        return _VARIANCES[self.scheduler.get("variance_type", "fixed_small")]

    @property
    def clip(self) -> bool:
        """Whether x_0 is clipped to [-1, 1] at every sampling step."""
        return bool(self.scheduler.get("clip_sample", True))

    @property
    def image_size(self) -> int:
        """Pixels a side that it was trained on."""
        match self.unet.get("sample_size"):
            case int(side) | [int(side), _]:
                return side
        self._refuse_unet("sample_size", "a number of pixels")

    @property
    def channels(self) -> int:
        """Of an image."""
        channels = self.unet.get("in_channels", 3)
        assert isinstance(channels, int), "checked when it was made"
        return channels

    def prediction(self, asked: PredictionOrBase) -> Prediction:
        """What the network puts out, which a recipe may leave to the base.

        Raises: ValueError if the recipe says another."""
        own = self.levels.prediction
        if asked not in ("base", own):
            raise ValueError(f"objective.prediction={asked}: the base predicts {own}; set objective.prediction=base")
        return own

    def alpha_bar(self, asked: NoiseScheduleConfig) -> Float64[Tensor, " T"]:
        """Its noise levels, which a recipe may leave to the base.

        Raises: ValueError if the recipe says others, or leaves a number of levels to the base that is not the usual one."""
        own = self.levels.alpha_bar
        if asked.kind == "base" and asked.steps != len(own):
            betas = f"{{kind: linear, steps: {len(own)}, beta_start: ..., beta_end: ...}}"
            raise ValueError(f"noise_schedule.kind=base: means {asked.steps} levels, the base has {len(own)}; set noise_schedule={betas}")
        if asked.kind != "base":
            given = build_alpha_bar(asked)
            if len(given) != len(own) or float((given - own).abs().max()) > _MOST_DIFFERENCE:
                raise ValueError(
                    f"noise_schedule.kind={asked.kind}: has {len(given)} levels from alpha_bar {float(given[0]):.6g} to "
                    f"{float(given[-1]):.6g}, the base was trained on {len(own)} from {float(own[0]):.6g} to {float(own[-1]):.6g}; "
                    "set noise_schedule.kind=base"
                )
        return own

    def to_json(self) -> dict[str, object]:
        """As descriptors hold it."""
        return {"sha256": self.sha256, "unet": dict(self.unet), "scheduler": dict(self.scheduler)}

    def _check_unet(self) -> None:
        unet = self.unet
        if unet.get("_class_name") != UNET_CLASS:
            self._refuse_unet("_class_name", f"{UNET_CLASS}, as a pixel model's network is")
        if unet.get("time_embedding_type", "positional") != "positional":
            self._refuse_unet("time_embedding_type", "positional, with which the network is told the original time")
        if unet.get("class_embed_type") is not None or unet.get("num_class_embeds") is not None:
            raise ValueError("config.json: the network wants class labels, which halfstep does not give; give an unconditional model")
        channels = unet.get("in_channels", 3)
        if not isinstance(channels, int) or channels < 1:
            self._refuse_unet("in_channels", "a number of channels")
        if unet.get("out_channels", 3) != channels:
            self._refuse_unet("out_channels", f"the {channels} of in_channels: learned variances are not known here")
        match unet.get("sample_size"):
            case int(side) | [int(side), _] if side > 0:
                pass
            case _:
                self._refuse_unet("sample_size", "a number of pixels")
        match unet.get("sample_size"):
            case [first, second] if first != second:
                self._refuse_unet("sample_size", "a square")
            case _:
                pass

    def _check_scheduler(self) -> None:
        scheduler = self.scheduler
        if scheduler.get("_class_name") not in _SAMPLERS:
            self._refuse_scheduler("_class_name", f"one of {', '.join(map(str, _SAMPLERS))}")
        if scheduler.get("variance_type", "fixed_small") not in _VARIANCES:
            self._refuse_scheduler("variance_type", f"one of {', '.join(map(str, _VARIANCES))}")
        if scheduler.get("clip_sample", True) not in (True, False):
            self._refuse_scheduler("clip_sample", "true or false")
        if self.clip and scheduler.get("clip_sample_range", 1.0) != 1.0:
            self._refuse_scheduler("clip_sample_range", "1, the range of images here")
        if scheduler.get("thresholding", False) is not False:
            self._refuse_scheduler("thresholding", "false")
        if scheduler.get("timestep_spacing", "leading") not in _SPACINGS:
            self._refuse_scheduler("timestep_spacing", f"one of {', '.join(_SPACINGS)}")
        if scheduler.get("set_alpha_to_one", True) is not True:
            self._refuse_scheduler("set_alpha_to_one", "true: the last step lands on a clean image")
        if self.levels.prediction == "eps" and float(self.levels.alpha_bar[-1]) == 0:
            self._refuse_scheduler("rescale_betas_zero_snr", "false: where there is noise alone, eps says nothing of the image")

    def _refuse_unet(self, name: str, wanted: str) -> NoReturn:
        raise ValueError(f"config.json: {name} is {self.unet.get(name)!r:.60}, wanted {wanted}; give another base")

    def _refuse_scheduler(self, name: str, wanted: str) -> NoReturn:
        got = f"{self.scheduler.get(name)!r:.60}"
        raise ValueError(f"scheduler_config.json: {name} is {got}, wanted {wanted}; give another base, or mend the file in a copy of it")


def pixel_base(value: object, *, where: str) -> PixelBase:
    """The base in a descriptor that was read from the file `where`.

    Raises: ValueError naming file and entry."""
    match value:
        case {"sha256": str(sha256), "unet": dict(unet), "scheduler": dict(scheduler)}:
            try:
                return PixelBase(sha256, unet, scheduler)
            except ValueError as error:
                raise ValueError(f"{where}: the descriptor's base: {error}") from error
    raise ValueError(
        f"{where}: the descriptor's base is {value!r:.60}, wanted an object of sha256, unet and scheduler; "
        "it was not written by this halfstep: train or export again"
    )
