"""halfstep doctor: packages, disks, memory, limits, clock, checkout, Hub token."""

import os
import resource
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from launch.findings import Finding, Status, ask

_NEEDED = ("halfstep", "torch", "diffusers", "transformers", "webdataset", "tensorboard")
_EXTRAS = {"deepspeed": "deepspeed", "xformers": "xformers", "ray": "ray", "submitit": "slurm"}
"""Optional packages, and the extra that brings each."""
_PACKAGES, _MACHINE = "Python and packages", "Machine"
_GIB = 2**30
_LITTLE_DISK_BYTES, _NO_DISK_BYTES = 10 * _GIB, _GIB
_LITTLE_SHM_BYTES = _GIB
_FEW_FILES = 1024
_SKEW_SECONDS = 2.0
_GIT_SECONDS = 3.0
_OTHERS_RIGHTS = 0o077


def packages() -> Iterator[Finding]:
    """Python, and each package against the versions that halfstep was made for."""
    yield Finding(_PACKAGES, "python", "ok", f"{sys.version.split()[0]} ({sys.executable})")
    wanted = _wanted()
    for name in (*_NEEDED, *_EXTRAS):
        try:
            found = version(name)
        except PackageNotFoundError:
            found = None
        yield judge_package(name, found, wanted.get(name))


def judge_package(name: str, found: str | None, wanted: Requirement | None) -> Finding:
    """found: the installed version; wanted: what halfstep's own metadata says, None where it says nothing."""
    extra = _EXTRAS.get(name)
    install = f"pip install 'halfstep[{extra}]'" if extra else f"pip install '{wanted or name}'"
    if found is None and name == "halfstep":
        text = "not installed: this is a bare checkout, and ranks on other nodes will not find it"
        return Finding(_PACKAGES, name, "warning", text, "pip install -e . in the checkout")
    if found is None:
        return Finding(_PACKAGES, name, "absent" if extra else "problem", "not installed", install)
    if wanted is not None and not wanted.specifier.contains(found, prereleases=True):
        return Finding(_PACKAGES, name, "warning" if extra else "problem", f"{found}, wanted {wanted.specifier}", install)
    return Finding(_PACKAGES, name, "ok", found)


def _wanted() -> dict[str, Requirement]:
    try:
        lines = requires("halfstep") or []
    except PackageNotFoundError:
        return {}
    return {(wanted := Requirement(line)).name.lower(): wanted for line in lines}


def machine(runs: Path) -> Iterator[Finding]:
    """Disks, memory, limits, clock, umask and checkout; runs: the folder that run folders go to, which need not exist yet."""
    folder = existing(runs)
    for name, path in (("disk of runs", folder), ("disk of home", existing(Path.home())), ("disk of temp", Path(tempfile.gettempdir()))):
        yield judge_disk(name, path, shutil.disk_usage(path).free, writable=os.access(path, os.W_OK))
    if Path("/dev/shm").is_dir():
        yield judge_shm(shutil.disk_usage("/dev/shm").total)
    yield memory(_read(Path("/proc/meminfo")), _read(Path("/sys/fs/cgroup/memory.max")))
    yield judge_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield clock(folder)
    yield judge_umask(_umask())
    yield checkout(Path(__file__).resolve().parent.parent)


def judge_disk(name: str, path: Path, free_bytes: int, *, writable: bool) -> Finding:
    """Room on a disk that halfstep writes to."""
    found = f"{free_bytes / _GIB:.1f} GiB free at {path}"
    if not writable:
        return Finding(
            _MACHINE, name, "problem", f"{found}, which this user may not write to", "give a --run-dir elsewhere, or change its rights"
        )
    status: Status = "problem" if free_bytes < _NO_DISK_BYTES else "warning" if free_bytes < _LITTLE_DISK_BYTES else "ok"
    return Finding(_MACHINE, name, status, found, "" if status == "ok" else "make room: a checkpoint takes about 16 bytes a parameter")


def judge_shm(total_bytes: int) -> Finding:
    """Shared memory, which containers make small."""
    found = f"{total_bytes / _GIB:.2g} GiB"
    if total_bytes >= _LITTLE_SHM_BYTES:
        return Finding(_MACHINE, "/dev/shm", "ok", found)
    mend = "start the container with more: docker run --shm-size=8g, or --ipc=host"
    return Finding(_MACHINE, "/dev/shm", "warning", f"{found}: loaders and NCCL share memory through it", mend)


def memory(meminfo: str, cgroup_limit: str) -> Finding:
    """Main memory from /proc/meminfo, and the container's limit where it has one."""
    kib = {line.partition(":")[0]: int(line.split()[1]) for line in meminfo.splitlines() if len(line.split()) > 1}
    total, free = kib.get("MemTotal", 0) / 2**20, kib.get("MemAvailable", 0) / 2**20
    limit = f", this container may use {int(cgroup_limit) / _GIB:.1f}" if cgroup_limit.strip().isdecimal() else ""
    return Finding(_MACHINE, "memory", "ok", f"{free:.1f} of {total:.1f} GiB available{limit}")


