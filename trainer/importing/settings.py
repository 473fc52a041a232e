"""What a checkpoint's tensors cannot say of a model: given on the command line, or as its program's authors published it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, cast, final

from trainer.options import Options, flag, integer, optional_text

Family = Literal["pesser", "guided-diffusion", "improved-diffusion"]
FAMILIES: tuple[Family, ...] = ("pesser", "guided-diffusion", "improved-diffusion")
Given = Mapping[str, int | str | bool]
"""Options of the command line by their names; what was not given is not there."""

_WORDS = {
    "noise_schedule": ("linear", "cosine"),
    "attention_order": ("legacy", "new"),
    "prediction": ("eps", "x_0"),
    "variance": ("fixed_small", "fixed_large"),
}
_NUMBERS = ("image_size", "diffusion_steps", "heads", "head_channels")
_FLAGS = ("rescale_timesteps", "eps_only")
NAMES = (*_NUMBERS, *_WORDS, *_FLAGS)
_HEADS = {"heads", "head_channels"}
_SURE: Mapping[Family, frozenset[str]] = {
    "pesser": frozenset(NAMES) - {"image_size", "variance"},
    "guided-diffusion": frozenset(),
    "improved-diffusion": frozenset({"attention_order"}),
}
"""In which a family's models do not differ."""
BASE_STEPS = 1000
"""Rescaled times run from 0 to this, however many steps there are."""
FEWEST_LINEAR = 21
"""Linear betas end at 20 / steps."""
# A model's size says which of the published ones it is; each U-Net has a level for each of its multipliers of the first level's width.
_SIZES: Mapping[Family, Mapping[tuple[int, ...], int]] = {
    "pesser": {(1, 2, 2, 2): 32, (1, 1, 2, 2, 4, 4): 256},
    "guided-diffusion": {(1, 2, 3, 4): 64, (1, 1, 2, 3, 4): 128, (1, 1, 2, 2, 4, 4): 256},
    "improved-diffusion": {(1, 2, 2, 2): 32, (1, 2, 3, 4): 64, (1, 1, 2, 2, 4, 4): 256},
}


@final
@dataclass(frozen=True)
class Settings:
    """One model's, complete.

    noise_schedule, diffusion_steps: the levels that it was trained on. heads, head_channels: of attention, one of the two.
    attention_order: whether a joint projection holds queries, keys and values head by head (legacy) or each for all heads (new).
    rescale_timesteps: whether the network was told t * 1000 / diffusion_steps. prediction: what its output is.
    variance: of ancestral steps, where the network does not learn it. eps_only: leave a learned variance out."""

    noise_schedule: str = "linear"
    diffusion_steps: int = 1000
    heads: int | None = None
    head_channels: int | None = None
    attention_order: str = "legacy"
    rescale_timesteps: bool = False
    prediction: str = "eps"
    variance: str = "fixed_large"
    eps_only: bool = False


def check_family(text: str) -> Family:
    """The family of that name. Raises: ValueError naming those that there are."""
    if text not in FAMILIES:
        raise ValueError(f"--as {text}: wanted one of {', '.join(FAMILIES)}")
    return cast(Family, text)


def read_given(options: Options) -> Given:
    """The settings among a job's options. Raises: ValueError for a word that an option does not take, or a number below 1."""
    given: dict[str, int | str | bool] = {}
    for name, words in _WORDS.items():
        word = optional_text(options, name)
        if word is not None and word not in words:
            raise ValueError(f"{spelled(name)} {word}: wanted {' or '.join(words)}")
        given.update({} if word is None else {name: word})
    for name in (name for name in _NUMBERS if options.get(name) is not None):
        number = integer(options, name, 0)
        if number < 1:
            raise ValueError(f"{spelled(name)} {number}: wanted 1 or more")
        given[name] = number
    return given | {name: flag(options, name) for name in _FLAGS if options.get(name) is not None}


