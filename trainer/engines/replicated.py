"""The whole model on every rank: gradients, weights and averages in flat buffers, one reduction a step in a fixed order."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from trainer import dist
from trainer.config import EmaConfig, OptimConfig
from trainer.ema import ema_decay, update_ema
from trainer.engines.engine import LossPerImage, NumericError, StepResult
from trainer.models.tiny_unet import Denoiser, denoiser
from trainer.optim import build_optimizer

_ALIGNMENT = 16  # floats: 64 bytes, a cache line and what vector kernels like


@final
class Replicated:
    """Data parallelism by summing one flat gradient buffer over the ranks.

    The buffer holds the gradients in parameter order from the first step on, then one loss a micro-batch and the wish to
    stop; so a step has one reduction, whose order depends on sizes alone (DDP's buckets change after its first step)."""

    def __init__(
        self,
        module: nn.Module,
        *,
        optim: OptimConfig,
        ema: EmaConfig,
        precision: str,
        memory_format: str,
        micro_batches: int,
        compile: bool = False,
    ) -> None:
        """micro_batches: how many make the global batch; this rank's share is the dist.share of it."""
        self.module = module.to(dist.device()).train()
        self.ema, self.max_gradient_norm, self.micro_batches = ema, optim.max_gradient_norm, micro_batches
        self.precision = torch.bfloat16 if precision == "bf16" else None
        self.layout = _Layout(module, channels_last=memory_format == "channels_last")
        size, device = self.layout.size, dist.device()
        self.weights = torch.zeros(size, device=device)
        self.reduced = torch.zeros(size + micro_batches + 1, device=device)
        self.gradients = self.reduced[:size]
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                view = self.layout.view(self.weights, name)
                view.copy_(parameter)
                parameter.data = view
                parameter.grad = self.layout.view(self.gradients, name)
        self.average = self.weights.clone()
        self.flat = nn.Parameter(self.weights)
        self.flat.grad = self.gradients
        self.optimizer = build_optimizer(optim, [self.flat])
        if compile:
            module.compile()
        self.denoiser = denoiser(module)

    def step(self, step: int, losses: Iterable[LossPerImage], *, learning_rate: float, stop: bool) -> StepResult:
        """See Engine.step."""
        self.reduced.zero_()
        tail = self.reduced[self.layout.size :]
        for index, loss_per_image in zip(dist.share(self.micro_batches), losses, strict=True):
            with self._autocast():
                loss = loss_per_image(self.denoiser).mean()
            (loss / self.micro_batches).backward()
            tail[index] = loss.detach()
        tail[-1] = float(stop)
        dist.all_reduce_sum(self.reduced)
        norm = torch.linalg.vector_norm(self.gradients)
        *loss_list, stops = tail.tolist()
        gradient_norm = norm.item()
        self._check_finite(step, loss_list, gradient_norm)
        if self.max_gradient_norm is not None and gradient_norm > self.max_gradient_norm:
            self.gradients.mul_(self.max_gradient_norm / gradient_norm)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        update_ema(self.average, self.weights, decay=ema_decay(step, decay=self.ema.decay, warmup=self.ema.warmup))
        return StepResult(loss=sum(loss_list) / len(loss_list), gradient_norm=gradient_norm, stop=stops > 0)

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """See Engine.state_tensors."""
        moments = self.optimizer.state.get(self.flat, {})
        optimizer = {
            f"{moment}.{name}": tensor
            for moment in ("exp_avg", "exp_avg_sq")
            for name, tensor in self.layout.named(moments.get(moment, torch.zeros_like(self.weights))).items()
        }
        return {"model": self.layout.named(self.weights), "ema": self.layout.named(self.average), "optimizer": optimizer}

    def load_state_tensors(self, parts: Mapping[str, Mapping[str, Tensor]], *, step: int) -> None:
        """See Engine.load_state_tensors."""
        self.layout.fill(self.weights, parts["model"], "model")
        self.layout.fill(self.average, parts["ema"], "ema")
        moments = {}
        for moment in ("exp_avg", "exp_avg_sq"):
            named = {name.removeprefix(f"{moment}."): t for name, t in parts["optimizer"].items() if name.startswith(f"{moment}.")}
            moments[moment] = torch.zeros_like(self.weights)
            self.layout.fill(moments[moment], named, f"optimizer {moment}")
        self.optimizer.state[self.flat] = {"step": torch.tensor(float(step), device=self.weights.device), **moments}

    def raw(self) -> Denoiser:
        """See Engine.raw."""

        @torch.inference_mode()
        def evaluate(x_t: Tensor, timestep: Tensor) -> Tensor:
            self.module.eval()
            with self._autocast():
                prediction = denoiser(self.module)(x_t, timestep)
            self.module.train()
            return prediction.float()

        return evaluate

    @contextmanager
    def averaged(self) -> Iterator[Denoiser]:
        """See Engine.averaged."""
        trained = self.weights.clone()
        self.weights.copy_(self.average)
        try:
            yield self.raw()
        finally:
            self.weights.copy_(trained)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.weights.device.type, self.precision or torch.bfloat16, enabled=self.precision is not None)

    def _check_finite(self, step: int, losses: list[float], gradient_norm: float) -> None:
        """Losses and gradients are the same numbers on all ranks here, so all raise or none does."""
        total = sum(losses) + gradient_norm
        if total - total != 0:
            bad = [index for index, loss in enumerate(losses) if loss - loss != 0]
            where = f"the loss of micro-batches {bad}" if bad else "the gradient (all losses are finite)"
            raise NumericError(
                f"step {step}: {where} is not finite; no weight was changed. Start again in a new --run-dir with a lower "
                "optim.learning_rate or with engine.precision=fp32"
            )


@final
class _Layout:
    """Where each parameter lies in a flat buffer: module order, each start on a cache line."""

    def __init__(self, module: nn.Module, *, channels_last: bool) -> None:
        self.channels_last = channels_last
        self.shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        self.starts, self.size = {}, 0
        for name, shape in self.shapes.items():
            self.starts[name] = self.size
            self.size += -(-shape.numel() // _ALIGNMENT) * _ALIGNMENT

    def view(self, flat: Tensor, name: str) -> Tensor:
        """The parameter's part of a flat buffer, in the parameter's shape and the model's memory format."""
        shape, start = self.shapes[name], self.starts[name]
        part = flat[start : start + shape.numel()]
        if self.channels_last and len(shape) == 4:
            out_channels, in_channels, height, width = shape
            return part.view(out_channels, height, width, in_channels).permute(0, 3, 1, 2)
        return part.view(shape)

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """All parameters' parts by name."""
        return {name: self.view(flat, name) for name in self.shapes}

    def fill(self, flat: Tensor, named: Mapping[str, Tensor], what: str) -> None:
        """Copy named tensors into a flat buffer.

        Raises: ValueError where names or shapes are not those of the model."""
        wanted = {name: tuple(shape) for name, shape in self.shapes.items()}
        got = {name: tuple(tensor.shape) for name, tensor in named.items()}
        if wanted != got:
            odd = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))[:3]
            detail = "; ".join(f"{name}: got {got.get(name)}, wanted {wanted.get(name)}" for name in odd)
            raise ValueError(f"{what} tensors do not fit the model: {detail}; the checkpoint belongs to another recipe")
        with torch.no_grad():
            for name, tensor in named.items():
                self.view(flat, name).copy_(tensor)
