"""The recipe: what a run does, and which part of that is the run's identity. Free of torch."""

from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import Field, model_validator

from trainer.config_data import AspectBucketsConfig, CacheConfig, DataConfig, FacesConfig, MixtureSource
from trainer.config_latent import (
    AdaptationConfig,
    AutoencoderConfig,
    AutoencodingConfig,
    DreamBoothConfig,
    FullAdaptation,
    Kandinsky22DecoderConfig,
    Kandinsky22PriorConfig,
    LatentBaseConfig,
    LatentDenoisingConfig,
    LoraAdaptation,
    MasksConfig,
    StableDiffusionConfig,
    ValidationConfig,
    WuerstchenPriorConfig,
)
from trainer.config_latent_checks import latent_problems
from trainer.config_sections import (
    BaseNoiseSchedule,
    CheckpointConfig,
    ConstantLRSchedule,
    CosineClampedNoiseSchedule,
    CosineLRSchedule,
    CosineNoiseSchedule,
    CountOrZero,
    DdpmConfig,
    DenoisingConfig,
    DenoisingLoss,
    DistillationLoss,
    DistillConfig,
    EmaConfig,
    EngineConfig,
    GivenNoiseSchedule,
    LinearLRSchedule,
    LinearNoiseSchedule,
    LoggingConfig,
    LRScheduleConfig,
    NoiseScheduleConfig,
    NumericConfig,
    OptimConfig,
    Prediction,
    Problem,
    ProgressiveDistillationConfig,
    Sampler,
    ScaledLinearNoiseSchedule,
    Section,
    StepDecayLRSchedule,
    TinyUNetConfig,
    TrainConfig,
)
from trainer.stages import halving_counts

__all__ = [
    "AdaptationConfig",
    "AspectBucketsConfig",
    "AutoencoderConfig",
    "AutoencodingConfig",
    "BaseNoiseSchedule",
    "CacheConfig",
    "CheckpointConfig",
    "ConstantLRSchedule",
    "CosineClampedNoiseSchedule",
    "CosineLRSchedule",
    "CosineNoiseSchedule",
    "DataConfig",
    "DdpmConfig",
    "DenoisingConfig",
    "DenoisingLoss",
    "DistillConfig",
    "DistillationLoss",
    "DreamBoothConfig",
    "EmaConfig",
    "EngineConfig",
    "FacesConfig",
    "FullAdaptation",
    "GivenNoiseSchedule",
    "Kandinsky22DecoderConfig",
    "Kandinsky22PriorConfig",
    "LRScheduleConfig",
    "LatentBaseConfig",
    "LatentDenoisingConfig",
    "LinearLRSchedule",
    "LinearNoiseSchedule",
    "LoggingConfig",
    "LoraAdaptation",
    "MasksConfig",
    "MixtureSource",
    "ModelConfig",
    "NoiseScheduleConfig",
    "NumericConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PixelModelConfig",
    "Prediction",
    "Problem",
    "ProgressiveDistillationConfig",
    "RunConfig",
    "Sampler",
    "ScaledLinearNoiseSchedule",
    "Section",
    "StableDiffusionConfig",
    "StepDecayLRSchedule",
    "TinyUNetConfig",
    "TrainConfig",
    "ValidationConfig",
    "WuerstchenPriorConfig",
    "identity",
    "pixel_model",
    "pixel_objective",
    "stage_updates",
    "student_counts",
]

PixelModelConfig = TinyUNetConfig | DdpmConfig
ModelConfig = Annotated[
    TinyUNetConfig
    | DdpmConfig
    | AutoencoderConfig
    | LatentBaseConfig
    | StableDiffusionConfig
    | WuerstchenPriorConfig
    | Kandinsky22PriorConfig
    | Kandinsky22DecoderConfig,
    Field(discriminator="kind"),
]
ObjectiveConfig = Annotated[
    DenoisingConfig | ProgressiveDistillationConfig | LatentDenoisingConfig | AutoencodingConfig, Field(discriminator="kind")
]

