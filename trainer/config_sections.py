"""The sections of a recipe: one frozen model each, free of torch; every field says its unit or its values."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from trainer.stages import halving_counts

Prediction = Literal["v", "eps", "x_0"]
PredictionOrBase = Literal["v", "eps", "x_0", "base"]
Sampler = Literal["ddim", "ancestral"]
MemoryFormat = Literal["contiguous", "channels_last"]
DenoisingLoss = Literal["mse", "x_mse", "eps_mse", "v_mse", "min_snr", "snr_trunc"]
DistillationLoss = Literal["v_mse", "x_mse", "eps_mse", "min_snr", "snr_trunc"]

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Beta = Annotated[float, Field(gt=0, lt=1)]
# YAML has lists only: strict mode alone would refuse them for tuples. The items stay strict.
Counts = Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
Flags = Annotated[tuple[bool, ...], Field(strict=False, min_length=1)]
Rates = Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)]


@dataclass(frozen=True)
class Problem:
    """A mistake that one field alone does not show: the keys it is about, the one to mend first, and what is wrong."""

    keys: tuple[str, ...]
    text: str


class Section(BaseModel):
    """A part of a configuration file. Unknown keys, other types than declared, NaN and infinity are mistakes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def problems(self) -> Iterator[Problem]:
        """Mistakes among this section's own fields; keys are relative to it."""
        yield from ()

    def check(self) -> None:
        """Checks the section as a whole; of use after `model_copy`, which checks nothing.

        Raises: ValueError naming every problem at once."""
        if problems := tuple(self.problems()):
            raise PydanticCustomError("problems", "{text}", {"text": "; ".join(p.text for p in problems), "problems": problems})

    @model_validator(mode="after")
    def _check_when_built(self) -> Self:
        self.check()
        return self


