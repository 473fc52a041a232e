"""The engine does what a plain loop does, and nothing when a number is not finite."""

import copy

import pytest
import torch
from torch import nn

from trainer.config import EmaConfig, OptimConfig, TinyUNetConfig
from trainer.ema import ema_decay
from trainer.engines.engine import NumericError
from trainer.engines.replicated import Replicated
from trainer.models.tiny_unet import Denoiser, build_tiny_unet, denoiser

# A large eps: where a gradient is rounding noise, as before a group norm, Adam would blow that up to whole steps.
OPTIM = OptimConfig(learning_rate=1e-2, max_gradient_norm=0.5, eps=1e-3)
EMA = EmaConfig(decay=0.9)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return build_tiny_unet(TinyUNetConfig(channels=(8, 16), attention=(False, True), attention_heads=2), 8)


def _engine(model: nn.Module, *, memory_format: str = "contiguous") -> Replicated:
    return Replicated(model, optim=OPTIM, ema=EMA, precision="fp32", memory_format=memory_format, micro_batches=2)


def _losses(step: int, scale: float = 1.0):
    stream = torch.Generator().manual_seed(step)
    for _ in range(2):
        x = torch.randn(2, 3, 8, 8, generator=stream)

        def loss(model: Denoiser, x: torch.Tensor = x) -> torch.Tensor:
            return scale * (model(x, torch.tensor([5.0, 900.0])) - x).square().mean(dim=(1, 2, 3))

        yield loss


def _plain_loop(model: nn.Module, steps: int) -> dict[str, torch.Tensor]:
    """The same by torch's own parts: per-parameter AdamW, clip_grad_norm_, an average a parameter."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    average = copy.deepcopy(model)
    for step in range(steps):
        optimizer.zero_grad()
        for loss in _losses(step):
            (loss(denoiser(model)).mean() / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
            mean.data.lerp_(weight.data, 1 - ema_decay(step, decay=0.9, warmup=True))
    return {name: parameter.detach() for name, parameter in average.named_parameters()}


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_three_steps_equal_those_of_a_plain_loop(memory_format: str) -> None:
    wanted = _plain_loop(_model(), 3)
    engine = _engine(_model(), memory_format=memory_format)
    for step in range(3):
        engine.step(step, _losses(step), learning_rate=1e-2, stop=False)
    for name, tensor in engine.state_tensors()["ema"].items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)


def test_a_restored_engine_goes_on_bit_for_bit() -> None:
    engine = _engine(_model())
    for step in range(2):
        engine.step(step, _losses(step), learning_rate=1e-2, stop=False)
    saved = {part: {name: tensor.clone() for name, tensor in tensors.items()} for part, tensors in engine.state_tensors().items()}
    fresh = _engine(_model())
    fresh.load_state_tensors(saved, step=2)
    results = [each.step(2, _losses(2), learning_rate=1e-2, stop=False) for each in (engine, fresh)]
    assert results[0] == results[1]
    for part, tensors in engine.state_tensors().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, fresh.state_tensors()[part][name]), f"{part} {name}"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_changes_no_weight(bad: float) -> None:
    engine = _engine(_model())
    engine.step(0, _losses(0), learning_rate=1e-2, stop=False)
    before = {part: {name: tensor.clone() for name, tensor in tensors.items()} for part, tensors in engine.state_tensors().items()}
    with pytest.raises(NumericError, match="step 1: the loss of micro-batches \\[0, 1\\] is not finite"):
        engine.step(1, _losses(1, scale=bad), learning_rate=1e-2, stop=False)
    for part, tensors in engine.state_tensors().items():
        assert all(torch.equal(tensor, before[part][name]) for name, tensor in tensors.items()), part


def test_the_wish_to_stop_is_told() -> None:
    engine = _engine(_model())
    assert not engine.step(0, _losses(0), learning_rate=1e-2, stop=False).stop
    assert engine.step(1, _losses(1), learning_rate=1e-2, stop=True).stop


def test_averaged_weights_are_lent_and_the_trained_ones_come_back() -> None:
    engine = _engine(_model())
    for step in range(3):
        engine.step(step, _losses(step), learning_rate=1e-2, stop=False)
    x, time = torch.randn(1, 3, 8, 8), torch.tensor([500.0])
    before = engine.raw()(x, time)
    with engine.averaged() as averaged:
        assert not torch.equal(averaged(x, time), before)
    assert torch.equal(engine.raw()(x, time), before)


def test_state_of_another_model_is_refused_by_name() -> None:
    engine = _engine(_model())
    state = engine.state_tensors()
    model = {name: tensor for name, tensor in state["model"].items() if name != "conv_in.bias"}
    with pytest.raises(ValueError, match=r"conv_in\.bias: got None, wanted \(8,\)"):
        engine.load_state_tensors({**state, "model": model}, step=1)
