"""The engine does what a plain loop does, and nothing when a number is bad."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trainer.checkpoint import agree_on_pieces, load_state
from trainer.config import EmaConfig, OptimConfig, TinyUNetConfig
from trainer.ema import ema_decay
from trainer.engines.engine import State, StepResult
from trainer.engines.precision import check_precision
from trainer.engines.replicated import Replicated
from trainer.manifest import Retention, newest_checkpoint
from trainer.models.network import network
from trainer.models.tiny_unet import Denoiser, build_tiny_unet
from trainer.save import Saver

# A large eps: where a gradient is rounding noise, as before a group norm, Adam would blow that up to whole steps.
OPTIM = OptimConfig(learning_rate=1e-2, max_gradient_norm=0.5, eps=1e-3)
EMA = EmaConfig(decay=0.9)
TWO_RATES = EmaConfig(decay=0.9, more_decays=(0.5,), warmup=False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As a rank has on the CPU: on a busy machine two threads wait for each other, ten times as long as they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _model(*, frozen: bool = False) -> nn.Module:
    """frozen: all but the attention layers are."""
    torch.manual_seed(0)
    model = build_tiny_unet(TinyUNetConfig(channels=(8, 16), attention=(False, True), attention_heads=2), 8)
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("attentions" in name)
    return model


def _engine(model: nn.Module, *, memory_format: str = "contiguous", precision: str = "fp32", ema: EmaConfig = EMA) -> Replicated:
    return Replicated(model, optim=OPTIM, ema=ema, precision=precision, memory_format=memory_format, micro_batches=2)


def _losses(step: int, scale: float = 1.0):
    stream = torch.Generator().manual_seed(step)
    for _ in range(2):
        x = torch.randn(2, 3, 8, 8, generator=stream)

        def loss(model: Denoiser, x: Tensor = x) -> Tensor:
            return scale * (model(x, torch.tensor([5.0, 900.0])).float() - x).square().mean(dim=(1, 2, 3))

        yield loss


def _step(engine: Replicated, step: int, *, scale: float = 1.0, vote: float = 0.0, loss_limit: float | None = None) -> StepResult:
    return engine.step(step, _losses(step, scale), learning_rate=1e-2, votes=(vote,), loss_limit=loss_limit)


def _copy(state: State) -> dict[str, dict[str, Tensor]]:
    return {part: {name: shard.values.clone() for name, shard in shards.items()} for part, shards in state.items()}


def _assert_same(left: dict[str, dict[str, Tensor]], right: dict[str, dict[str, Tensor]]) -> None:
    assert left.keys() == right.keys()
    for part, tensors in left.items():
        assert tensors.keys() == right[part].keys()
        different = [name for name, tensor in tensors.items() if not torch.equal(tensor, right[part][name])]
        assert different == [], part


def _plain_loop(model: nn.Module, steps: int) -> dict[str, Tensor]:
    """The same by torch's own parts: per-parameter AdamW, clip_grad_norm_, an average a parameter."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2, eps=1e-3, weight_decay=0.0)
    average = copy.deepcopy(model)
    for step in range(steps):
        optimizer.zero_grad()
        for loss in _losses(step):
            (loss(network(model)).mean() / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
            mean.data.lerp_(weight.data, 1 - ema_decay(step, decay=0.9, warmup=True))
    return {name: parameter.detach() for name, parameter in average.named_parameters()}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_three_steps_equal_those_of_a_plain_loop(memory_format: str, frozen: bool) -> None:
    wanted = _plain_loop(_model(frozen=frozen), 3)
    engine = _engine(_model(frozen=frozen), memory_format=memory_format)
    results = [_step(engine, step) for step in range(3)]
    assert [result.outcome for result in results] == ["applied"] * 3
    for name, shard in engine.state()["ema"].items():
        torch.testing.assert_close(shard.values, wanted[name], rtol=1e-4, atol=1e-5)


def test_frozen_parameters_stay_and_are_not_in_the_state() -> None:
    model = _model(frozen=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    engine = _engine(model)
    for step in range(2):
        _step(engine, step)
    assert 0 < len(trained) < len(before)
    assert engine.state()["model"].keys() == engine.state()["ema"].keys() == trained
    assert engine.state()["optimizer"].keys() == {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in trained}
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved <= trained
    # Softmax ignores the keys' bias: its gradient is 0 but for rounding.
    assert all(name.endswith("to_k.bias") for name in trained - moved)
    assert all(model.get_parameter(name).grad is None for name in before.keys() - trained)


def test_every_average_has_its_own_rate() -> None:
    engine = _engine(_model(), ema=TWO_RATES)
    averages = {rate: _copy(engine.state())["model"] for rate in (0.9, 0.5)}
    for step in range(3):
        _step(engine, step)
        for rate, average in averages.items():
            for name, shard in engine.state()["model"].items():
                average[name].mul_(rate).add_(shard.values, alpha=1 - rate)
    for part, rate in (("ema", 0.9), ("ema_1", 0.5)):
        for name, shard in engine.state()[part].items():
            torch.testing.assert_close(shard.values, averages[rate][name], rtol=1e-5, atol=1e-6)


def test_a_restored_engine_goes_on_bit_for_bit() -> None:
    engine = _engine(_model(), ema=TWO_RATES)
    for step in range(2):
        _step(engine, step)
    saved = _copy(engine.state())
    fresh = _engine(_model(), ema=TWO_RATES)
    for part, shards in fresh.state().items():
        for name, shard in shards.items():
            shard.values.copy_(saved[part][name])
    fresh.restored({})
    assert _step(engine, 2) == _step(fresh, 2)
    _assert_same(_copy(engine.state()), _copy(fresh.state()))


@pytest.mark.parametrize(("first", "second"), [("channels_last", "channels_last"), ("channels_last", "contiguous")])
def test_a_checkpoint_holds_the_same_tensors_in_any_memory_format(tmp_path: Path, first: str, second: str) -> None:
    engine = _engine(_model(), memory_format=first)
    for step in range(2):
        _step(engine, step)
    pieces = agree_on_pieces(engine.state())
    keep = Retention(keep_last=2, keep_every_steps=None, keep_best=0)
    saver = Saver(tmp_path, engine.state(), pieces, retention=keep, asynchronous=False, timeout_seconds=60.0)
    saver.start(2, {})
    saver.finish()
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    fresh = _engine(_model(), memory_format=second)
    load_state(checkpoint, fresh.state(), agree_on_pieces(fresh.state()))
    fresh.restored({})
    _assert_same(_copy(engine.state()), _copy(fresh.state()))
    if first == second:
        assert _step(engine, 2) == _step(fresh, 2)
        _assert_same(_copy(engine.state()), _copy(fresh.state()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_changes_nothing(bad: float) -> None:
    engine = _engine(_model(), ema=TWO_RATES)
    _step(engine, 0)
    before = _copy(engine.state())
    result = _step(engine, 1, scale=bad)
    assert result.outcome == "bad" and not any(math.isfinite(loss) for loss in result.losses)
    _assert_same(_copy(engine.state()), before)


def test_an_infinite_gradient_of_finite_losses_changes_nothing() -> None:
    engine = _engine(_model())
    _step(engine, 0)
    before = _copy(engine.state())

    def loss(model: Denoiser) -> Tensor:
        # the root's slope at 0 is infinite
        return (model(torch.ones(2, 3, 8, 8), torch.tensor([5.0, 900.0])) * 0.0).abs().mean(dim=(1, 2, 3)).sqrt()

    result = engine.step(1, [loss, loss], learning_rate=1e-2, votes=(0.0,))
    assert result.outcome == "bad" and result.losses == (0.0, 0.0) and not math.isfinite(result.gradient_norm)
    _assert_same(_copy(engine.state()), before)


def test_a_loss_above_its_limit_changes_nothing_and_one_below_counts() -> None:
    engine = _engine(_model())
    loss = _step(engine, 0).loss
    before = _copy(engine.state())
    result = _step(engine, 1, scale=10.0, loss_limit=3 * loss)
    assert result.outcome == "bad" and math.isfinite(result.loss) and result.loss > 3 * loss
    _assert_same(_copy(engine.state()), before)
    assert _step(engine, 2, loss_limit=3 * loss).outcome == "applied"


def test_a_bad_step_leaves_no_trace_in_the_steps_after_it() -> None:
    """As if the bad step had not been computed; only its number is used up."""
    engine, undisturbed = _engine(_model()), _engine(_model())
    for each in (engine, undisturbed):
        _step(each, 0)
    _step(engine, 1, scale=math.nan)
    assert _step(engine, 2) == _step(undisturbed, 2)
    _assert_same(_copy(engine.state()), _copy(undisturbed.state()))


def test_an_fp16_overflow_lowers_the_scale_and_changes_no_weight() -> None:
    engine = _engine(_model(), precision="fp16")
    assert engine.loss_scale() == {"value": 65536.0, "good_steps": 0}
    before = _copy(engine.state())
    result = _step(engine, 0, scale=1e5)  # times the scale, its gradient is beyond fp16
    assert result.outcome == "overflow" and all(map(math.isfinite, result.losses))
    _assert_same(_copy(engine.state()), before)
    assert engine.loss_scale() == {"value": 32768.0, "good_steps": 0}
    assert _step(engine, 1).outcome == "applied"
    assert engine.loss_scale() == {"value": 32768.0, "good_steps": 1}


def test_a_loss_that_is_nan_is_bad_in_fp16_too_and_keeps_the_scale() -> None:
    engine = _engine(_model(), precision="fp16")
    before = _copy(engine.state())
    assert _step(engine, 0, scale=math.nan).outcome == "bad"
    assert engine.loss_scale() == {"value": 65536.0, "good_steps": 0}
    _assert_same(_copy(engine.state()), before)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_steps_of_a_lower_precision_are_near_those_of_fp32(precision: str) -> None:
    engine, exact = _engine(_model(), precision=precision), _engine(_model())
    for step in range(2):
        lower, full = _step(engine, step), _step(exact, step)
        assert lower.outcome == full.outcome == "applied"
        assert lower.loss == pytest.approx(full.loss, rel=0.03)
        assert lower.gradient_norm == pytest.approx(full.gradient_norm, rel=0.1)


def test_the_loss_scale_is_restored() -> None:
    engine = _engine(_model(), precision="fp16")
    engine.restored({"value": 1024.0, "good_steps": 1999})
    assert _step(engine, 7).outcome == "applied"
    assert engine.loss_scale() == {"value": 2048.0, "good_steps": 0}


def test_a_precision_that_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_precision("fp32")
    check_precision("bf16")

    def refuse(*_: object, **__: object) -> Tensor:
        raise RuntimeError("could not create a primitive\nmore")

    monkeypatch.setattr(nn.Conv2d, "forward", refuse)
    with pytest.raises(
        ValueError,
        match=r"^engine.precision=fp16: cpu cannot compute in it \(could not create a primitive\); set engine.precision=fp32$",
    ):
        check_precision("fp16")


def test_votes_are_added_up_and_told_whatever_the_step_comes_to() -> None:
    engine = _engine(_model())
    assert _step(engine, 0).votes == (0.0,)
    assert _step(engine, 1, vote=1.0).votes == (1.0,)
    result = _step(engine, 2, vote=1.0, scale=math.nan)
    assert (result.outcome, result.votes) == ("bad", (1.0,))


def test_averaged_weights_are_lent_and_the_trained_ones_come_back() -> None:
    engine = _engine(_model())
    for step in range(3):
        _step(engine, step)
    x, time = torch.randn(1, 3, 8, 8), torch.tensor([500.0])
    before = engine.raw()(x, time)
    with engine.averaged() as averaged:
        assert not torch.equal(averaged(x, time), before)
    assert torch.equal(engine.raw()(x, time), before)