def settle(family: Family, given: Given, *, image_size: int, learned_variance: bool = False) -> tuple[Settings, dict[str, object]]:
    """The settings, and those of them that are neither given nor sure: the published model's of that family and size.

    learned_variance: whether the network has one. Raises: ValueError if something is given that the family or this model does not have,
    or that contradicts something else."""
    _check_given(family, given)
    published = _published(family, image_size)
    if given.keys() & _HEADS:
        published = replace(published, heads=None, head_channels=None)
    settings = replace(published, **{name: value for name, value in given.items() if name != "image_size"})
    keeps_variance = learned_variance and not settings.eps_only
    if keeps_variance and "variance" in given:
        raise ValueError("--variance: this model learns its own; give --eps-only too, which leaves that out")
    if settings.rescale_timesteps and settings.diffusion_steps % BASE_STEPS:
        raise ValueError(
            f"--diffusion-steps {settings.diffusion_steps}: of times that were rescaled to {BASE_STEPS}, only a multiple of {BASE_STEPS} "
            "can be a stock pipeline; if they were not: --rescale-timesteps no"
        )
    if settings.noise_schedule == "linear" and settings.diffusion_steps < FEWEST_LINEAR:
        raise ValueError(
            f"--diffusion-steps {settings.diffusion_steps}: linear betas of so few steps exceed 1; wanted {FEWEST_LINEAR} or more, or "
            "--noise-schedule cosine"
        )
    sure = {"eps_only", *given, *_SURE[family]}
    sure |= {"variance"} if keeps_variance else set()
    sure |= {"rescale_timesteps"} if settings.diffusion_steps == BASE_STEPS else set()
    sure |= {"attention_order"} if settings.heads == 1 else set()
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return settings, {name: value for name, value in values.items() if name not in sure and value is not None}


def image_size_of(family: Family, given: Given, widths: tuple[int, ...]) -> int:
    """Pixels a side: given, or that of the published model whose levels have such widths relative to the first.

    Raises: ValueError if it cannot be told, or its side cannot be halved once for each further level."""
    multipliers = tuple(width // widths[0] if width % widths[0] == 0 else 0 for width in widths)
    size = given.get("image_size", _SIZES[family].get(multipliers))
    halvings = len(widths) - 1
    if size is None:
        raise ValueError(f"no published {family} model has levels of widths {', '.join(map(str, widths))}; say its side: --image-size N")
    if int(size) % 2**halvings:
        raise ValueError(f"--image-size {size}: this U-Net halves it {halvings} times; wanted a multiple of {2**halvings}")
    return int(size)


def head_width(settings: Settings, widths: tuple[int, ...]) -> int | None:
    """UNet2DModel's attention_head_dim for attention at levels of these widths; None: one head, whatever the width.

    Raises: ValueError if the heads do not divide a width, or differ in width, which UNet2DModel does not have."""
    if settings.head_channels is not None:
        odd = [width for width in widths if width % settings.head_channels]
        if odd:
            raise ValueError(f"--head-channels {settings.head_channels}: does not divide the {odd[0]} channels of a level with attention")
        return settings.head_channels
    assert settings.heads is not None, "published settings have one of the two"
    if settings.heads == 1:
        return None
    odd = [width for width in widths if width % settings.heads]
    if odd:
        raise ValueError(f"--heads {settings.heads}: does not divide the {odd[0]} channels of a level with attention")
    found = sorted({width // settings.heads for width in widths})
    if len(found) > 1:
        raise ValueError(
            f"attention with {settings.heads} heads has {' and '.join(map(str, found))} channels a head on its levels, and diffusers' "
            "UNet2DModel has one number for all: no stock pipeline can be it; if it has other heads: --heads N or --head-channels N"
        )
    return found[0]


def heads_at(settings: Settings, width: int) -> int:
    """Heads of attention over so many channels."""
    return settings.heads if settings.heads is not None else width // (settings.head_channels or width)


def spelled(name: str) -> str:
    """A setting's option on the command line."""
    return "--" + name.replace("_", "-")


def _check_given(family: Family, given: Given) -> None:
    for name in sorted(given.keys() & _SURE[family]):
        raise ValueError(f"{spelled(name)}: models of {family} do not differ in it; leave it out")
    if given.keys() >= _HEADS:
        raise ValueError("--heads and --head-channels: each follows from the other; give one of them")


def _published(family: Family, image_size: int) -> Settings:
    """Of the model of that size that a family's authors published, as their README gives it; else their code's defaults.

    Source: pesser/pytorch_diffusion diffusion.py; openai/guided-diffusion and openai/improved-diffusion README.md and script_util.py."""
    match family, image_size:
        case "pesser", 32:
            return Settings(heads=1, variance="fixed_large")
        case "pesser", _:
            return Settings(heads=1, variance="fixed_small")
        case "guided-diffusion", 64:
            return Settings(noise_schedule="cosine", head_channels=64, attention_order="new")
        case "guided-diffusion", 256:
            return Settings(head_channels=64)
        case "improved-diffusion", 32 | 64:
            return Settings(noise_schedule="cosine", diffusion_steps=4000, heads=4, rescale_timesteps=True)
        case "improved-diffusion", 256:
            return Settings(heads=1)
        case "improved-diffusion", _:
            return Settings(heads=4, rescale_timesteps=True)
        case _:
            return Settings(heads=4)
