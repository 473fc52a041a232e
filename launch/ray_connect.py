"""The Ray that a run uses: a cluster that is there, or one of this command's own, on loopback and behind a token."""

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from launch.cluster import RayCluster

_OBJECT_STORE_BYTES = 100 * 2**20  # near Ray's least: ranks keep nothing in it
_NOISE = "Failed to query Ray Train Controller"
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Its answer to a drain is to restart by itself; ours is to let the ranks commit, and then to decide.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # What rank 0 writes is shown as it is, line by line; a helper of Ray Train that misses a dashboard each second is not.
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
    "RAY_DEDUP_LOGS_ALLOW_REGEX": f"^(?!.*{_NOISE})",
    "RAY_DEDUP_LOGS_SKIP_REGEX": _NOISE,
    # Machines are found before Ray Train asks for them.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
}
_OWN_SETTINGS = {
    "RAY_AUTH_MODE": "token",
    # Ray listens on all interfaces unless its node's address is exactly 127.0.0.1, which only this makes it take on Linux.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


def check_installed() -> None:
    """Raises: ValueError naming the extra if there is no Ray here."""
    if find_spec("ray") is None:
        raise ValueError("the cluster file's kind is ray, but Ray is not installed; pip install 'halfstep[ray]'")


@contextmanager
def connected(address: str | None, cluster: RayCluster) -> Iterator[None]:
    """Be a driver of the cluster at an address (auto, HOST:PORT); None starts a Ray of this command's own and ends it afterwards.

    Raises: ConnectionError, RuntimeError if there is none."""
    os.environ.update(_SETTINGS)
    if address is None:
        with _own_ray(cluster):
            yield
        return
    import ray

    ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _own_ray(cluster: RayCluster) -> Iterator[None]:
    folder = Path(tempfile.mkdtemp(prefix="halfstep_ray_"))  # 0700; Ray gives its own folder 0777, whatever the umask
    os.environ.update(_OWN_SETTINGS, RAY_AUTH_TOKEN_PATH=str(_write_token(folder)))
    os.environ.pop("RAY_AUTH_TOKEN", None)  # it would come before the file
    import ray

    extra = {name: amount * cluster.ranks for name, amount in cluster.resources_per_rank.items()}
    before = os.umask(0o077)
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=cluster.ranks * cluster.cpus_per_rank,
            resources=extra or None,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=True,
            logging_level=logging.WARNING,
            _temp_dir=str(folder / "ray"),
        )
        os.umask(before)
        yield
    finally:
        os.umask(before)
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _write_token(folder: Path) -> Path:
    """A secret that only this user's processes can read."""
    path = folder / "token"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path
