"""Ranks on hosts that only a network connects: they listen on its interface alone, and a cut in it is named, ended and survived."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.listening import listening
from tests.cluster.namespaces import CONTROLLER, Network, network, not_possible
from tests.cluster.runs import Reference, SlurmRun, assert_same
from tests.cluster.slurm_cluster import PACKAGES, Slurm, missing_programs, rank_pids

pytestmark = [pytest.mark.distributed, pytest.mark.cluster]

LONG = ("train.steps=240", "logging.sample_every_steps=0", "checkpoint.every_steps=20")
LIMIT_SECONDS = 12


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    if why := not_possible():
        pytest.skip(f"NO NETWORK NAMESPACES HERE: {why}; run the tests as root")
    with network(tmp_path_factory.mktemp("network")) as found:
        yield found


@pytest.fixture(scope="module")
def slurm_apart(hosts: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A Slurm whose nodes are hosts apart; it is patient with a node that does not answer, so that the ranks speak first."""
    if missing := missing_programs():
        pytest.skip(f"NO SLURM HERE: {', '.join(missing)} not found; apt-get install {' '.join(PACKAGES)}")
    cluster = Slurm(tmp_path_factory.mktemp("slurm_apart"), hosts.hosts, controller=CONTROLLER, node_timeout_seconds=300)
    cluster.start()
    yield cluster
    cluster.stop()


def submit(slurm: Slurm, run_dir: Path, undisturbed: Reference, *overrides: str) -> SlurmRun:
    words = (f"data.shards={undisturbed.shards}", *LONG, "cluster.nodes=2", f"cluster.collective_timeout_seconds={LIMIT_SECONDS}")
    return SlurmRun.submit(slurm, run_dir, *words, *overrides)


@pytest.mark.parametrize("interface", [None, "eth0"])
def test_ranks_listen_on_the_clusters_interface_alone(
    interface: str | None, slurm_apart: Slurm, undisturbed: Reference, tmp_path: Path
) -> None:
    chosen = [f"cluster.network_interface={interface}"] if interface else []
    run = submit(slurm_apart, tmp_path / "run", undisturbed, *chosen)
    run.wait_for_step(5)
    pids, heard = rank_pids(run.run_dir), dict[int, set[str]]()
    for host in slurm_apart.hosts:
        heard |= listening(pids, prefix=host.prefix[:2])
    assert heard and set().union(*heard.values()) <= {host.address for host in slurm_apart.hosts}, heard
    run.finish()
    assert_same(run.run_dir, undisturbed.of(2, *LONG))


def test_an_interface_that_no_node_has_stops_the_job_and_is_named(slurm_apart: Slurm, undisturbed: Reference, tmp_path: Path) -> None:
    run = submit(slurm_apart, tmp_path / "run", undisturbed, "cluster.network_interface=ib7")
    assert run.wait_for("COMPLETED", "FAILED") == "FAILED"
    assert "n1 has no interface 'ib7' with an IPv4 address; it has " in run.log()


def test_a_cut_between_two_hosts_is_named_ends_with_70_and_is_survived(
    hosts: Network, slurm_apart: Slurm, undisturbed: Reference, tmp_path: Path
) -> None:
    run = submit(slurm_apart, tmp_path / "run", undisturbed, "train.steps=240")
    run.wait_for_step(45)
    hosts.cut(2)
    try:
        slurm_apart.wait_until(run.job_id, (run.run_dir / "exit.json").exists, "the ranks to find the cut")
        reason = (run.run_dir / "exit.json").read_text()
    finally:
        hosts.heal(2)
    assert '"code": 70' in reason and ("on n1" in reason or "on n2" in reason), reason
    slurm_apart.wait_until(run.job_id, lambda: bool(run.ends()), "the batch step to decide")
    run.finish()
    assert [(end["code"], end["decision"]) for end in run.ends()] == [(70, "again"), (0, "done")], run.log()
    assert_same(run.run_dir, undisturbed.of(2, *LONG))
