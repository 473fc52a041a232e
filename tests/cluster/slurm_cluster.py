"""A real Slurm on this host: slurmctld, two or more slurmd, munge, all private to a test; nothing of /etc or /run is touched."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
_STOP_SECONDS = 30.0
_PAUSE_SECONDS = 3.0
"""Before a job is started again: slurmd takes a new credential for the revoked one of the attempt before, in the same second."""
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_CONFIG = """\
ClusterName=halfstep
SlurmctldHost={host}({controller})
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={root}/munge/socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=10
InactiveLimit=0
SlurmdTimeout={node_timeout_seconds}
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1{user_signal}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptExemptTime=0
JobRequeue=1
SlurmdParameters=config_overrides
MinJobAge=600
MailProg=/bin/true
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_seconds}
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """What a real Slurm needs and this machine lacks."""
    return [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]


@dataclass
class Host:
    """Where a slurmd runs: this host, or one of its network namespaces."""

    name: str
    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()
    """Words before its slurmd's command."""


@dataclass
class Slurm:
    """A running cluster, and what tests do to it."""

    root: Path
    hosts: list[Host]
    controller: str = "127.0.0.1"
    grace_seconds: int = 25
    node_timeout_seconds: int = 15
    """After which a node that does not answer is lost."""
    user_signal: bool = False
    """Whether preemption sends the job's own --signal instead of TERM (preempt_send_user_signal)."""
    port: int = 0
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        """Write slurm.conf and start every daemon; returns when all nodes are idle."""
        for name in ("state", "log", "run", "munge", *(f"spool-{host.name}" for host in self.hosts)):
            (self.root / name).mkdir(parents=True, mode=0o755)
        self.root.chmod(0o755)
        self.port = _free_ports(len(self.hosts) + 1)
        self.environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(self.root / "slurm.conf")}
        (self.root / "slurm.conf").write_text(self._config())
        self._start_munge()
        self._run("slurmctld", "-f", self.environment["SLURM_CONF"])
        for host in self.hosts:
            self.start_node(host.name)
        self.wait_for_nodes()

    def stop(self) -> None:
        """End every daemon and every job; by their own pid files."""
        subprocess.run(["scancel", "--user", str(os.getuid())], env=self.environment, capture_output=True, check=False, timeout=30)
        pids = [pid for path in (*self.root.glob("run/*.pid"), self.root / "munge/pid") if (pid := _pid(path))]
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        while any(_is_alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        # slurmctld waits long for a job's last step; a slurmstepd that is left alone speaks to the next cluster of its port.
        tasks = [pid for pid in _processes() if pid != os.getpid() and b"SLURM_JOB_ID" in b"".join(self._variables(pid))]
        steps = {parent for pid in tasks if _words(parent := _parent(pid)).startswith(b"slurmstepd")}
        for pid in [*(pid for pid in pids if _is_alive(pid)), *steps, *tasks]:
            _kill(pid)

    def start_node(self, name: str) -> None:
        """Start a node's slurmd."""
        host = next(host for host in self.hosts if host.name == name)
        self._run(*host.prefix, "slurmd", "-N", name, "-f", self.environment["SLURM_CONF"])

    def kill_node(self, name: str) -> None:
        """A node that dies: its slurmd and every process of its jobs, at once and without a word."""
        slurmd = _pid(self.root / f"run/slurmd-{name}.pid")
        assert slurmd is not None, f"{name} does not run"
        tasks = [pid for pid in _processes() if f"SLURMD_NODENAME={name}".encode() in self._variables(pid)]
        # slurmstepd first: it would tell the controller how its step has ended, which a dead node does not.
        steps = {parent for pid in tasks if _words(parent := _parent(pid)).startswith(b"slurmstepd")}
        for pid in [slurmd, *steps, *tasks]:
            _kill(pid)
        (self.root / f"run/slurmd-{name}.pid").unlink(missing_ok=True)

    def wait_for_nodes(self, seconds: float = 60) -> None:
        """Return when every node can take a job."""
        deadline = time.monotonic() + seconds
        while True:
            lines = self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %T").split("\n")
            if sum(line.endswith((" idle", " mixed", " allocated")) for line in lines) == len(self.hosts):
                return
            assert time.monotonic() < deadline, f"the cluster is not up: {lines}, see {self.root}/log"
            time.sleep(0.1)

    def run(self, *words: str) -> str:
        """One of Slurm's commands; returns what it prints."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def state(self, job_id: str) -> str:
        """A job's state in Slurm's own word."""
        return self.facts(job_id)["JobState"]

    def facts(self, job_id: str) -> Mapping[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job_id: str, *states: str, seconds: float = 120) -> str:
        """Return when a job is in one of the states, and which; see wait_until."""
        self.wait_until(job_id, lambda: self.state(job_id) in states, f"one of {', '.join(states)}", seconds=seconds)
        return self.state(job_id)

    def wait_until(self, job_id: str, condition: Callable[[], bool], what: str, *, seconds: float = 120) -> None:
        """Return when the condition holds. A job that was queued again starts soon, without Slurm's pause of two minutes."""
        deadline = time.monotonic() + seconds
        waits_since: float | None = None
        while not condition():
            facts = self.facts(job_id)
            if facts["JobState"] != "PENDING" or facts["Reason"] != "BeginTime":
                waits_since = None
            elif waits_since is None:
                waits_since = time.monotonic()
            elif time.monotonic() - waits_since > _PAUSE_SECONDS:
                self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")
            assert time.monotonic() < deadline, f"job {job_id} is {facts['JobState']} ({facts['Reason']}), wanted {what}"
            time.sleep(0.1)

    def _variables(self, pid: int) -> list[bytes]:
        """The environment of a process of one of this cluster's jobs; empty for any other."""
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return []
        return variables if f"SLURM_CONF={self.environment['SLURM_CONF']}".encode() in variables else []

    def _config(self) -> str:
        here = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={host.name} NodeHostname={host.name if host.prefix else here} NodeAddr={host.address} Port={self.port + number} "
            "CPUs=4 RealMemory=4000 State=UNKNOWN"
            for number, host in enumerate(self.hosts, 1)
        )
        return _CONFIG.format(
            host=here,
            controller=self.controller,
            user=_user(),
            root=self.root,
            port=self.port,
            nodes=nodes,
            grace_seconds=self.grace_seconds,
            node_timeout_seconds=self.node_timeout_seconds,
            user_signal=",preempt_send_user_signal" if self.user_signal else "",
        )

    def _start_munge(self) -> None:
        munge = self.root / "munge"
        key = munge / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._run("munged", "--force", *(f"--{option}={munge / name}" for option, name in files.items()))

    def _run(self, *words: str) -> None:
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on."""
    for number in range(120):
        first = 26000 + 50 * ((os.getpid() + number) % 120)  # clusters of two test runs start at different places
        sockets = [socket.socket() for _ in range(count)]
        try:
            for number, one in enumerate(sockets):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind(("", first + number))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise AssertionError("no free ports from 26000 to 32000")


def _pid(path: Path) -> int | None:
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text and _is_alive(int(text)) else None


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def _parent(pid: int) -> int:
    """Of a process; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def rank_pids(run_dir: Path) -> list[int]:
    """Processes of a run's ranks on this host, by their command lines; not srun's, which holds the same words."""
    wanted = b"\0-m\0launch.slurm_rank\0"
    return [
        pid for pid in _processes() if wanted in (words := _words(pid)) and str(run_dir).encode() in words and b"srun" not in words[:10]
    ]


def _words(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
