"""Runs on a real Ray end in the bits of a local run, whatever is lost on the way; nobody without the token gets in."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.data import pack_faces
from launch.submitted import submissions
from launch.sweep import sweep_runs
from tests.cluster.ray_cluster import RayPool, ray_pool
from tests.distributed.runs import RECIPE, descendants, run, wait_until
from trainer.config_io import load_recipe
from trainer.hash import hash_run
from trainer.watch import read_heartbeats

_LIMIT_SECONDS = 300.0
_STEPS = 48
_SAME = ("step", "loss_hex", "gradient_norm", "learning_rate")


@pytest.fixture(scope="module")
def pool() -> Iterator[RayPool]:
    with ray_pool(nodes=2) as found:
        yield found


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides that make a short single run of the test's recipe, on shards that all runs share."""
    faces = load_recipe(RECIPE, []).data.faces
    assert faces is not None
    shards = pack_faces(faces, tmp_path_factory.mktemp("shards") / "shards")
    return (f"data.shards={shards}", "distill=null", f"train.steps={_STEPS}")


@pytest.fixture(scope="module")
def two_ranks(recipe: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, undisturbed, on 2 ranks of this machine."""
    return _local(recipe, tmp_path_factory.mktemp("two_ranks") / "run", ranks=2)


def _local(recipe: tuple[str, ...], run_dir: Path, *, ranks: int) -> Path:
    finished = run("train", run_dir, ranks=ranks, overrides=recipe)
    assert finished.returncode == 0, finished.stderr
    return run_dir


def _command(run_dir: Path, overrides: tuple[str, ...], *flags: str) -> list[str]:
    return [sys.executable, "-m", "launch", "train", str(RECIPE), "--cluster", "ray", "--run-dir", str(run_dir), *flags, *overrides]


def _on_ray(run_dir: Path, overrides: tuple[str, ...], environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    words = _command(run_dir, overrides, *flags)
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False)


@contextmanager
def _started(run_dir: Path, overrides: tuple[str, ...], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A driver, in a session of its own, whose output goes to a file beside RUN_DIR."""
    with open(run_dir.with_name("terminal"), "ab") as terminal:
        process = subprocess.Popen(
            _command(run_dir, overrides),
            env=environment,
            stdout=terminal,
            stderr=terminal,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(_LIMIT_SECONDS)


def _terminal(run_dir: Path) -> str:
    return run_dir.with_name("terminal").read_text()


def _lines(run_dir: Path) -> list[dict[str, object]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def _ends(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "job" / "ends.jsonl").read_text().splitlines()]


def _assert_same(run_dir: Path, reference: Path) -> None:
    found, wanted = ([{key: line[key] for key in _SAME} for line in _lines(path)] for path in (run_dir, reference))
    assert found == wanted
    assert hash_run(run_dir) == hash_run(reference)


def _wait_for_step(process: subprocess.Popen[bytes], run_dir: Path, step: int) -> None:
    assert wait_until(lambda: len(_lines(run_dir)) > step, process), _terminal(run_dir)


def _rank_pid(run_dir: Path, rank: int) -> int:
    return read_heartbeats(run_dir)[rank].pid


def _is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until_gone(pids: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(map(_is_there, pids)):
        assert time.monotonic() < deadline, f"still there: {list(filter(_is_there, pids))}"
        time.sleep(0.1)


def _two_nodes(pool: RayPool) -> tuple[str, ...]:
    return (f"cluster.address={pool.address}", "cluster.nodes=2")


def test_a_submitted_job_ends_in_the_bits_of_a_local_run_and_tells_nobody_its_token(
    pool: RayPool, recipe: tuple[str, ...], tmp_path: Path
) -> None:
    recipe = (*recipe, "engine.kind=fsdp", "train.steps=16")
    run_dir, overrides = tmp_path / "run", (*recipe, f"cluster.address={pool.dashboard}", "cluster.nodes=2", "cluster.ranks_per_node=2")
    without = {name: value for name, value in pool.environment.items() if not name.startswith("RAY_AUTH")}
    refused = _on_ray(run_dir, overrides, without)
    assert refused.returncode == 2 and "warning" in refused.stderr and "refused our token" in refused.stderr, refused.stderr
    (tmp_path / "token").write_text("0" * 64)
    refused = _on_ray(run_dir, overrides, pool.environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")})
    assert refused.returncode == 2 and "refused our token" in refused.stderr, refused.stderr
    assert not submissions(run_dir)

    followed = _on_ray(run_dir, overrides, pool.environment, "--follow")
    assert followed.returncode == 0, followed.stderr + followed.stdout
    _assert_same(run_dir, _local(recipe, tmp_path / "local" / "run", ranks=4))
    [job] = submissions(run_dir)
    about = "launch.submitted.submissions(pathlib.Path(sys.argv[1]))[0]"
    code = f"import sys, pathlib, launch.submitted, launch.ray_jobs as jobs; job = {about}; print(jobs.job_state(job), jobs.job_log(job))"
    asked = subprocess.run([sys.executable, "-c", code, str(run_dir)], env=pool.environment, capture_output=True, text=True, check=True)
    assert asked.stdout.startswith("ended ") and "exit code 0: done" in asked.stdout
    assert "exit code 0: done" in (run_dir / job.output).read_text()
    token = (pool.folder / "token").read_text()
    written = [path for path in [*run_dir.rglob("*"), *pool.folder.rglob("*")] if path.is_file() and path != pool.folder / "token"]
    assert not [path for path in written if token.encode() in path.read_bytes()]


def test_a_ray_of_our_own_listens_on_loopback_and_lets_its_ranks_commit(recipe: tuple[str, ...], tmp_path: Path) -> None:
    run_dir, environment = tmp_path / "run", {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    overrides = (*recipe, "train.steps=100000", "lr_schedule.kind=constant", "logging.sample_every_steps=0", "cluster.ranks_per_node=2")
    before = set(Path("/tmp").glob("halfstep_ray_*"))
    with _started(run_dir, overrides, environment) as process:
        _wait_for_step(process, run_dir, 6)
        [folder] = set(Path("/tmp").glob("halfstep_ray_*")) - before
        assert (folder.stat().st_mode & 0o777, (folder / "token").stat().st_mode & 0o777) == (0o700, 0o600)
        family = {process.pid, *descendants(process.pid)}
        ranks = [_rank_pid(run_dir, rank) for rank in range(2)]
        assert set(ranks) <= family
        listening = [line for line in _listening() if int(line.rpartition("pid=")[2].split(",")[0]) in family]
        assert listening and not [line for line in listening if not re.search(r"\s(127\.0\.0\.1|\[::ffff:127\.0\.0\.1\]):\d+\s", line)]

        os.kill(ranks[1], signal.SIGKILL)
        assert wait_until((run_dir / "job" / "ends.jsonl").exists, process), _terminal(run_dir)
        _wait_for_step(process, run_dir, len(_lines(run_dir)) + 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(_LIMIT_SECONDS) == 75, _terminal(run_dir)
    killed, stopped = _ends(run_dir)
    assert killed["reason"] == "rank 1 on 127.0.0.1 was killed by SIGKILL (by the kernel, if memory ran out: see dmesg)"
    assert (killed["code"], killed["decision"]) == (70, "again") and (stopped["code"], stopped["decision"]) == (75, "stop")
    assert stopped["committed_steps"] == len(_lines(run_dir))
    assert not folder.exists() and (run_dir / "checkpoints").stat().st_mode & 0o777 == 0o777 & ~_umask()
    _wait_until_gone([pid for pid in family if pid != process.pid], 20)


def _umask() -> int:
    before = os.umask(0o022)
    os.umask(before)
    return before


def _listening() -> list[str]:
    shown = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout
    return [line for line in shown.splitlines() if "pid=" in line]


def test_a_cluster_without_enough_nodes_ends_the_run_in_time_and_says_what_there_is(
    pool: RayPool, recipe: tuple[str, ...], tmp_path: Path
) -> None:
    overrides = (*recipe, f"cluster.address={pool.address}", "cluster.nodes=4", "cluster.wait_for_nodes_minutes=0.05")
    ended = _on_ray(tmp_path / "run", overrides, pool.environment)
    assert ended.returncode == 70, ended.stderr
    assert "had no room within 0.05 minutes (cluster.wait_for_nodes_minutes): asked for 4 nodes with 1 CPU each free" in ended.stderr
    assert "127.0.0.2 (0 CPU free)" in ended.stderr and "change cluster.nodes" in ended.stderr
    [end] = _ends(tmp_path / "run")
    assert (end["code"], end["decision"]) == (70, "stop")


@pytest.mark.cluster
@pytest.mark.parametrize("over_http", [False, True])
def test_the_runs_of_a_sweep_share_the_pool_and_end_in_the_bits_of_local_ones(
    pool: RayPool, recipe: tuple[str, ...], tmp_path: Path, over_http: bool
) -> None:
    address = pool.dashboard if over_http else pool.address
    words = [sys.executable, "-m", "launch", "sweep", str(RECIPE), "--cluster", "ray", "--run-dir", str(tmp_path / "seeds")]
    words += ["seed=1,2,3,4,5", *recipe, "train.steps=16", f"cluster.address={address}", "cluster.ranks_per_node=2", "--follow"]
    words += ["cluster.wait_for_nodes_minutes=1"]
    ended = subprocess.run(words, env=pool.environment, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    runs = sweep_runs(tmp_path / "seeds")
    for run_dir in runs:
        [end] = _ends(run_dir)  # none of them was ever given machines that another one had
        assert (end["code"], end["decision"]) == (0, "done") and len(_lines(run_dir)) == 16
    assert (tmp_path / "seeds" / "report.html").exists()
    _assert_same(runs[2], _local((*recipe, "seed=3", "train.steps=16"), tmp_path / "local" / "run", ranks=2))


def test_a_job_is_not_submitted_over_the_network_without_a_token(recipe: tuple[str, ...], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ended = _on_ray(tmp_path / "run", (*recipe, "cluster.address=http://192.0.2.7:8265"), environment)
    assert ended.returncode == 2 and "http://192.0.2.7:8265: no token authentication" in ended.stderr, ended.stderr
    assert not submissions(tmp_path / "run")


def _cases(count: int) -> list[object]:
    return [pytest.param(seed, marks=pytest.mark.cluster) for seed in range(count)]


@pytest.mark.parametrize("seed", _cases(5))
def test_a_killed_worker_changes_no_bit(pool: RayPool, recipe: tuple[str, ...], two_ranks: Path, tmp_path: Path, seed: int) -> None:
    dice, run_dir = random.Random(seed), tmp_path / "run"
    rank, of_ray = dice.randrange(2), seed % 2 == 0
    with _started(run_dir, (*recipe, *_two_nodes(pool)), pool.environment) as process:
        _wait_for_step(process, run_dir, dice.randrange(_STEPS - 8))
        pid = _rank_pid(run_dir, rank)
        os.kill(_parent(pid) if of_ray else pid, signal.SIGKILL)
        assert process.wait(_LIMIT_SECONDS) == 0, _terminal(run_dir)
    killed, done = _ends(run_dir)
    what = "was lost: its Ray worker was killed or crashed" if of_ray else "was killed by SIGKILL"
    assert re.match(rf"rank {rank} on 127\.0\.0\.\d+ {what}", str(killed["reason"])), killed
    assert (killed["code"], killed["decision"], done["decision"]) == (70, "again", "done")
    _assert_same(run_dir, two_ranks)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("seed", _cases(5))
def test_a_lost_node_changes_no_bit(pool: RayPool, recipe: tuple[str, ...], two_ranks: Path, tmp_path: Path, seed: int) -> None:
    dice, run_dir = random.Random(100 + seed), tmp_path / "run"
    with _started(run_dir, (*recipe, *_two_nodes(pool)), pool.environment) as process:
        _wait_for_step(process, run_dir, dice.randrange(_STEPS - 8))
        pool.lose(dice.choice(pool.nodes[1:]))
        pool.add_node()
        assert process.wait(_LIMIT_SECONDS) == 0, _terminal(run_dir)
    ends = _ends(run_dir)
    assert [end["decision"] for end in ends] == ["again"] * (len(ends) - 1) + ["done"]
    assert re.match(r"rank \d on 127\.0\.0\.\d+ (was lost: its|was killed by SIGKILL)", str(ends[0]["reason"])), ends
    _assert_same(run_dir, two_ranks)


@pytest.mark.parametrize("seed", _cases(5))
def test_a_drained_node_is_left_in_time_with_a_checkpoint(
    pool: RayPool, recipe: tuple[str, ...], two_ranks: Path, tmp_path: Path, seed: int
) -> None:
    dice, run_dir, notice_seconds = random.Random(200 + seed), tmp_path / "run", 20.0
    with _started(run_dir, (*recipe, *_two_nodes(pool)), pool.environment) as process:
        _wait_for_step(process, run_dir, 1)
        os.kill(_rank_pid(run_dir, 0), signal.SIGSTOP)  # or it would be done before Ray has passed on the notice
        leaving, began = dice.choice(pool.nodes[1:]), time.monotonic()
        pool.drain(leaving, seconds=notice_seconds)
        os.kill(_rank_pid(run_dir, 0), signal.SIGCONT)
        assert wait_until((run_dir / "job" / "ends.jsonl").exists, process), _terminal(run_dir)
        assert time.monotonic() - began < notice_seconds
        pool.add_node()  # while the other one is still there
        assert process.wait(_LIMIT_SECONDS) == 0, _terminal(run_dir)
    pool.remove(leaving)
    drained, done = _ends(run_dir)
    assert (drained["code"], drained["decision"], done["decision"]) == (75, "again", "done"), _ends(run_dir)
    assert str(drained["reason"]).startswith("a node of the run is being taken away")
    assert 0 < int(str(drained["committed_steps"])) < _STEPS
    _assert_same(run_dir, two_ranks)


@pytest.mark.parametrize("seed", _cases(3))
def test_a_killed_driver_takes_its_ranks_along_and_a_broken_snapshot_of_ray_changes_nothing(
    pool: RayPool, recipe: tuple[str, ...], two_ranks: Path, tmp_path: Path, seed: int
) -> None:
    dice, run_dir, overrides = random.Random(300 + seed), tmp_path / "run", (*recipe, *_two_nodes(pool))
    with _started(run_dir, overrides, pool.environment) as process:
        _wait_for_step(process, run_dir, dice.randrange(_STEPS - 8))
        ranks = [_rank_pid(run_dir, rank) for rank in range(2)]
        process.kill()
        assert process.wait() == -signal.SIGKILL
    _wait_until_gone(ranks, 30)
    attempts = list((run_dir / "job" / "ray").iterdir())
    for attempt in attempts:
        (attempt / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_results": [{"checkpoint_')
    assert len(attempts) == 1
    resumed = _on_ray(run_dir, overrides, pool.environment)
    assert resumed.returncode == 0, resumed.stderr
    _assert_same(run_dir, two_ranks)


@pytest.mark.cluster
@pytest.mark.parametrize("engine", ["replicated", "deepspeed"])
def test_every_engine_ends_in_the_bits_of_a_local_run(pool: RayPool, recipe: tuple[str, ...], tmp_path: Path, engine: str) -> None:
    recipe = (*recipe, f"engine.kind={engine}")
    finished = _on_ray(tmp_path / "run", (*recipe, *_two_nodes(pool), "cluster.ranks_per_node=2"), pool.environment)
    assert finished.returncode == 0, finished.stderr
    _assert_same(tmp_path / "run", _local(recipe, tmp_path / "local" / "run", ranks=4))