# Objective and noise schedule of a recipe that says nothing of them, by its kind of model.
_DEFAULTS = {
    "ddpm": ("denoising", "base"),
    "autoencoder": ("autoencoding", "cosine_clamped"),
    "latent_base": ("latent_denoising", "scaled_linear"),
    "stable_diffusion": ("latent_denoising", "base"),
    "wuerstchen_prior": ("latent_denoising", "base"),
    "kandinsky22_prior": ("latent_denoising", "base"),
    "kandinsky22_decoder": ("latent_denoising", "base"),
}

# Objectives whose prediction is a pixel base's own unless it is given.
_BASE_PREDICTS = ("denoising", "progressive_distillation")

# What a resume may change: where and how often, never what is computed. The indexes' sha256 stand for data.shards and data.mixture,
# those of their weights, in each checkpoint, for models.
_NOT_IDENTITY = (
    "engine.kind",
    "engine.zero_stage",
    "engine.replicas",
    "engine.cpu_offload",
    "engine.shard_frozen_above_gib",
    "checkpoint",
    "logging",
    "validation",
    "data.workers",
    "data.shards",
    "data.mixture",
    "data.cache",
    "data.on_bad_sample",
    "model.base",
    "model.start",
    "data.role",
    "model.revision",
    "model.autoencoder",
    "model.image_encoder",
    "model.decoder",
    "model.prior",
    "data.max_bad_samples",
    "train.steps",
    "train.stop_after_steps",
    "train.stop_after_minutes",
    "distill.checkpoint_every_steps",
)


class RunConfig(Section):
    """A halfstep recipe: everything that decides what a run computes, and when it saves and reports."""

    seed: CountOrZero = 0
    """Seed of the run: of its first weights, of the order of images, and of the noise of every micro-batch."""
    data: DataConfig = DataConfig()
    """Training images and how they are dealt into micro-batches."""
    model: ModelConfig = TinyUNetConfig()
    """The network."""
    objective: ObjectiveConfig = DenoisingConfig()
    """What the network learns."""
    noise_schedule: NoiseScheduleConfig = CosineClampedNoiseSchedule()
    """The noise levels."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and gradient clipping."""
    lr_schedule: LRScheduleConfig = ConstantLRSchedule()
    """Course of the learning rate."""
    adaptation: AdaptationConfig = FullAdaptation()
    """Which weights of a base are trained."""
    dreambooth: DreamBoothConfig | None = None
    """Teach a subject or style from a few images; null: learn from captioned images."""
    ema: EmaConfig = EmaConfig()
    """Moving average of the weights."""
    train: TrainConfig
    """Length of the run and how a step is computed."""
    engine: EngineConfig = EngineConfig()
    """How ranks share the work."""
    numeric: NumericConfig = NumericConfig()
    """What happens where a loss or gradient is not finite."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the state is saved."""
    logging: LoggingConfig = LoggingConfig()
    """What is written down."""
    validation: ValidationConfig = ValidationConfig()
    """What a latent model draws while it trains."""
    distill: DistillConfig | None = None
    """A chain of halvings, for `halfstep distill`; null: none."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_follow_the_model(cls, recipe: object) -> object:
        if not isinstance(recipe, dict):
            return recipe
        model = recipe.get("model")
        if isinstance(model, dict) and "kind" not in model and model.keys() <= TinyUNetConfig.model_fields.keys():
            recipe = {**recipe, "model": {"kind": TinyUNetConfig().kind, **model}}
        kinds = {name: {"kind": kind} for name, kind in kinds_of_family(recipe).items()}
        given = {name: {**kinds[name], **recipe[name]} for name in kinds if isinstance(recipe.get(name), dict)}
        recipe = {**kinds, **recipe, **given}
        objective = recipe.get("objective")
        if kinds and isinstance(objective, dict) and objective.get("kind") in _BASE_PREDICTS:
            recipe = {**recipe, "objective": {"prediction": "base", **objective}}
        return recipe

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an optimizer step over all ranks; world_size divides it."""
        return self.data.global_batch_size // self.data.micro_batch_size

    @property
    def stage_data(self) -> DataConfig:
        """The data of a chain's stages, which may have batches of their own."""
        if self.distill is None:
            return self.data
        own = {"global_batch_size": self.distill.global_batch_size, "micro_batch_size": self.distill.micro_batch_size}
        return self.data.model_copy(update={name: images for name, images in own.items() if images is not None})

    @property
    def steps_may_grow(self) -> bool:
        """Whether a resume may raise train.steps, which the learning rate of earlier steps must not depend on."""
        return self.lr_schedule.kind in ("constant", "step_decay")

    def problems(self) -> Iterator[Problem]:
        if self.data.shards is None and self.data.faces is None and not self.data.mixture:
            text = "no images to train on; set data.shards to a directory of shards, or data.faces.count=6000 to pack cartoon faces"
            yield Problem(("data.shards", "data.faces"), text)
        halvings = len(self.model.channels) - 1 if isinstance(self.model, TinyUNetConfig) else 0
        buckets = self.data.aspect_buckets
        if buckets is not None and buckets.multiple_of % 2**halvings:
            text = f"{buckets.multiple_of} is not a multiple of {2**halvings}, which the levels of model.channels need"
            yield Problem(("data.aspect_buckets.multiple_of", "model.channels"), f"{text}; set data.aspect_buckets.multiple_of=64")
        yield from latent_problems(self)
        if self.optim.kind == "adamw_8bit" and self.engine.cpu_offload:
            text = "moments of 8 bits stay on the device, those of adamw can be in the host's memory"
            yield Problem(("optim.kind", "engine.cpu_offload"), f"{text}; set engine.cpu_offload=false or optim.kind=adamw")
        if self.lr_schedule.warmup_steps >= self.train.steps:
            text = f"{self.lr_schedule.warmup_steps} is not below train.steps={self.train.steps}"
            yield Problem(("lr_schedule.warmup_steps", "train.steps"), f"{text}; set lr_schedule.warmup_steps={self.train.steps // 10}")
        levels = self.noise_schedule.steps
        if self.logging.sample_steps > levels:
            text = f"{self.logging.sample_steps} sampling steps, but noise_schedule has {levels} levels; set logging.sample_steps={levels}"
            yield Problem(("logging.sample_steps", "noise_schedule.steps"), text)
        if isinstance(self.objective, ProgressiveDistillationConfig):
            yield from _off_sequence("objective.teacher_steps", self.objective.teacher_steps, levels)
        if self.distill:
            yield from _chain_problems(self, self.distill)


