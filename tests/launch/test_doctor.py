"""halfstep doctor: each thing that is looked at, how it is shown, and that it neither hangs nor tells a token."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from launch import doctor
from launch.cluster import ClusterConfig, LocalCluster, RayCluster, SlurmCluster
from launch.doctor_cluster import Site, check_cluster, judge_shared
from launch.doctor_devices import Gpu, Torch, cores, driver_version, judge_gpus, judge_xformers
from launch.doctor_machine import (
    checkout,
    clock,
    file_system,
    hub_reachable,
    hub_token,
    judge_clock,
    judge_disk,
    judge_files,
    judge_package,
    judge_shm,
    judge_umask,
    memory,
)
from launch.doctor_ray import RayState
from launch.doctor_slurm import SlurmSite, parse_config, parse_partitions
from launch.findings import Finding, ask, findings_json, findings_text

CAPTURED = Path(__file__).with_name("captured")
SECRET = "do-not-show-this-token"
GIB = 2**30
A100 = Gpu("NVIDIA A100", 79.3)
CPU_BUILD = Torch("2.13.0+cpu", None, None, None, (), "it is not installed")
CUDA_BUILD = Torch("2.13.0", "12.8", "91002", "2.27.3", (A100,), None)


def test_findings_are_aligned_under_headings_with_what_mends_them() -> None:
    findings = [
        Finding("One", "a", "ok", "fine"),
        Finding("One", "longer", "warning", "slow", "make it fast"),
        Finding("Two", "b", "problem", "broken", "mend it"),
    ]
    assert findings_text(findings) == (
        "One\n"
        "  ok       a       fine\n"
        "  warning  longer  slow\n"
        "                     -> make it fast\n"
        "Two\n"
        "  problem  b       broken\n"
        "                     -> mend it\n"
        "1 problem, 1 warning\n"
    )
    assert findings_text(findings[:1]).endswith("\nno problems, no warnings\n")
    assert findings_json(findings) == {
        "findings": [
            {"group": "One", "name": "a", "status": "ok", "found": "fine", "mend": ""},
            {"group": "One", "name": "longer", "status": "warning", "found": "slow", "mend": "make it fast"},
            {"group": "Two", "name": "b", "status": "problem", "found": "broken", "mend": "mend it"},
        ],
        "problems": 1,
    }


def test_a_program_that_hangs_fails_or_is_not_there_is_a_line() -> None:
    assert ask(["echo", "yes"], seconds=5) == "yes\n"
    for words, says in (
        (["sleep", "60"], r"^no answer within 0 s$"),
        (["sh", "-c", "echo first >&2; echo last >&2; exit 1"], r"^last$"),
        (["false"], r"^false ended with exit code 1$"),
        (["/nowhere"], r"^/nowhere: no such command$"),
    ):
        with pytest.raises(RuntimeError, match=says):
            ask(words, seconds=0.3)


@pytest.mark.parametrize(
    ("name", "found", "wanted", "status", "mend"),
    [
        ("torch", "2.13.0+cpu", "torch>=2.11", "ok", ""),
        ("torch", "2.12.0a0+git1", "torch>=2.11", "ok", ""),
        ("torch", "2.4.1", "torch>=2.11", "problem", "pip install 'torch>=2.11'"),
        ("diffusers", "0.43.0", "diffusers<0.43,>=0.42", "problem", "pip install 'diffusers<0.43,>=0.42'"),
        ("diffusers", None, "diffusers<0.43,>=0.42", "problem", "pip install 'diffusers<0.43,>=0.42'"),
        ("ray", None, 'ray[train]>=2.50; extra == "ray"', "absent", "pip install 'halfstep[ray]'"),
        ("ray", "2.9.0", 'ray[train]>=2.50; extra == "ray"', "warning", "pip install 'halfstep[ray]'"),
        ("submitit", None, None, "absent", "pip install 'halfstep[slurm]'"),
        ("halfstep", None, None, "warning", "pip install -e . in the checkout"),
    ],
)
def test_a_package_is_held_to_what_halfstep_wants(name: str, found: str | None, wanted: str | None, status: str, mend: str) -> None:
    finding = judge_package(name, found, Requirement(wanted) if wanted else None)
    assert (finding.status, finding.mend) == (status, mend)


def test_disks_memory_and_limits_are_judged(tmp_path: Path) -> None:
    free = {100 * GIB: "ok", 5 * GIB: "warning", GIB // 2: "problem"}
    assert [judge_disk("disk", tmp_path, size, writable=True).status for size in free] == list(free.values())
    assert judge_disk("disk", tmp_path, 100 * GIB, writable=False).status == "problem"
    assert [judge_shm(size).status for size in (64 * 2**20, 8 * GIB)] == ["warning", "ok"]
    assert "docker run --shm-size" in judge_shm(64 * 2**20).mend
    assert [judge_files(*limits).status for limits in ((256, 256), (1024, 4096), (-1, -1))] == ["warning", "ok", "ok"]
    assert [judge_files(256, hard).mend for hard in (4096, 256)] == ["ulimit -n 4096", "ask for a higher limit (limits.conf)"]
    assert [judge_umask(mask).status for mask in (0o022, 0o077, 0o002, 0o000)] == ["ok", "ok", "ok", "problem"]
    text = "MemTotal:       33554432 kB\nMemFree:  1 kB\nMemAvailable:   16777216 kB\n"
    assert memory(text, "max\n").found == "16.0 of 32.0 GiB available"
    assert memory(text, f"{8 * GIB}\n").found == "16.0 of 32.0 GiB available, this container may use 8.0"


def test_clocks_are_compared_by_a_file(tmp_path: Path) -> None:
    assert clock(tmp_path).status == "ok" and list(tmp_path.iterdir()) == []
    assert clock(tmp_path / "none").status == "warning"
    assert [judge_clock(skew).status for skew in (-1.0, 3.0, -90.0)] == ["ok", "warning", "warning"]
    assert judge_clock(-90.0).found.startswith("the file system's is 90 s behind this host's")


def _git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@x", *words], check=True, capture_output=True)


def test_a_checkout_says_its_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    assert checkout(tmp_path).found == f"an installed copy: {tmp_path}"
    _git(tmp_path, "init")
    assert checkout(tmp_path).status == "warning"
    (tmp_path / "file").write_text("1")
    _git(tmp_path, "add", "file")
    _git(tmp_path, "commit", "-m", "one")
    assert checkout(tmp_path).status == "ok"
    (tmp_path / "file").write_text("2")
    assert (checkout(tmp_path).status, "not committed" in checkout(tmp_path).found) == ("warning", True)


def test_a_hub_token_is_found_and_never_read(tmp_path: Path) -> None:
    variables = {"HF_HOME": str(tmp_path)}
    assert hub_token(variables).status == "absent"
    token = tmp_path / "token"
    token.write_text(SECRET)
    for mode, status in ((0o600, "ok"), (0o644, "problem"), (0o660, "problem")):
        token.chmod(mode)
        assert (hub_token(variables).status, f"mode {mode:04o}" in hub_token(variables).found) == (status, True)
    assert hub_token(variables).mend.startswith(f"chmod 600 {token}")
    assert hub_token({"HF_HOME": "/nowhere", "HF_TOKEN_PATH": str(token)}).status == "problem"
    assert hub_token({"HF_TOKEN": SECRET}).status == "warning" and SECRET not in str(hub_token({"HF_TOKEN": SECRET}))


def test_a_hub_that_is_not_reached_is_a_warning() -> None:
    finding = hub_reachable({"HF_ENDPOINT": "http://127.0.0.1:9"}, seconds=1)
    assert finding.status == "warning" and "HF_HUB_OFFLINE=1" in finding.mend


def test_the_drivers_version_is_read_from_the_kernel() -> None:
    plain = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc 11.4.0\n"
    opened = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (root@x)  Thu Jan 23 UTC 2025\n"
    assert [driver_version(text) for text in (plain, opened, "")] == ["535.104.05", "570.86.15", None]


@pytest.mark.parametrize(
    ("torch", "driver", "hidden", "status", "says"),
    [
        (CUDA_BUILD, "570.86.15", None, "ok", "1: NVIDIA A100 (79.3 GiB)"),
        (CPU_BUILD, None, None, "absent", "none: ranks compute on the CPU"),
        (CPU_BUILD, "570.86.15", None, "problem", "is a CPU build"),
        (Torch("2.13.0", "12.8", None, None, (), None), "470.1.2", None, "problem", "for CUDA 12.8 finds no GPU"),
        (Torch("2.13.0", "12.8", None, None, (), None), "570.86.15", "", "warning", "hidden by CUDA_VISIBLE_DEVICES="),
    ],
)
def test_gpus_are_held_against_the_driver(torch: Torch, driver: str | None, hidden: str | None, status: str, says: str) -> None:
    finding = judge_gpus(torch, driver, hidden=hidden)
    assert finding.status == status and says in finding.found


def test_attention_says_which_kernels_are_taken() -> None:
    broken = Torch("2.13.0", "12.8", None, None, (A100,), "its kernels do not run on cuda:0: no operator; install a build that fits")
    assert [judge_xformers(torch).status for torch in (CUDA_BUILD, CPU_BUILD, broken)] == ["ok", "absent", "warning"]
    assert judge_xformers(broken).found.startswith("PyTorch's own (sdpa); of xformers: its kernels do not run")


def test_torch_is_asked_in_a_process_of_its_own() -> None:
    found = Torch.ask(seconds=60)
    assert found.version.startswith("2.") and (found.cuda is None or isinstance(found.gpus, tuple))


def _site(*, ray: RayState | None = None, torch: Torch = CPU_BUILD) -> Site:
    config = parse_config((CAPTURED / "slurm_22_05_config.txt").read_text())
    partitions = parse_partitions((CAPTURED / "slurm_22_05_partitions.txt").read_text())
    partitions["short"] = {**partitions["high"], "MaxTime": "02:00:00", "TRES": "cpu=8,node=2,gres/gpu=8"}
    return Site(torch, SlurmSite(config, partitions), ray)


@pytest.mark.parametrize(
    ("cluster", "found"),
    [
        (SlurmCluster(), []),
        (SlurmCluster(partition="short", gpus_per_rank=1, time_limit_minutes=120, nodes=2), []),
        (SlurmCluster(partition="gpu"), [("partition", "problem", "'gpu' does not exist", "one of main, high, short")]),
        (SlurmCluster(partition="high,gpu"), [("partition", "problem", "'gpu' does not exist", "one of main")]),
        (
            SlurmCluster(partition="short", time_limit_minutes=121),
            [("time_limit_minutes", "problem", "121 minutes are more than MaxTime=02:00:00 of short", "cluster.time_limit_minutes=120")],
        ),
        (SlurmCluster(gpus_per_rank=1), [("gpus_per_rank", "problem", "Slurm knows of none in main", "cluster.gpus_per_rank=0")]),
        (SlurmCluster(nodes=3), [("nodes", "problem", "3 are asked for, a job in main gets 2 at most", "cluster.nodes=2")]),
        (SlurmCluster(network_interface="ib9"), [("network_interface", "warning", "no 'ib9' here", "ip -brief address")]),
        (SlurmCluster(python="/nowhere/python"), [("python", "warning", "/nowhere/python is no program here", "cluster.python=")]),
        (SlurmCluster(container="nowhere exec --nv x.sif"), [("container", "warning", "no program nowhere here", "cluster.setup")]),
        (LocalCluster(), []),
        (LocalCluster(ranks_per_node=4096), [("ranks_per_node", "warning", "4096 ranks of 1 threads share", "are faster")]),
        (RayCluster(nodes=2), []),
        (RayCluster(nodes=3), [("nodes", "warning", "3 are asked for, the cluster has 2 now", "wait_for_nodes")]),
        (RayCluster(gpus_per_rank=1), [("GPU of all ranks", "warning", "1 are asked for, the cluster has 0 now", "waits")]),
        (RayCluster(cpus_per_rank=5), [("CPU of all ranks", "warning", "5 are asked for, the cluster has 4 now", "waits")]),
    ],
)
def test_a_cluster_file_is_held_against_what_is_there(
    cluster: ClusterConfig, found: list[tuple[str, str, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.doctor_cluster.file_system", lambda *_: "nfs4")
    findings = check_cluster(cluster, _site(ray=RayState(2, {"CPU": 4.0})), runs=Path("runs"))
    if not found:
        assert [(finding.name, finding.status) for finding in findings] == [("file", "ok")]
    else:
        assert [(finding.name, finding.status) for finding in findings] == [line[:2] for line in found]
        assert all(line[2] in finding.found and line[3] in finding.mend for line, finding in zip(found, findings, strict=True))


def test_a_site_without_what_the_file_needs_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    nothing = Site(CPU_BUILD, None, None)
    wanted: list[ClusterConfig] = [SlurmCluster(), RayCluster(address="127.0.0.1:9"), RayCluster(gpus_per_rank=1)]
    found = [check_cluster(cluster, nothing, runs=Path("runs"))[0] for cluster in wanted]
    assert [(finding.name, finding.status) for finding in found] == [
        ("kind", "problem"),
        ("address", "problem"),
        ("gpus_per_rank", "problem"),
    ]
    assert check_cluster(RayCluster(), nothing, runs=Path("runs"))[0].status == "ok"


def test_folders_that_one_host_alone_sees_are_warned_of() -> None:
    mounts = "rootfs / overlay rw 0 0\n/dev/a /home ext4 rw 0 0\nserver:/x /home/me nfs4 rw 0 0\nserver:/y /home/men lustre rw 0 0\n"
    paths = {"/": "overlay", "/home": "ext4", "/home/me/runs": "nfs4", "/home/mendel": "ext4", "/home/men/runs": "lustre"}
    assert {path: file_system(Path(path), mounts) for path in paths} == paths
    assert [finding.status for finding in judge_shared(Path("runs"), "ext4")] == ["warning"]
    assert list(judge_shared(Path("runs"), "nfs4")) == []


def test_the_cores_of_a_container_are_at_least_one() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)


def _doctor(*words: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "RAY", "HF_"))}
    environment = {**clean, "HF_HOME": str(folder), "RAY_AUTH_TOKEN_PATH": str(folder / "token"), **variables}
    command = [sys.executable, "-m", "launch", "doctor", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_whole_examination_shows_no_token_and_ends_with_1_for_a_problem(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(SECRET)
    (tmp_path / "token").chmod(0o644)
    secrets = {"HF_TOKEN": SECRET, "RAY_AUTH_MODE": "token", "RAY_ADDRESS": "127.0.0.1:9"}
    ended = _doctor("--json", folder=tmp_path, **secrets)
    assert SECRET not in ended.stdout + ended.stderr
    found = json.loads(ended.stdout)
    assert set(found) == {"findings", "problems"} and all(
        set(finding) == {"group", "name", "status", "found", "mend"} for finding in found["findings"]
    )
    problems = {(finding["group"], finding["name"]) for finding in found["findings"] if finding["status"] == "problem"}
    assert {("Ray", "token"), ("Ray", "cluster")} <= problems and found["problems"] == len(problems)
    assert ended.returncode == 1 and ended.stderr == ""
    groups = list(dict.fromkeys(finding["group"] for finding in found["findings"]))
    assert groups == ["Python and packages", "Devices", "Machine", "Hugging Face Hub", "Slurm", "Ray"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["token"], "nothing is left behind"


def test_the_list_for_people_is_compact_and_a_cluster_file_is_compared(tmp_path: Path) -> None:
    ended = _doctor("--cluster", "local", folder=tmp_path)
    headings = [line for line in ended.stdout.splitlines() if not line.startswith(" ")]
    assert headings[:-1] == ["Python and packages", "Devices", "Machine", "Hugging Face Hub", "Slurm", "Ray", "Cluster file"]
    assert headings[-1].startswith("no problems, ") == (ended.returncode == 0)
    ended = _doctor("--cluster", "slurmm", folder=tmp_path)
    assert ended.returncode == 2 and "did you mean 'slurm'?" in ended.stderr


def test_whatever_hangs_is_a_finding_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **__: object) -> None:
        time.sleep(30)

    monkeypatch.setattr(doctor, "_ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(doctor, "_RAY_SECONDS", 0.1)
    monkeypatch.setattr(doctor, "_MORE_SECONDS", 0.1)
    monkeypatch.setattr(doctor.Torch, "ask", lambda **_: CPU_BUILD)
    monkeypatch.setattr(doctor, "machine", hang)
    monkeypatch.setattr(doctor, "hub_reachable", hang)
    monkeypatch.setattr(doctor.doctor_slurm, "probe", hang)
    monkeypatch.setattr(doctor.doctor_ray, "probe", hang)
    began = time.monotonic()
    findings = doctor.examine(None, online=True, runs=tmp_path)
    assert time.monotonic() - began < 2
    problems = [(finding.group, finding.found) for finding in findings if finding.status == "problem"]
    assert problems == [(group, "no answer in time") for group in ("Machine", "Hugging Face Hub", "Slurm", "Ray")]
