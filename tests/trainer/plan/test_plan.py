"""Plans as a whole: memory that follows from the recipe, the verdict, and the ways out."""

import time
from dataclasses import replace

import pytest

from tests.trainer.plan.networks import SD_2_1, SMALL, Case, latent_plan
from trainer.config import EngineConfig
from trainer.models.flops import named_peak
from trainer.plan.fake_step import kept_activations, measure
from trainer.plan.gpus import Gpu, Prices, gpu_named, load_prices, usable_bytes
from trainer.plan.page import page
from trainer.plan.plan import Memory, make_plan, memory_of, speed_of
from trainer.plan.plan_input import Frozen, PlanInput
from trainer.plan.traffic import bytes_sent
from trainer.plan.ways_out import ways_out
from trainer.plan.work import work_of


@pytest.fixture
def prices() -> Prices:
    """A table with one GPU that has 105 MiB for tensors."""
    tiny = Gpu(peak="A100", memory_gib=105 / 1024, node_gigabytes_per_second=10.0, usd_per_hour=2.0)
    table = load_prices().model_copy(update={"reserved_gib": 0.0, "fragmentation": 0.0, "utilisation": 0.5})
    table = table.model_copy(update={"node_latency_microseconds": 0.0, "network_latency_microseconds": 0.0})
    return table.model_copy(update={"gpus": {"tiny-105mb": tiny}})


def test_the_shipped_table_is_read_and_every_gpu_has_a_peak() -> None:
    table = load_prices()
    assert all(named_peak(gpu.peak, "fp16") for gpu in table.gpus.values())
    assert all(0 < usable_bytes(table, gpu) < gpu.memory_gib * 2**30 for gpu in table.gpus.values())


def test_a_gpu_is_found_by_the_beginning_of_its_name_and_a_strange_one_names_the_others() -> None:
    table = load_prices()
    assert gpu_named(table, "A100")[0] == "a100-40gb"
    assert gpu_named(table, "a100_80gb")[0] == "a100-80gb"
    with pytest.raises(ValueError, match=r"--gpu h10: not in configs/prices.yaml; did you mean h100\? It has t4, "):
        gpu_named(table, "h10")


@pytest.mark.all_cases
def test_the_state_of_a_rank_is_its_share_of_what_is_trained() -> None:
    whole = sum(part.count for part in work_of(Case().plan(1)).parts) * 4
    replicated, sharded = measure(Case().plan(4)), measure(Case("fsdp").plan(4))
    assert replicated.state["moments"] == pytest.approx(2 * whole, rel=1e-3)
    assert sharded.state["moments"] == pytest.approx(2 * whole / 4, rel=1e-2)
    assert sharded.state["averages"] == sharded.state["weights"]


@pytest.mark.parametrize(
    "kind", ["replicated", pytest.param("fsdp", marks=pytest.mark.all_cases), pytest.param("deepspeed", marks=pytest.mark.all_cases)]
)
def test_moments_of_8_bits_take_about_a_quarter(kind: str) -> None:
    plan = Case(kind).plan(4)
    narrow = replace(plan, optim=plan.optim.model_copy(update={"kind": "adamw_8bit"}))
    assert measure(narrow).state["moments"] == pytest.approx(measure(plan).state["moments"] * 1.015625 / 4, rel=0.05)


def test_parameters_are_counted_as_trained_and_frozen() -> None:
    work = work_of(Case(partly_frozen=True).plan(1))
    assert set(work.components) == {"unet"}
    assert 0 < work.trained < work.frozen
    assert work.backward_flops < 2 * work.forward_flops
    full = work_of(Case().plan(1))
    assert full.backward_flops == pytest.approx(2 * full.forward_flops, rel=0.02)


def test_activation_checkpointing_keeps_less_and_the_plan_says_so_both_ways() -> None:
    plan = Case(precision="bf16").plan(1)
    assert kept_activations(plan, checkpointing=True) < kept_activations(plan, checkpointing=False) / 3
    assert measure(replace(plan, activation_checkpointing=True)).peak < measure(plan).peak


def test_cudas_autocast_keeps_more_than_the_cpus_because_it_normalises_in_fp32() -> None:
    plan = Case(precision="bf16").plan(1)
    assert kept_activations(replace(plan, on_gpu=True), checkpointing=False) > kept_activations(plan, checkpointing=False)
    fp32 = Case().plan(1)
    assert kept_activations(replace(fp32, on_gpu=True), checkpointing=False) == kept_activations(fp32, checkpointing=False)


