"""Moments of 8 bits: stored without drift, small, near plain AdamW, and whole in checkpoints."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from trainer.checkpoint import agree_on_pieces, load_state, named_shards, read_tensors
from trainer.config import EmaConfig, OptimConfig, TinyUNetConfig
from trainer.engines.engine import Engine, State
from trainer.engines.replicated import Replicated
from trainer.manifest import Checkpoint, Retention, newest_checkpoint
from trainer.models.network import Network
from trainer.models.tiny_unet import build_tiny_unet
from trainer.optim_8bit import BLOCK, AdamW8bit, Moment, Span, dynamic_values
from trainer.save import Saver

Kind = Literal["adamw", "adamw_8bit"]
EMA = EmaConfig(decay=0.9)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As a rank has on the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _engine(kind: Kind, *, memory_format: str = "contiguous", channels: tuple[int, ...] = (8, 16)) -> Replicated:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_tiny_unet(TinyUNetConfig(channels=channels, attention=(False, True), attention_heads=2), 8)
    optim = OptimConfig(kind=kind, weight_decay=0.01)
    return Replicated(model, optim=optim, ema=EMA, precision="fp32", memory_format=memory_format, micro_batches=1)


def _step(engine: Engine, step: int, *, scale: float = 1.0) -> float:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))

    def loss(model: Network) -> Tensor:
        return scale * (model(x, torch.tensor([5.0, 300.0, 600.0, 900.0])) - x).square().mean(dim=(1, 2, 3))

    return engine.step(step, [loss], learning_rate=1e-3, votes=(0.0,), loss_limit=None).loss


def _copy(state: State) -> dict[str, Tensor]:
    shards = named_shards(state)
    return {name: (shard.packed.unpack() if shard.packed else shard.values).clone() for name, shard in shards.items()}


def _save(folder: Path, engine: Replicated, step: int) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    keep = Retention(keep_last=2, keep_every_steps=None, keep_best=0)
    saver = Saver(folder, engine.state(), agree_on_pieces(engine.state()), retention=keep, asynchronous=False, timeout_seconds=60.0)
    saver.start(step, {})
    saver.finish()
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint


def _resumed(checkpoint: Checkpoint, engine: Replicated) -> Replicated:
    load_state(checkpoint, engine.state(), agree_on_pieces(engine.state()))
    engine.restored({})
    return engine


def _different(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name, tensor in left.items() if not torch.equal(tensor, right[name])]


def _blocks(count: int, *, signed: bool) -> Tensor:
    """Of all magnitudes: blocks from 1e-45 to 1e38, elements of a block over nine orders, some of them 0."""
    generator = torch.Generator().manual_seed(count)
    sizes = 10 ** torch.linspace(-45, 38, count, dtype=torch.float64)[:, None]
    spread = 10 ** (-9 * torch.rand(count, BLOCK, generator=generator, dtype=torch.float64))
    values = (sizes * spread * torch.randn(count, BLOCK, generator=generator, dtype=torch.float64).clamp(-2, 2)).float()
    values[:, ::17] = 0
    return values if signed else values.abs()


@pytest.mark.parametrize("signed", [True, False])
def test_codes_stand_for_numbers_from_1_downwards_ever_finer(signed: bool) -> None:
    values = torch.from_numpy(dynamic_values(signed=signed))
    positive = values[1:128] if signed else values[1:]
    assert values[0] == 0 and positive[-1] == 1 and (positive.diff() > 0).all()
    assert positive[0] == pytest.approx(1e-6 if signed else 1e-7)
    if signed:
        assert torch.equal(values[129:], -positive.flip(0))


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_with_every_scale_comes_back_as_itself(signed: bool) -> None:
    """The proof of an exact resume: whatever a moment can hold, quantising what is read of it changes neither code nor scale."""
    values = torch.from_numpy(dynamic_values(signed=signed))
    codes = [code for code in range(256) if not (signed and code == 128)]  # of 128 there is no negative; it is not used
    scales = torch.logspace(-100, 127.9, 4000, base=2.0)
    blocks = torch.zeros(len(scales), BLOCK)
    blocks[:, : len(codes)] = values[codes] * scales[:, None]
    moment = Moment(len(scales), signed=signed, like=blocks)
    moment.write(0, blocks)
    assert torch.equal(moment.scales, scales)
    wanted = torch.tensor(codes, dtype=torch.uint8).expand(len(scales), -1)
    assert torch.equal(moment.codes.view(torch.uint8)[:, : len(codes)], wanted)
    assert torch.equal(moment.read(0, len(scales)), blocks)


@pytest.mark.parametrize("signed", [True, False])
def test_quantising_again_changes_nothing_and_the_first_time_is_near(signed: bool) -> None:
    blocks = _blocks(3000, signed=signed)
    moment = Moment(len(blocks), signed=signed, like=blocks)
    moment.write(0, blocks)
    once, codes, scales = moment.read(0, len(blocks)), moment.codes.clone(), moment.scales.clone()
    moment.write(0, once)
    assert torch.equal(moment.codes, codes) and torch.equal(moment.scales, scales) and torch.equal(moment.read(0, len(blocks)), once)
    # Half of the widest step between two numbers of the table, and half of a cell of 2^-12.
    largest = blocks.abs().amax(1, keepdim=True).clamp_min(2.0**-100)
    assert ((once - blocks).abs() / largest).max() <= (0.9 / 64 if signed else 0.9 / 128) / 2 + 2**-13
    assert torch.equal(once == 0, blocks == 0) if not signed else not once[blocks == 0].any()


def test_the_largest_of_a_block_keeps_its_value_whatever_its_sign() -> None:
    blocks = torch.linspace(-3, 2, 2 * BLOCK).view(2, BLOCK)
    moment = Moment(2, signed=True, like=blocks)
    moment.write(0, blocks)
    assert moment.read(0, 2)[0, 0] == -3 and moment.read(0, 2)[1, -1] == 2


def test_a_first_step_is_that_of_adamw_on_spans_of_any_length() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (1, 255, 256, 300, 1_100_000)
    buffers = [nn.Parameter(torch.randn(length + 3, generator=generator)) for length in lengths]
    plain = [nn.Parameter(buffer.detach().clone()) for buffer in buffers]
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    narrow, wide = AdamW8bit(buffers, **options), torch.optim.AdamW(plain, **options)
    firsts = narrow.lay_out([Span(buffer, 2, length) for buffer, length in zip(buffers, lengths, strict=True)])
    assert firsts == [0, 1, 2, 3, 5]
    for buffer, other in zip(buffers, plain, strict=True):
        narrow.state[buffer]["step"] = 0
        buffer.grad = torch.randn(buffer.shape, generator=generator)
        other.grad = buffer.grad.clone()
    before = [buffer.detach().clone() for buffer in buffers]
    narrow.step()
    wide.step()
    for buffer, other, old, length in zip(buffers, plain, before, lengths, strict=True):
        torch.testing.assert_close(buffer[2 : length + 2], other[2 : length + 2], rtol=1e-6, atol=1e-7)
        assert torch.equal(buffer[:2], old[:2]) and torch.equal(buffer[length + 2 :], old[length + 2 :])


def test_a_call_for_one_large_buffer_leaves_the_others_alone() -> None:
    """As ZeRO-3 calls the optimizer, for a part of the weights at a time."""
    buffers = [nn.Parameter(torch.ones(1_100_000)) for _ in range(2)]
    optimizer = AdamW8bit(buffers, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    optimizer.lay_out([Span(buffer, 0, 1_100_000) for buffer in buffers])
    for buffer in buffers:
        optimizer.state[buffer]["step"] = 0
        buffer.grad = torch.ones(1_100_000)
    optimizer.param_groups[0]["params"] = buffers[:1]
    optimizer.step()
    assert (buffers[0] < 1).all() and (buffers[1] == 1).all()
    assert torch.count_nonzero(optimizer.moments["exp_avg"].scales) == -(-1_100_000 // BLOCK)


def test_the_moments_take_about_a_quarter_of_the_memory() -> None:
    """Of a network whose parameters are large against a block; each of them fills up its last one."""
    narrow, plain = (sum(moment.nbytes for moment in _engine(kind, channels=(32, 64)).local.moments()) for kind in ("adamw_8bit", "adamw"))
    assert 0.25 < narrow / plain < 0.28


def test_fifty_steps_stay_within_a_hundredth_of_plain_adamw() -> None:
    narrow, plain = _engine("adamw_8bit"), _engine("adamw")
    pairs = [(_step(narrow, step), _step(plain, step)) for step in range(50)]
    assert max(abs(got / wanted - 1) for got, wanted in pairs) < 0.01
    assert pairs[-1][0] < 0.7 * pairs[0][0]


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_a_resumed_engine_goes_on_bit_for_bit(tmp_path: Path, memory_format: str) -> None:
    engine = _engine("adamw_8bit", memory_format=memory_format)
    for step in range(3):
        _step(engine, step)
    checkpoint = _save(tmp_path, engine, 3)
    fresh = _resumed(checkpoint, _engine("adamw_8bit", memory_format=memory_format))
    assert _different(_copy(fresh.state()), _copy(engine.state())) == []
    for held, loaded in zip(engine.local.moments(), fresh.local.moments(), strict=True):
        assert torch.equal(held, loaded)
    assert [_step(fresh, step) for step in range(3, 6)] == [_step(engine, step) for step in range(3, 6)]
    assert _different(_copy(fresh.state()), _copy(engine.state())) == []


def test_a_checkpoint_crosses_into_plain_adamw_and_back(tmp_path: Path) -> None:
    narrow = _engine("adamw_8bit")
    for step in range(3):
        _step(narrow, step)
    checkpoint = _save(tmp_path / "narrow", narrow, 3)
    stored = read_tensors(checkpoint, "optimizer")
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    plain = _resumed(checkpoint, _engine("adamw"))
    assert _different(_copy(plain.state()), _copy(narrow.state())) == []
    assert _step(plain, 3) == _step(narrow, 3)
    again = _resumed(_save(tmp_path / "plain", plain, 4), _engine("adamw_8bit"))
    assert math.isfinite(_step(again, 4))


def test_a_bad_step_leaves_codes_and_scales_untouched() -> None:
    engine = _engine("adamw_8bit")
    _step(engine, 0)
    before = [tensor.clone() for tensor in engine.local.moments()]
    weights = _copy(engine.state())
    _step(engine, 1, scale=math.nan)
    assert all(torch.equal(tensor, old) for tensor, old in zip(engine.local.moments(), before, strict=True))
    assert _different(_copy(engine.state()), weights) == []


def test_the_state_has_no_fp32_copy_of_the_moments() -> None:
    shards = _engine("adamw_8bit").state()["optimizer"].values()
    assert all(shard.packed is not None and shard.values.is_meta for shard in shards)
