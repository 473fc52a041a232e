"""What a plan is made of: how a network is built and called, and who trains it. Small enough to fill in by hand."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

from torch import nn

from trainer.config import EmaConfig, EngineConfig, OptimConfig
from trainer.optim_8bit import BLOCK

DType = Literal["fp32", "bf16", "fp16"]
BYTES: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}


@final
@dataclass(frozen=True)
class Frozen:
    """A frozen model beside the trained one, whole on every rank unless it is shared among them."""

    name: str
    parameters: int
    precision: DType = "fp32"
    work_bytes: int = 0
    """Largest sum of the tensors that live while it computes a micro-batch, its weights aside; 0: not known."""
    flops_per_image: int = 0
    """Operations of what it computes for one image in every step."""

    @property
    def size_bytes(self) -> int:
        """Of its weights."""
        return self.parameters * BYTES[self.precision]


@final
@dataclass(frozen=True)
class Shapes:
    """Shapes of the network's inputs for ONE image, without the batch's axis."""

    x_t: tuple[int, ...]
    cond: Mapping[str, tuple[int, ...]] | None = None
    """None: the network takes (x_t, timestep) alone."""


@final
@dataclass(frozen=True)
class PlanInput:
    """A run as far as its memory, traffic and time go."""

    build: Callable[[], nn.Module]
    """The network that is trained, requires_grad set; called under FakeTensorMode and on the meta device, where weights have no memory."""
    units: Callable[[nn.Module], Sequence[nn.Module]]
    """The parts that a sharded engine gathers at a time."""
    enable_checkpointing: Callable[[nn.Module], None]
    shapes: Shapes
    engine: EngineConfig
    micro_batch_size: int
    micro_batches: int
    """Of an optimizer step over all ranks; a multiple of world_size."""
    world_size: int
    ranks_per_node: int
    on_gpu: bool
    """Activations are as CUDA's kernels keep them; False: the CPU's."""
    activation_checkpointing: bool = False
    memory_format: str = "contiguous"
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    frozen: tuple[Frozen, ...] = ()
    drawing: tuple[Frozen, ...] = ()
    """What else stays on every rank's device once the run has drawn its first pictures, whole whatever the ranks."""
    steps: int = 1
    """Optimizer steps of the run."""
    keep_checkpoints: int = 2
    """Checkpoints that lie on the disk at a time."""
    compute_factor: float = 1.0
    """Time of a step's mathematics relative to what its operations say; above 1 for ways that only cost time."""
    variants: Mapping[str, Callable[["PlanInput"], "PlanInput"]] = field(default_factory=dict)
    """Ways out of too little memory that only this kind of model has, by the change of the recipe that takes them."""

    @property
    def moment_bytes(self) -> float:
        """Of one element of one of Adam's two moments, its share of a block's fp32 scale included."""
        return 1 + 4 / BLOCK if self.optim.kind == "adamw_8bit" else 4.0

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank in an optimizer step."""
        return self.micro_batches // self.world_size

    @property
    def global_batch_size(self) -> int:
        """Images of an optimizer step."""
        return self.micro_batches * self.micro_batch_size

    @property
    def averages(self) -> int:
        """Moving averages of the weights."""
        return 1 + len(self.ema.more_decays)