class TinyUNetConfig(Section):
    """Compact U-Net of residual blocks with multi-head self-attention, a stock diffusers UNet2DModel."""

    kind: Literal["tiny_unet"] = "tiny_unet"
    """Model family."""
    channels: Counts = (32, 64, 128, 128)
    """Width of each level, finest first; each level halves the image, so its side is a multiple of 2^(levels - 1) pixels."""
    layers_per_block: Count = 1
    """Residual blocks per level on the way down; one more on the way up."""
    attention: Flags = (False, False, True, True)
    """Self-attention on or off, one flag per level; the middle attends where any level does. All off: convolutions alone."""
    attention_heads: Count = 4
    """Heads at the widest level with attention; the width of a head there is used at every level."""
    norm_groups: Count = 8
    """Groups of every group norm; divides every width."""
    dropout: Fraction = 0.0
    """Probability in [0, 1) of dropping an activation."""
    start: Annotated[str, Field(min_length=1)] | None = None
    """RUN_DIR or export of the same network whose EMA weights are the first ones, to be fine-tuned; null: random weights."""

    def problems(self) -> Iterator[Problem]:
        off = [width for width in self.channels if width % self.norm_groups]
        if off:
            text = f"{self.norm_groups} groups do not divide the width {_listed(off)}"
            yield Problem(("norm_groups", "channels"), f"{text}; set model.norm_groups={math.gcd(self.norm_groups, *self.channels)}")
        if len(self.attention) != len(self.channels):
            text = f"{len(self.attention)} flags for {len(self.channels)} levels"
            yield Problem(("attention", "channels"), f"{text}; give one flag per width of model.channels={list(self.channels)}")
        elif any(self.attention):
            yield from self._head_problems()

    def _head_problems(self) -> Iterator[Problem]:
        # the middle block attends at the last width
        attended = [width for width, on in zip(self.channels, self.attention, strict=True) if on] + [self.channels[-1]]
        widest = max(attended[:-1])
        fitting = [
            heads for heads in range(1, widest + 1) if widest % heads == 0 and not any(width % (widest // heads) for width in attended)
        ]
        if self.attention_heads not in fitting:
            nearest = min(fitting, key=lambda heads: abs(heads - self.attention_heads))
            text = f"{self.attention_heads} heads at the width {widest} do not fit the attended widths {_listed(sorted(set(attended)))}"
            yield Problem(("attention_heads", "channels", "attention"), f"{text}; set model.attention_heads={nearest}")


def _listed(numbers: Iterable[float]) -> str:
    return ", ".join(map(str, numbers))


class DdpmConfig(Section):
    """A pixel model that diffusers knows, fine-tuned or halved: any UNet2DModel with a DDPM or DDIM scheduler beside it."""

    kind: Literal["ddpm"] = "ddpm"
    """Model family."""
    base: Annotated[str, Field(min_length=1)] = "google/ddpm-celebahq-256"
    """Folder or Hub id of the pipeline; its scheduler says on what noise levels it was trained and what it predicts."""
    revision: str | None = None
    """Commit, branch or tag of a Hub id; null: its newest. A run keeps to the commit that it started with."""
    dropout: Fraction | None = None
    """Probability in [0, 1) of dropping an activation; null: the base's own."""


class DenoisingConfig(Section):
    """Learn to undo noise of any level: trains a teacher."""

    kind: Literal["denoising"] = "denoising"
    """Objective family."""
    prediction: PredictionOrBase = "v"
    """What the network puts out: v, eps (the noise) or x_0 (the clean image); base: what the scheduler of model.base says."""
    loss: DenoisingLoss = "mse"
    """mse: in the prediction's own space; x_mse, eps_mse, v_mse: in that space; min_snr, snr_trunc: x_mse weighted by signal-to-noise."""
    min_snr_gamma: Positive = 5.0
    """Upper bound of the signal-to-noise weight of loss min_snr; dimensionless."""
    offset_noise: Annotated[float, Field(ge=0)] = 0.0
    """Scale of the noise added to a whole channel; 0 is off, 0.1 is usual."""
    stratified: bool = True
    """Spread the timesteps evenly over the global batch instead of drawing each alone."""


class StopWhenConfig(Section):
    """End a stage before its last update once its student's error against its teacher has stopped falling.

    The error is that of the averaged weights on the run's first images with noise of their own, the same at every measurement."""

    every_steps: Count = 20
    """Optimizer steps between two measurements, the first before step 0."""
    images: Count = 64
    """Images measured; at most data.global_batch_size of them."""
    least_gain: Fraction = 0.02
    """A measurement is a fall if it is below the lowest one so far by this share of it."""
    patience: Count = 3
    """Measurements in a row without a fall that end the stage."""


class ProgressiveDistillationConfig(Section):
    """Learn to cover two sampling steps of a teacher in one; `halfstep distill` writes this section for each stage."""

    kind: Literal["progressive_distillation"] = "progressive_distillation"
    """Objective family."""
    teacher: Annotated[str, Field(min_length=1)]
    """Run directory, export, stock DDPM pipeline or its Hub id; its EMA weights teach and are the student's first weights."""
    teacher_steps: Annotated[int, Field(ge=2)]
    """Sampling steps of the teacher; a count of the halving sequence of noise_schedule.steps."""
    student_steps: Count
    """Sampling steps of the student: half the teacher's, rounded up; a quarter or less skips stages; all of them for another head."""
    target: Sampler = "ddim"
    """ddim: one student step lands where its teacher's covered steps do; ancestral: the teacher's clean image at its last covered level."""
    sampler: Sampler = "ddim"
    """Sampler that the student is meant for, written into its descriptor; usually the target."""
    prediction: PredictionOrBase = "v"
    """What the network puts out; equals the teacher's unless turn_steps is given. base: the teacher's, where it comes from model.base."""
    turn_steps: Count | None = None
    """Optimizer steps over which the head turns from the teacher's prediction, where it is another, to this one; null: the same."""
    loss: DistillationLoss = "v_mse"
    """Space and weight of the squared error. min_snr all but leaves out the noisiest levels, where students of few steps live."""
    min_snr_gamma: Positive = 5.0
    """Upper bound of the signal-to-noise weight of loss min_snr; dimensionless."""
    clip_target: bool = False
    """Clip the teacher's clean images to [-1, 1] inside the target."""
    stratified: bool = True
    """Spread the timesteps evenly over the global batch instead of drawing each alone."""
    feature_weight: Positive | None = None
    """Weight of the distance between features (edges at three scales) of the student's clean image and the target's; null: none."""
    teacher_precision: Literal["fp32", "bf16"] | None = None
    """Type of the teacher's activations; null: engine.precision."""
    stop_when: StopWhenConfig | None = None
    """End before train.steps once the student learns no more; null: never."""

    def problems(self) -> Iterator[Problem]:
        half = (self.teacher_steps + 1) // 2
        counts = halving_counts(self.teacher_steps, 1)
        if self.student_steps == self.teacher_steps and self.turn_steps is None:
            text = "a student of its teacher's steps and head has nothing to learn"
            yield Problem(("student_steps", "turn_steps"), f"{text}; set objective.student_steps={half}")
        elif self.student_steps not in counts:
            text = (
                f"the student of a teacher of {self.teacher_steps} steps takes {half}, or as many halvings more, not {self.student_steps}"
            )
            yield Problem(("student_steps", "teacher_steps"), f"{text}; set objective.student_steps={half}")
        if self.feature_weight is not None and self.turn_steps is not None:
            text = "a head that turns is far from any clean image at first"
            yield Problem(("feature_weight", "turn_steps"), f"{text}; set objective.feature_weight=null")
        if self.stop_when is not None and self.turn_steps is not None:
            text = "a head that turns is measured at another angle each time"
            yield Problem(("stop_when", "turn_steps"), f"{text}; set objective.stop_when=null")


class LinearNoiseSchedule(Section):
    """Betas in a straight line (DDPM)."""

    kind: Literal["linear"] = "linear"
    """Betas in a straight line."""
    steps: Count = 1000
    """Number of noise levels T."""
    beta_start: Beta = 1e-4
    """First beta, in (0, 1)."""
    beta_end: Beta = 0.02
    """Last beta, in (0, 1)."""


class ScaledLinearNoiseSchedule(Section):
    """Square roots of the betas in a straight line (Stable Diffusion)."""

    kind: Literal["scaled_linear"] = "scaled_linear"
    """Square roots of the betas in a straight line."""
    steps: Count = 1000
    """Number of noise levels T."""
    beta_start: Beta = 0.00085
    """First beta, in (0, 1)."""
    beta_end: Beta = 0.012
    """Last beta, in (0, 1)."""


class CosineNoiseSchedule(Section):
    """Squared cosine with betas of at most 0.999, diffusers' squaredcos_cap_v2."""

    kind: Literal["cosine"] = "cosine"
    """Squared cosine, betas at most 0.999."""
    steps: Count = 1000
    """Number of noise levels T."""


class CosineClampedNoiseSchedule(Section):
    """Squared cosine with alpha_bar kept within [1e-5, 0.9999]."""

    kind: Literal["cosine_clamped"] = "cosine_clamped"
    """Squared cosine, alpha_bar within [1e-5, 0.9999]."""
    steps: Count = 1000
    """Number of noise levels T."""


class GivenNoiseSchedule(Section):
    """Betas as given, one per noise level."""

    kind: Literal["given"] = "given"
    """Betas as given."""
    betas: Annotated[tuple[Beta, ...], Field(strict=False, min_length=1)]
    """One beta in (0, 1) per noise level, least noise first."""

    @property
    def steps(self) -> int:
        """Number of noise levels T."""
        return len(self.betas)


class BaseNoiseSchedule(Section):
    """The noise levels of the base that is fine-tuned, from its own scheduler."""

    kind: Literal["base"] = "base"
    """The base's own."""

    @property
    def steps(self) -> int:
        """Number of noise levels T: all bases that halfstep knows were trained on so many."""
        return 1000


NoiseScheduleConfig = Annotated[
    LinearNoiseSchedule
    | ScaledLinearNoiseSchedule
    | CosineNoiseSchedule
    | CosineClampedNoiseSchedule
    | GivenNoiseSchedule
    | BaseNoiseSchedule,
    Field(discriminator="kind"),
]


class OptimConfig(Section):
    """Optimizer and gradient clipping."""

    kind: Literal["adamw", "adam", "adamw_8bit"] = "adamw"
    """adamw: weight decay apart from the gradient; adam: weight decay as a part of it; adamw_8bit: adamw, moments kept in 8 bits."""
    learning_rate: Positive = 6e-4
    """Peak learning rate per optimizer step."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    """Decay of the first and second moment, each in [0, 1)."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decay of the weights per unit of learning rate; 0 is off."""
    max_gradient_norm: Positive | None = 1.0
    """Largest 2-norm of the whole gradient; null does not clip."""


class ConstantLRSchedule(Section):
    """The same learning rate throughout; train.steps may grow on a resume."""

    kind: Literal["constant"] = "constant"
    """Constant after the warm-up."""
    warmup_steps: CountOrZero = 0
    """Optimizer steps from 0 up to the full rate."""


class LinearLRSchedule(Section):
    """A straight line to 0 at the last step."""

    kind: Literal["linear"] = "linear"
    """Straight line to 0 at train.steps."""
    warmup_steps: CountOrZero = 0
    """Optimizer steps from 0 up to the full rate."""


class CosineLRSchedule(Section):
    """Half a cosine to 0 at the last step."""

    kind: Literal["cosine"] = "cosine"
    """Half a cosine to 0 at train.steps."""
    warmup_steps: CountOrZero = 0
    """Optimizer steps from 0 up to the full rate."""


class StepDecayLRSchedule(Section):
    """A factor every so many steps; train.steps may grow on a resume."""

    kind: Literal["step_decay"] = "step_decay"
    """Times a factor every so many steps."""
    warmup_steps: CountOrZero = 0
    """Optimizer steps from 0 up to the full rate."""
    every_steps: Count
    """Optimizer steps between two decays, counted from step 0."""
    factor: Annotated[float, Field(gt=0, le=1)]
    """What the rate is multiplied by at each decay, in (0, 1]."""


LRScheduleConfig = Annotated[
    ConstantLRSchedule | LinearLRSchedule | CosineLRSchedule | StepDecayLRSchedule,
    Field(discriminator="kind"),
]


class EmaConfig(Section):
    """Moving average of the weights, which samples, exports and teaches."""

    decay: Fraction = 0.995
    """Share of the old average kept at each step, in [0, 1)."""
    warmup: bool = True
    """Use min(decay, (1 + step) / (10 + step)), so that an early average follows the weights."""
    more_decays: Annotated[tuple[Fraction, ...], Field(strict=False)] = ()
    """Further averages kept beside it, each with its own decay in [0, 1); `halfstep export --ema DECAY` chooses one afterwards."""

    def problems(self) -> Iterator[Problem]:
        decays = (self.decay, *self.more_decays)
        twice = sorted({decay for decay in decays if decays.count(decay) > 1})
        if twice:
            yield Problem(("more_decays", "decay"), f"{_listed(twice)} is there twice; give each decay once")


class TrainConfig(Section):
    """Length of the run and how a step is computed."""

    steps: Count
    """Optimizer steps of the whole run."""
    stop_after_steps: Count | None = None
    """Commit a checkpoint and end with exit code 75 after so many steps of this attempt, as a time limit would; null: never."""
    stop_after_minutes: Positive | None = None
    """Commit a checkpoint and end with exit code 75 so many minutes after the start of this attempt; null: never."""
    compile: bool | Literal["auto"] = False
    """Compile the model with torch.compile; pays off for long runs only. auto: measured once, before step 0, and frozen."""
    memory_format: Literal["contiguous", "channels_last", "auto"] = "contiguous"
    """Layout of images in memory. auto: measured once, before step 0, and frozen."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more work."""

    @property
    def to_measure(self) -> tuple[str, ...]:
        """Names of the fields that say auto."""
        return tuple(name for name in ("compile", "memory_format") if getattr(self, name) == "auto")

    @property
    def compiles(self) -> bool:
        """Whether the model is compiled; not as long as that has not been measured."""
        return self.compile is True

    @property
    def layout(self) -> MemoryFormat:
        """Of images in memory; contiguous as long as it has not been measured."""
        return "contiguous" if self.memory_format == "auto" else self.memory_format


class EngineConfig(Section):
    """How ranks share the work of one optimizer step."""

    kind: Literal["replicated", "fsdp", "deepspeed"] = "replicated"
    """replicated: every rank holds the whole model (DDP); fsdp: ranks share weights, gradients and optimizer (FSDP2); deepspeed: ZeRO."""
    zero_stage: Literal[1, 2, 3] = 2
    """What DeepSpeed's ranks share: 1 the optimizer, 2 gradients too, 3 weights too; counts for kind deepspeed."""
    replicas: Count = 1
    """Copies of the model that fsdp keeps (hybrid sharding): world_size / replicas ranks share one; 1 shares over all ranks."""
    cpu_offload: bool = False
    """Keep fsdp's or DeepSpeed's optimizer shards in the hosts' memory: a larger model on a GPU, slower steps."""
    shard_frozen_above_gib: Positive = 2.0
    """Frozen side models (teacher, VAE, text or image encoder) above this size are shared among the ranks; smaller ones are on each."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of activations; weights, gradients and losses stay fp32. fp16 scales the loss by a factor that adapts itself."""
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    """Attention kernels: PyTorch's own (sdpa) or xformers'; auto takes xformers where its kernels run on the device."""
    deterministic: bool = False
    """Use only kernels that give the same bits every time; on CPU all do."""

    def problems(self) -> Iterator[Problem]:
        if self.replicas > 1 and self.kind != "fsdp":
            text = f"{self.replicas} copies of a sharded model, but engine.kind={self.kind}"
            yield Problem(("replicas", "kind"), f"{text}; set engine.replicas=1 or engine.kind=fsdp")
        if self.cpu_offload and self.kind == "replicated":
            yield Problem(("cpu_offload", "kind"), "replicated keeps everything on the device; set engine.kind=fsdp or deepspeed")


class NumericConfig(Section):
    """What happens at an optimizer step whose numbers are bad; no bad number ever reaches a weight."""

    on_bad_step: Literal["stop", "skip", "roll_back"] = "stop"
    """stop: end with exit code 66; skip: leave the step out; roll_back: go back to the newest checkpoint, then leave the step out."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """A loss above this multiple of its moving average is bad too, like NaN and infinity; null: only those are."""
    max_bad_steps: CountOrZero = 10
    """Bad steps that a run may leave out before it ends with exit code 66."""


class CheckpointConfig(Section):
    """When the run's state is committed to RUN_DIR/checkpoints."""

    every_steps: Count = 500
    """Optimizer steps between two checkpoints; the last step always has one."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints kept, at least 2: if one is damaged there is another. Older ones are removed."""
    keep_every_steps: Count | None = None
    """Checkpoints of these multiples are kept for good; null: none."""
    keep_best: CountOrZero = 0
    """Checkpoints kept for the lowest mean loss since the one before; 0: none."""
    asynchronous: bool = True
    """Write in the background while training goes on; the state is copied first."""
    on_disk_full: Literal["stop", "go_on"] = "stop"
    """stop: end with exit code 74; go_on: train on without this checkpoint. What was committed before stays either way."""


class LoggingConfig(Section):
    """What is written to metrics.jsonl, TensorBoard and RUN_DIR/samples."""

    every_steps: Count = 1
    """Optimizer steps between two lines of metrics.jsonl."""
    sample_every_steps: CountOrZero = 500
    """Optimizer steps between two sample grids; 0 draws none."""
    sample_images: Count = 16
    """Images of a sample grid."""
    sample_steps: Count = 50
    """Sampling steps of a sample grid; at most noise_schedule.steps."""


class HeadChangeConfig(Section):
    """A stage of a chain whose student takes its teacher's steps with another head, such as v in place of eps.

    The head turns from the teacher's prediction to its own: before the first update the student is its teacher's function."""

    prediction: Literal["v", "x_0"] = "v"
    """What the student and all after it predict."""
    at_steps: Count | None = None
    """Sampling steps at which the head changes: distill.start_steps or a student's; null: distill.start_steps."""
    updates: Count
    """Optimizer steps of the stage."""
    turn: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of the updates in which the head turns, in (0, 1]; in the rest it settles."""
    learning_rate: Positive = 3e-4
    """Peak learning rate of the stage."""
    clip: bool = True
    """Clip the teacher's clean images to [-1, 1], as samplers do: an eps teacher's are far out where there is noise alone."""


class DistillConfig(Section):
    """A chain of halvings: each stage's student covers two steps of its teacher in one."""

    teacher: str | None = None
    """Run directory, export, stock DDPM pipeline or its Hub id, of the first teacher; null: the chain trains it from this recipe."""
    start_steps: Annotated[int, Field(ge=2)] = 1000
    """Sampling steps of the first teacher; a count of the halving sequence of noise_schedule.steps."""
    end_steps: Count = 1
    """Sampling steps of the last student; a later count of that sequence."""
    target: Sampler = "ddim"
    """ddim: one student step lands where its teacher's covered steps do; ancestral: the teacher's clean image at its last covered level."""
    sampler: Sampler = "ddim"
    """Sampler that the students are meant for; the target unless given."""
    loss: DistillationLoss = "v_mse"
    """Space and weight of the squared error. min_snr all but leaves out the noisiest levels, where students of few steps live."""
    min_snr_gamma: Positive = 5.0
    """Upper bound of the signal-to-noise weight of loss min_snr; dimensionless."""
    clip_target: bool = False
    """Clip the teacher's clean images to [-1, 1] inside the target."""
    stratified: bool = True
    """Spread the students' times evenly over the global batch instead of drawing each alone."""
    skip: Counts | None = None
    """Students left out, counts between start_steps and end_steps: the next one covers four (eight ...) teacher steps; null: none."""
    head_change: HeadChangeConfig | None = None
    """A stage that gives the students another head than their first teacher's; null: they keep it."""
    feature_weight: Positive | None = None
    """Weight of the distance of features in the last two stages, see objective.feature_weight; null: none."""
    teacher_precision: Literal["fp32", "bf16"] | None = None
    """Type of the teachers' activations; null: engine.precision, and fp32 while the head changes."""
    stop_when: StopWhenConfig | None = None
    """End a stage before its updates once its student learns no more; null: never. Wants a constant lr_schedule to pay off."""
    updates: Count | Counts
    """Optimizer steps of a stage: one number for all, or a list with one per stage."""
    learning_rate: Positive | Rates = 3e-4
    """Peak learning rate of a stage: one number for all, or a list with one per stage."""
    lr_schedule: LRScheduleConfig = LinearLRSchedule()
    """Learning-rate schedule of every stage, over its own updates; a warm-up takes a fifth of a stage at most."""
    ema_decay: Fraction = 0.98
    """Decay of the student's moving average, in [0, 1); ema.warmup says whether a short stage's average is a short one."""
    global_batch_size: Count | None = None
    """Images per optimizer step of a stage; null: data.global_batch_size."""
    micro_batch_size: Count | None = None
    """Images per rank per forward of a stage; null: data.micro_batch_size."""
    checkpoint_every_steps: Count | None = None
    """Optimizer steps between two checkpoints of a stage; null: checkpoint.every_steps."""

    @model_validator(mode="before")
    @classmethod
    def _sampler_follows_target(cls, section: object) -> object:
        if isinstance(section, dict) and section.get("target") in get_args(Sampler):  # a wrong word is one mistake, not two
            return {"sampler": section["target"], **section}
        return section

    def problems(self) -> Iterator[Problem]:
        if self.end_steps >= self.start_steps:
            text = f"a chain goes down, but {self.end_steps} is not below start_steps={self.start_steps}; set distill.end_steps=1"
            yield Problem(("end_steps", "start_steps"), text)
