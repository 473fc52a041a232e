"""The recipe that describes a stock pixel model; free of torch, so that launchers can write it."""

from collections.abc import Mapping
from pathlib import Path

from data_shards.files import read_json_object
from trainer.config import (
    BaseNoiseSchedule,
    CosineNoiseSchedule,
    DataConfig,
    DdpmConfig,
    DenoisingConfig,
    GivenNoiseSchedule,
    LinearNoiseSchedule,
    LoggingConfig,
    NoiseScheduleConfig,
    RunConfig,
    ScaledLinearNoiseSchedule,
    TrainConfig,
)

SCHEDULER = "scheduler_config.json"


def stock_recipe(base: str, *, revision: str | None = None) -> RunConfig:
    """Model, noise schedule and objective of a folder or Hub id; the other sections say nothing.

    Of a Hub id that is not on this machine the usual number of noise levels is assumed; who loads it compares.
    Raises: ValueError for a scheduler whose entries are not understood."""
    schedule = _noise_schedule(scheduler_of(Path(base)) or {})
    return RunConfig(
        data=DataConfig(shards="of others"),
        model=DdpmConfig(base=base, revision=revision),
        objective=DenoisingConfig(prediction="base"),
        noise_schedule=schedule,
        train=TrainConfig(steps=1),
        logging=LoggingConfig(sample_steps=min(LoggingConfig().sample_steps, schedule.steps)),
    )


def is_stock(path: Path) -> bool:
    """Whether a folder is a stock pipeline or network that is no export of halfstep's."""
    stock = any((path / name).is_file() for name in ("model_index.json", "config.json"))
    return stock and not any((path / name).exists() for name in ("descriptor.json", "manifest.json", "recipe.yaml"))


def scheduler_of(folder: Path) -> dict[str, object] | None:
    """The scheduler's config in a pipeline's folder: in a folder of its own or, as early pipelines had it, at the top; None if none."""
    found = next((path for path in (folder / "scheduler" / SCHEDULER, folder / SCHEDULER) if path.is_file()), None)
    return None if found is None else read_json_object(found)


def _noise_schedule(scheduler: Mapping[str, object]) -> NoiseScheduleConfig:
    """The base's own; spelled out where it has another number of levels than bases usually have."""
    betas, kind = scheduler.get("trained_betas"), scheduler.get("beta_schedule", "linear")
    steps = len(betas) if isinstance(betas, list) else scheduler.get("num_train_timesteps", BaseNoiseSchedule().steps)
    if steps == BaseNoiseSchedule().steps or not isinstance(steps, int):
        return BaseNoiseSchedule()
    if isinstance(betas, list):
        return GivenNoiseSchedule(betas=tuple(betas))
    ends = {name: scheduler[name] for name in ("beta_start", "beta_end") if name in scheduler}
    match kind:
        case "linear":
            return LinearNoiseSchedule.model_validate({"steps": steps, **ends})
        case "scaled_linear":
            # diffusers' defaults, not Stable Diffusion's
            return ScaledLinearNoiseSchedule.model_validate({"steps": steps, "beta_start": 1e-4, "beta_end": 0.02, **ends})
        case "squaredcos_cap_v2":
            return CosineNoiseSchedule(steps=steps)
        case other:
            raise ValueError(f"{SCHEDULER}: beta_schedule is {other!r:.60}, wanted linear, scaled_linear or squaredcos_cap_v2")
