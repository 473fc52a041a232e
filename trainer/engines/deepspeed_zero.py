"""DeepSpeed's ZeRO 1, 2 and 3 as an engine: DeepSpeed reduces and gathers, judging and clipping are as on the other engines."""

import fcntl
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import cast, final

import torch
from torch import Tensor, nn

from data_shards import ranks
from trainer.config import EmaConfig, OptimConfig
from trainer.engines.engine import LossPerImage, Outcome, State, StepResult
from trainer.engines.local_state import LocalState
from trainer.engines.precision import autocast, evaluation
from trainer.engines.zero_partitions import ZeroOptimizer, bucket_elements, partitions, places, publish
from trainer.models.network import Network, network
from trainer.optim import build_optimizer
from trainer.spans import span

logger = logging.getLogger(__name__)


def zero_config(
    *, stage: int, micro_batch_size: int, accumulation: int, cpu_offload: bool, force_own_adam: bool, trained: int
) -> dict[str, object]:
    """DeepSpeed's configuration, derived from the recipe.

    Precision, loss scale and clipping are left to the engine's own code: DeepSpeed sees fp32 parameters and no clipping.
    force_own_adam: refuse to offload with an optimizer other than DeepSpeed's CPU Adam. trained: elements of the trained parameters."""
    zero: dict[str, object] = {
        "stage": stage,
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket_elements(trained),
    }
    if cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch_size * accumulation * ranks.world_size(),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": cpu_offload and force_own_adam,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**62,
    }


@final
class DeepSpeedZero:
    """Data parallelism by DeepSpeed: stage 1 shares the optimizer among the ranks, 2 gradients too, 3 weights too."""

    def __init__(
        self,
        module: nn.Module,
        *,
        stage: int,
        optim: OptimConfig,
        ema: EmaConfig,
        precision: str,
        memory_format: str,
        micro_batches: int,
        micro_batch_size: int,
        cpu_offload: bool = False,
        compile: bool = False,
    ) -> None:
        """Raises: ValueError if DeepSpeed is not installed."""
        self.module, self.precision, self.micro_batches = module.to(ranks.device()).train(), precision, micro_batches
        self.stage, self.gradient_norm = stage, 0.0
        self.memory_format = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[memory_format]
        deepspeed = _import_deepspeed()
        trained: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = _cpu_adam(optim, trained) if cpu_offload else None
        config = zero_config(
            stage=stage,
            micro_batch_size=micro_batch_size,
            accumulation=micro_batches // ranks.world_size(),
            cpu_offload=cpu_offload,
            force_own_adam=optimizer is not None,
            trained=sum(parameter.numel() for parameter in trained),
        )
        optimizer = optimizer or build_optimizer(optim, trained)
        # DeepSpeed calls the optimizer in the middle of its step, once the gradient and its norm are whole; there we judge and clip.
        self.allow: Callable[[], bool] = lambda: False
        self.update = optimizer.step
        optimizer.step = self._guarded_update  # type: ignore[method-assign]
        self.deepspeed, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
        if compile:
            self.deepspeed.compile()
        self.zero = cast("ZeroOptimizer", self.deepspeed.optimizer)
        weights = partitions(self.zero, stage=stage)
        self.local = LocalState(
            weights, places(module, self.zero, stage=stage), optimizer=optimizer, optim=optim, ema=ema, precision=precision
        )
        self.network = network(self.deepspeed)

    def step(
        self, step: int, losses: Iterable[LossPerImage], *, learning_rate: float, votes: Sequence[float], loss_limit: float | None = None
    ) -> StepResult:
        """See Engine.step."""
        sums = torch.zeros(self.micro_batches + len(votes), device=ranks.device())
        sums[self.micro_batches :] = torch.tensor(votes)
        share = ranks.share(self.micro_batches)
        self.local.prepare(step, learning_rate=learning_rate)
        for index, loss_per_image in zip(share, losses, strict=True):
            with span("forward"), autocast(self.precision):
                loss = loss_per_image(self._predict).mean()
            # DeepSpeed divides by the accumulation and takes the mean over the ranks: together, by all micro-batches.
            with span("backward"):
                self.deepspeed.backward(loss * self.local.scale.value if self.local.scale.enabled else loss)
            sums[index] = loss.detach()
            if index != share[-1]:
                self.deepspeed.step()
        with span("reduction"):
            ranks.all_reduce_sum(sums)
            numbers = sums.tolist()
        loss_list, told = numbers[: self.micro_batches], numbers[self.micro_batches :]
        # What stays so if DeepSpeed itself finds that the gradient is not finite: it clears it then, and updates nothing.
        self.gradient_norm = float("inf")
        outcome: Outcome = self.local.judge(loss_list, self.gradient_norm, loss_limit=loss_limit)

        def allow() -> bool:
            nonlocal outcome
            self.gradient_norm = float(self.zero._global_grad_norm) / self.local.scale.value
            outcome = self.local.judge(loss_list, self.gradient_norm, loss_limit=loss_limit)
            return outcome == "applied"

        self.allow = allow
        with span("reduction"):  # without what the optimizer takes in it
            self.deepspeed.step()
        self.local.finish(step, outcome)
        return StepResult(outcome, tuple(loss_list), self.gradient_norm, tuple(told))

    def state(self) -> State:
        """See Engine.state."""
        return self.local.shards()

    def restored(self, loss_scale: Mapping[str, float]) -> None:
        """See Engine.restored."""
        self.local.scale.restore(loss_scale)
        publish(self.zero, stage=self.stage)

    def loss_scale(self) -> Mapping[str, float]:
        """See Engine.loss_scale."""
        return self.local.scale.to_json()

    def raw(self) -> Network:
        """See Engine.raw."""
        return evaluation(self.module, network(self.module), self.precision)

    @contextmanager
    def averaged(self) -> Iterator[Network]:
        """See Engine.averaged."""
        with self.local.averaged():
            publish(self.zero, stage=self.stage)
            yield self.raw()
        publish(self.zero, stage=self.stage)

    def _predict(self, x_t: Tensor, *others: object) -> Tensor:
        return self.network(x_t.contiguous(memory_format=self.memory_format), *others)

    def _guarded_update(self) -> None:
        """The optimizer's own update, on clipped gradients, unless the step was judged bad."""
        if not self.allow():
            return
        gradients = [buffer.grad for group in self.local.optimizer.param_groups for buffer in group["params"] if buffer.grad is not None]
        with span("clip and optimizer"):
            self.local.clip(gradients, self.gradient_norm)
            self.update()