def test_frozen_encoders_and_offload_change_the_peak_by_their_bytes() -> None:
    plan = Case("fsdp").plan(2)
    work, measured = work_of(plan), measure(plan)

    def memory(source: PlanInput) -> Memory:
        return memory_of(source, work, measured, kept=(0, 0))

    before = memory(plan)
    moments = before.state["moments"]
    encoder = Frozen("vae", 1_000_000, "bf16")
    assert memory(replace(plan, frozen=(encoder,))).peak == before.peak + 2_000_000
    # Models that draw are whole on every rank, however large.
    limited = plan.engine.model_copy(update={"shard_frozen_above_gib": 1e-9})
    drawing = memory(replace(plan, drawing=(encoder,), engine=limited))
    assert drawing.peak == before.peak + 2_000_000 and drawing.drawing == {"vae": 2_000_000}
    offloaded = memory(replace(plan, engine=plan.engine.model_copy(update={"cpu_offload": True})))
    assert "moments" not in offloaded.state
    assert offloaded.host - before.host >= moments
    assert offloaded.peak <= before.peak - moments


def test_time_and_cost_follow_from_the_assumptions(prices: Prices) -> None:
    plan = replace(Case("fsdp", "bf16").plan(8), on_gpu=True)
    work = work_of(plan)
    speed = speed_of(plan, work, prices, prices.gpus["tiny-105mb"])
    assert speed is not None
    flops = 8 * (work.forward_flops + work.backward_flops)
    assert speed.compute_seconds == pytest.approx(2 * flops / 8 / (312e12 * 0.5))
    assert speed.traffic_seconds == pytest.approx(sum(bytes_sent(plan, work.parts).values()) / 10e9)
    assert speed.exposed_seconds == 0
    assert speed.step_seconds == max(speed.compute_seconds, speed.traffic_seconds)
    assert speed.usd == pytest.approx(speed.step_seconds * 1000 / 3600 * 8 * 2.0)


def test_what_is_sent_after_the_computing_adds_to_the_step(prices: Prices) -> None:
    plan = replace(Case("zero_2").plan(8), on_gpu=True)
    speed = speed_of(plan, work_of(plan), prices, prices.gpus["tiny-105mb"])
    assert speed is not None and speed.exposed_seconds == speed.traffic_seconds > 0
    assert speed.step_seconds == speed.compute_seconds + speed.traffic_seconds


@pytest.mark.all_cases
def test_what_does_not_fit_has_ways_out_that_do_fastest_first(prices: Prices) -> None:
    source = replace(Case().plan(2), on_gpu=True)
    plan = make_plan(source, prices, "tiny")
    ways = ways_out(plan, prices)
    assert plan.fits is False
    assert [way.plan.fits for way in ways] == [True] * 3
    seconds = [way.plan.speed.step_seconds for way in ways if way.plan.speed]
    assert seconds == sorted(seconds)
    text = page(plan, prices, ways, title="a plan")
    assert "DOES NOT FIT" in text
    assert all(way.change in text for way in ways)


@pytest.mark.all_cases
@pytest.mark.parametrize("ranks", [8, 64, 1024])
def test_stable_diffusion_2_1_is_planned_in_less_than_two_minutes(ranks: int) -> None:
    engine = EngineConfig(kind="fsdp", precision="bf16")
    started = time.process_time()
    plan = make_plan(latent_plan(SD_2_1, engine, ranks=ranks, side=64, micro_batch_size=4, on_gpu=True), load_prices(), "h100")
    assert time.process_time() - started < 120
    assert plan.work.trained == 865_910_724
    assert plan.fits


def test_replicas_of_shards_hold_as_many_times_more() -> None:
    plan = replace(Case().plan(4), engine=EngineConfig(kind="fsdp", replicas=2))
    assert measure(plan).state["weights"] == pytest.approx(work_of(plan).trained * 4 / 2, rel=0.01)


def test_a_precision_that_a_gpu_lacks_has_no_time() -> None:
    made = make_plan(latent_plan(SMALL, EngineConfig(precision="bf16"), ranks=1, side=16, micro_batch_size=1), load_prices(), "t4")
    assert made.speed is None
    assert "has no units for bf16" in page(made, load_prices(), [], title="a plan")