def kinds_of_family(recipe: Mapping[str, object]) -> dict[str, str]:
    """Kinds of the sections that follow the kind of a recipe's model where they name none; empty for models that have no such."""
    model = recipe.get("model")
    kind = model.get("kind") if isinstance(model, dict) else None
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        return {}
    return dict(zip(("objective", "noise_schedule"), _DEFAULTS[kind], strict=True))


def pixel_model(config: RunConfig) -> TinyUNetConfig:
    """The model section of a pixel model's recipe that starts from scratch. Raises: ValueError for another model's."""
    if not isinstance(config.model, TinyUNetConfig):
        raise ValueError(f"model.kind={config.model.kind} does not start from scratch on pixels; wanted model.kind=tiny_unet")
    return config.model


def pixel_objective(config: RunConfig) -> DenoisingConfig | ProgressiveDistillationConfig:
    """The objective of a pixel model's recipe. Raises: ValueError for a latent model's."""
    if not isinstance(config.objective, DenoisingConfig | ProgressiveDistillationConfig):
        raise ValueError(f"objective.kind={config.objective.kind} is a latent model's; wanted objective.kind=denoising")
    return config.objective


def student_counts(distill: DistillConfig) -> tuple[int, ...]:
    """Sampling steps of the chain's students, first halving first: from half of start_steps down to end_steps, skipped ones left out."""
    return tuple(count for count in halving_counts(distill.start_steps, distill.end_steps)[1:] if count not in (distill.skip or ()))