def judge_files(soft: int, hard: int) -> Finding:
    """How many files a process may have open."""
    name, found = "open files", "no limit" if soft == resource.RLIM_INFINITY else f"{soft} a process"
    if soft == resource.RLIM_INFINITY or soft >= _FEW_FILES:
        return Finding(_MACHINE, name, "ok", found)
    more = "ulimit -n 4096" if hard == resource.RLIM_INFINITY or hard >= 4096 else "ask for a higher limit (limits.conf)"
    return Finding(_MACHINE, name, "warning", f"{found}: a rank with loader processes may need more", more)


def clock(folder: Path) -> Finding:
    """This host's clock against that of the file system."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            before = time.time()
            file.write(b"-")
            file.flush()
            os.fsync(file.fileno())
            return judge_clock(os.fstat(file.fileno()).st_mtime - before)
    except OSError as error:
        return Finding(
            _MACHINE, "clock", "warning", f"not compared with the file system's: {folder}: {error.strerror}", "give a writable folder"
        )


def judge_clock(skew_seconds: float) -> Finding:
    """skew_seconds: by how much the file system's clock is ahead."""
    if abs(skew_seconds) <= _SKEW_SECONDS:
        return Finding(_MACHINE, "clock", "ok", f"within {_SKEW_SECONDS:g} s of the file system's")
    where = "ahead of" if skew_seconds > 0 else "behind"
    found = f"the file system's is {abs(skew_seconds):.0f} s {where} this host's: ages of checkpoints and heartbeats are wrong by that"
    return Finding(_MACHINE, "clock", "warning", found, "let both hosts follow one time server (chronyc tracking, timedatectl)")


def judge_umask(mask: int) -> Finding:
    """Whether others may write what halfstep writes."""
    if mask & 0o002:
        return Finding(_MACHINE, "umask", "ok", f"{mask:04o}")
    return Finding(
        _MACHINE, "umask", "problem", f"{mask:04o}: every user may change what halfstep writes", "umask 0022 in your shell's profile"
    )


def checkout(root: Path) -> Finding:
    """Which commit runs, and whether its files were changed since."""
    if not (root / ".git").exists():
        return Finding(_MACHINE, "code", "ok", f"an installed copy: {root}")
    try:
        commit = ask(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"], seconds=_GIT_SECONDS).strip()
    except RuntimeError as error:
        return Finding(
            _MACHINE, "code", "warning", f"checkout {root}, whose commit is not known: {error}", "runs cannot say what made them"
        )
    if commit.endswith("-dirty"):
        mend = "commit before a run that counts: environment.json names the commit"
        return Finding(_MACHINE, "code", "warning", f"commit {commit.removesuffix('-dirty')} with changes that are not committed", mend)
    return Finding(_MACHINE, "code", "ok", f"commit {commit}, nothing changed since")


def hub_token(variables: Mapping[str, str]) -> Finding:
    """Where a Hub token is, and who can read it; its text is never read."""
    group, name = "Hugging Face Hub", "token"
    if found := next((key for key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if variables.get(key)), None):
        mend = "put it into a file (hf auth login) and unset the variable"
        return Finding(group, name, "warning", f"in {found}: every program and job that you start inherits it", mend)
    path = _token_path(variables)
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return Finding(group, name, "absent", f"none in {path}", "only for private or gated repositories: hf auth login")
    if mode & _OTHERS_RIGHTS:
        return Finding(
            group, name, "problem", f"{path} has mode {mode:04o}: others can read it", f"chmod 600 {path}, then make a new token"
        )
    return Finding(group, name, "ok", f"in {path}, mode {mode:04o}")


def hub_reachable(variables: Mapping[str, str], *, seconds: float) -> Finding:
    """Whether the Hub answers from here."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    address = variables.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        with urlopen(Request(address, method="HEAD"), timeout=seconds):
            return Finding("Hugging Face Hub", "reachable", "ok", address)
    except HTTPError:  # it answers, if not with a page
        return Finding("Hugging Face Hub", "reachable", "ok", address)
    except (OSError, ValueError) as error:
        mend = "needed only for recipes with models or data of the Hub: download them where there is a network, set HF_HUB_OFFLINE=1 here"
        return Finding("Hugging Face Hub", "reachable", "warning", f"{address}: {error}", mend)


def file_system(path: Path, mounts: str) -> str:
    """The type of the file system that a folder is on, from /proc/self/mounts."""
    entries = [line.split() for line in mounts.splitlines()]
    above = [(len(mounted), number, kind) for number, (_, mounted, kind, *_) in enumerate(entries) if path.is_relative_to(mounted)]
    return max(above)[2] if above else "unknown"


def existing(path: Path) -> Path:
    """The folder, or the nearest one above it."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def _token_path(variables: Mapping[str, str]) -> Path:
    """Where huggingface_hub looks for it."""
    cache = variables.get("XDG_CACHE_HOME") or "~/.cache"
    home = variables.get("HF_HOME") or f"{cache}/huggingface"
    return Path(variables.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()


def _umask() -> int:
    """This process's; read from /proc, because os.umask would have to change it."""
    lines = _read(Path("/proc/self/status")).splitlines()
    return next((int(line.split()[1], 8) for line in lines if line.startswith("Umask:")), 0o022)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
