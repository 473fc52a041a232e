"""The bytes of live tensors: each storage once, for as long as anything holds it."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.plan.live_bytes import LiveBytes


def test_a_storage_counts_once_whatever_views_there_are() -> None:
    with LiveBytes() as live:
        whole = torch.zeros(1000)
        part = whole.view(10, 100)[3]
        assert live.tally.total == 4000
        del whole
        assert live.tally.total == 4000
        del part
        assert live.tally.total == 0
    assert live.tally.peak == 4000


def test_the_peak_is_the_largest_sum_and_says_what_it_is_made_of() -> None:
    with LiveBytes() as live:
        weights = torch.zeros(100)
        live.label("weights", [weights])
        for _ in range(3):
            torch.zeros(50).add(1)  # two of 200 bytes at a time
    assert live.tally.peak == 400 + 2 * 200
    assert live.tally.at_peak == {"weights": 400, "other": 400}
    assert live.tally.total == 400


def test_a_peak_can_be_looked_for_anew() -> None:
    with LiveBytes() as live:
        torch.zeros(1000)
        kept = torch.zeros(10)
        live.restart_peak()
        kept.add_(1)
    assert live.tally.peak == 40


def test_memory_that_is_given_back_by_resizing_is_gone_and_comes_back() -> None:
    with LiveBytes() as live:
        tensor = torch.zeros(100)
        tensor.untyped_storage().resize_(0)
        assert live.tally.total == 0
        tensor.untyped_storage().resize_(400)
    assert live.tally.now == {"other": 0, "gathered": 400}


def test_resizing_is_as_it_was_afterwards() -> None:
    before = torch.UntypedStorage.resize_
    with LiveBytes():
        pass
    assert torch.UntypedStorage.resize_ is before


def test_what_backward_keeps_is_counted_though_no_name_holds_it() -> None:
    weight = nn.Parameter(torch.ones(100))
    with LiveBytes() as live:
        loss = (weight * 2).exp().sum()
        kept = live.tally.total  # the weight, what exp saved, and the loss
        loss.backward()
        del loss
    assert kept == 400 + 400 + 4
    assert live.tally.total == 400 + 400  # the weight and its gradient


def test_fake_tensors_count_like_real_ones() -> None:
    def work() -> torch.Tensor:
        layer = nn.Linear(64, 64)
        hidden = layer(torch.ones(32, 64)).relu()
        return (hidden @ hidden.T).sum()

    with LiveBytes() as real:
        work().backward()
    with FakeTensorMode(), LiveBytes() as fake:
        work().backward()
    assert fake.tally.peak == real.tally.peak > 0