def stage_updates(distill: DistillConfig) -> tuple[int, ...]:
    """Updates of each student that a chain trains, the one whose head changes last."""
    updates = distill.updates if isinstance(distill.updates, tuple) else (distill.updates,) * len(student_counts(distill))
    return (*updates, distill.head_change.updates) if distill.head_change else updates


def identity(config: RunConfig) -> dict[str, object]:
    """The part of a recipe that a resume must not change, as dotted keys and plain values."""
    # Runs of pixel models from before there were others go on: what does not concern them is no part of their identity.
    free = (*_NOT_IDENTITY, "adaptation", "dreambooth") if isinstance(config.model, PixelModelConfig) else _NOT_IDENTITY
    values = dict(_leaves(config.model_dump(mode="json"), ""))
    return {key: value for key, value in values.items() if not any(key == name or key.startswith(f"{name}.") for name in free)}


def _leaves(tree: dict[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _off_sequence(key: str, steps: int, levels: int) -> Iterator[Problem]:
    """A step count that no halvings of the noise levels lead to."""
    counts = tuple(halving_counts(levels, 1))
    if steps not in counts:
        nearest = min(counts, key=lambda count: abs(count - steps))
        text = f"{steps} is not reached by halving the {levels} levels of noise_schedule: {', '.join(map(str, counts))}"
        yield Problem((key, "noise_schedule.steps"), f"{text}; set {key}={nearest}")


def _chain_problems(config: RunConfig, distill: DistillConfig) -> Iterator[Problem]:
    levels = config.noise_schedule.steps
    off = [
        *_off_sequence("distill.start_steps", distill.start_steps, levels),
        *_off_sequence("distill.end_steps", distill.end_steps, levels),
    ]
    yield from off
    images, micro = config.stage_data.global_batch_size, config.stage_data.micro_batch_size
    if images % micro and not config.data.global_batch_size % config.data.micro_batch_size:
        nearest = max(1, round(images / micro)) * micro
        named = "data.micro_batch_size" if distill.micro_batch_size is None else "distill.micro_batch_size"
        text = f"{images} is not a multiple of {named}={micro}; set distill.global_batch_size={nearest}"
        yield Problem(("distill.global_batch_size", named), text)
    if off:
        return
    yield from _skip_problems(distill)
    yield from _head_problems(config, distill)
    counts = student_counts(distill)
    students = ", ".join(map(str, counts))
    for name, values in (("updates", distill.updates), ("learning_rate", distill.learning_rate)):
        if isinstance(values, tuple) and len(values) != len(counts):
            text = f"{len(values)} values for {len(counts)} stages (students of {students} steps)"
            hint = f"give {len(counts)} values, or one number for all"
            yield Problem((f"distill.{name}", "distill.start_steps", "distill.end_steps"), f"{text}; {hint}")


def _skip_problems(distill: DistillConfig) -> Iterator[Problem]:
    between = halving_counts(distill.start_steps, distill.end_steps)[1:-1]
    if off := [count for count in distill.skip or () if count not in between]:
        listed = ", ".join(map(str, between)) or "none"
        text = f"{off[0]} is no student between start_steps={distill.start_steps} and end_steps={distill.end_steps} ({listed})"
        yield Problem(("distill.skip", "distill.start_steps", "distill.end_steps"), f"{text}; take it out of distill.skip")


def _head_problems(config: RunConfig, distill: DistillConfig) -> Iterator[Problem]:
    change = distill.head_change
    if change is None:
        return
    counts = (distill.start_steps, *student_counts(distill))
    if change.at_steps is not None and change.at_steps not in counts:
        text = f"no model of the chain samples in {change.at_steps} steps, only in {', '.join(map(str, counts))}"
        yield Problem(("distill.head_change.at_steps",), f"{text}; set distill.head_change.at_steps={counts[0]}")
    if isinstance(config.objective, DenoisingConfig) and config.objective.prediction == change.prediction:
        text = f"the first teacher predicts {change.prediction} already"
        yield Problem(("distill.head_change.prediction", "objective.prediction"), f"{text}; set distill.head_change=null")
