"""Everything random is a pure function of (seed, step, index)."""

from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.draws import LatentDraws, draw, draw_latent
from trainer.rng import derive_seed

SHAPE = (4, 3, 8, 8)


@given(seed=st.integers(0, 2**31), step=st.integers(0, 10**6), index=st.integers(0, 7))
def test_draws_do_not_depend_on_the_process(seed: int, step: int, index: int) -> None:
    torch.manual_seed(seed)
    first = draw(seed, step, index, shape=SHAPE, micro_batches=8, stratified=True)
    torch.rand(7)
    second = draw(seed, step, index, shape=SHAPE, micro_batches=8, stratified=True)
    assert torch.equal(first.noise, second.noise) and torch.equal(first.uniforms, second.uniforms)
    assert torch.equal(first.flips, second.flips) and torch.equal(first.channel_noise, second.channel_noise)
    assert first.sha256() == second.sha256()


def test_every_micro_batch_draws_its_own() -> None:
    places = product((0, 1), repeat=3)
    digests = {draw(seed, step, index, shape=SHAPE, micro_batches=2, stratified=True).sha256() for seed, step, index in places}
    assert len(digests) == 8


@given(step=st.integers(0, 10**6), micro_batches=st.integers(1, 8))
def test_stratified_times_cover_the_global_batch_evenly(step: int, micro_batches: int) -> None:
    parts = [draw(3, step, index, shape=SHAPE, micro_batches=micro_batches, stratified=True).uniforms for index in range(micro_batches)]
    count = 4 * micro_batches
    strata = (torch.cat(parts) * count).floor().long()
    assert sorted(strata.tolist()) == list(range(count))


def test_a_lane_takes_other_strata_at_the_next_step() -> None:
    strata = [(draw(0, step, 0, shape=SHAPE, micro_batches=2, stratified=True).uniforms * 8).floor().long() % 2 for step in (0, 1)]
    assert strata[0].unique().item() != strata[1].unique().item()


def test_offset_noise_and_flips_do_not_change_the_noise() -> None:
    plain = torch.randn(SHAPE, generator=torch.Generator().manual_seed(derive_seed(5, "noise", 2, 1)))
    assert torch.equal(draw(5, 2, 1, shape=SHAPE, micro_batches=2, stratified=False).noise, plain)


def test_derived_seeds_are_stable_across_versions() -> None:
    assert derive_seed(0, "noise", 0, 0) == int.from_bytes(__import__("hashlib").sha256(b"0/noise/0/0").digest()[:8], "little") >> 1


def _latent(step: int, index: int, *, dropout: float = 0.5) -> LatentDraws:
    return draw_latent(3, step, index, shape=SHAPE, posterior=True, perturbed=True, caption_dropout=dropout)


def test_latent_draws_are_of_their_place_and_of_their_purpose() -> None:
    first, again, other = _latent(1, 0), _latent(1, 0), _latent(1, 1)
    assert first.posterior is not None and first.perturbation is not None and again.posterior is not None and other.posterior is not None
    assert torch.equal(first.posterior, again.posterior) and torch.equal(first.caption_dropped, again.caption_dropped)
    assert not torch.equal(first.posterior, other.posterior) and not torch.equal(first.posterior, first.perturbation)
    assert not torch.equal(first.posterior, draw(3, 1, 0, shape=SHAPE, micro_batches=8, stratified=True).noise)
    none = draw_latent(3, 1, 0, shape=SHAPE, posterior=False, perturbed=False, caption_dropout=0.5)
    assert none.posterior is None and none.perturbation is None
    assert torch.equal(none.caption_dropped, first.caption_dropped), "what else is drawn does not matter"


def test_captions_are_dropped_as_often_as_asked_and_a_higher_rate_drops_the_same_and_more() -> None:
    rare, often = (torch.cat([_latent(step, 0, dropout=rate).caption_dropped for step in range(500)]) for rate in (0.1, 0.3))
    assert abs(rare.float().mean().item() - 0.1) < 0.03 and abs(often.float().mean().item() - 0.3) < 0.04
    assert bool((often | ~rare).all()) and not bool(_latent(0, 0, dropout=0.0).caption_dropped.any())