def _import_deepspeed():
    """DeepSpeed, quiet, on this rank's kind of device. Raises: ValueError if it is not installed."""
    if find_spec("deepspeed") is None:
        raise ValueError("engine.kind=deepspeed: DeepSpeed is not installed; pip install 'halfstep[deepspeed]', or set engine.kind=fsdp")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # DeepSpeed calls two of torch.distributed's functions by names that torch has begun to replace.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Half a minute of compiling for an all-reduce in shared memory that only inference uses; gloo reduces here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _cpu_adam(optim: OptimConfig, parameters: list[Tensor]) -> torch.optim.Optimizer | None:
    """DeepSpeed's Adam for moments in the host's memory; None, said in the log, where its kernel cannot be built."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        with _alone_with_kernels():
            return DeepSpeedCPUAdam(
                parameters,
                lr=optim.learning_rate,
                betas=optim.betas,
                eps=optim.eps,
                weight_decay=optim.weight_decay,  # type: ignore[arg-type]  # annotated as int, by its default of 0
                adamw_mode=optim.kind == "adamw",
            )
    except (RuntimeError, OSError, ImportError) as error:
        logger.warning("DeepSpeed's CPU Adam cannot be built here (%s); PyTorch's is used", str(error).splitlines()[0])
        return None


@contextmanager
def _alone_with_kernels() -> Iterator[None]:
    """One process of this user at a time compiles or loads a kernel, in a folder of halfstep's own.

    A process that is killed while it compiles leaves a file `lock` there, for which torch would wait for ever. Under our lock, which
    ends with its holder, such a file is nobody's."""
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "halfstep" / "torch_extensions")))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "halfstep.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.glob("*/lock"):
            left.unlink()
        yield
