"""A rank's heartbeat and the thread that owns its deadlines: it ends a hang and names the rank at fault. Free of torch."""

import faulthandler
import json
import logging
import mmap
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import final

from data_shards.files import json_text, replace_file, write_durable
from trainer.exit_codes import PEER_LOST
from trainer.lease import Lease, start_ticks
from trainer.stop import StopRequest, is_stop_requested

logger = logging.getLogger(__name__)

_FILE_BYTES = 512
_PHASE_BYTES = 18
_SAVING_BYTES = 98
_TIME_BYTES = 14
_MORE_SECONDS = {"start": 600.0, "import": 600.0, "rendezvous": 20.0, "measure": 3600.0, "wait": 3600.0}
"""What a phase may last beyond the limit: importing torch from a cold network file system takes minutes, and not the same on each host.

Rank 0 measures, while the others wait, how a step is best computed: a large model's compiler may work for many minutes."""
_LAST_SECONDS = 10.0
"""What a rank that ends itself may take: the file system may hang too."""
_WAITING = frozenset({"rendezvous", "wait", "reduce", "end"})
"""Phases in which a rank waits for the others."""


@final
@dataclass(frozen=True)
class Heartbeat:
    """Where a rank stands, by its own host's clock."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    since: float
    """When the phase began, in epoch seconds."""
    saving: str
    """What a save in the background is doing; empty without one."""
    beat: float
    """When the rank's side thread last showed that the process runs, in epoch seconds."""


@final
class Watch:
    """This rank's heartbeat in RUN_DIR/heartbeats/rank_N.json, and the thread that looks after it.

    The main thread says what it does with `phase`. Where it says nothing for `limit_seconds`, the thread writes all stacks,
    names the rank at fault and ends the process with 70. Time in which the whole process stood still does not count."""

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        world_size: int,
        limit_seconds: float,
        several_hosts: bool = False,
        lease: Lease | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        """Begin in phase `start`. several_hosts: whether other hosts' ranks read the file. lease: renewed with every beat; rank 0's.

        stop: told when a stop is asked for in RUN_DIR (trainer.stop.request_stop). Raises: OSError."""
        self.lease, self._stop = lease, stop
        self._several_hosts = several_hosts
        self._run_dir, self._rank, self._world_size, self._limit_seconds = run_dir, rank, world_size, limit_seconds
        self._interval = min(5.0, max(0.2, limit_seconds / 60))
        (run_dir / "heartbeats").mkdir(exist_ok=True)
        (run_dir / "logs").mkdir(exist_ok=True)
        self._hang, self._stacks = run_dir / "heartbeats" / "hang", _stacks_path(run_dir, rank)
        self._hang.unlink(missing_ok=True)
        self._stacks.unlink(missing_ok=True)
        self._quoted: dict[str, bytes] = {}
        self._moved, self._phase, self._waited, self._beaten = True, "start", 0.0, time.monotonic()
        self._start_up: list[tuple[str, float]] | None = [("start", time.monotonic() - _age_seconds())]
        self._seen: dict[int, tuple[float, float]] = {}  # of each other rank: its last new beat, and when it was seen here
        self._open_file()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="watch", daemon=True)
        self._thread.start()

    def phase(self, name: str, step: int) -> None:
        """Say what the main thread does from now on; a few microseconds, no system call."""
        text = self._quoted.get(name) or self._quote(name)
        self._map[self._main] = b'%12d, "phase": %b, "since": %14.3f' % (step, text, time.time())
        self._phase = name
        self._moved = True
        if self._start_up is not None:
            self._start_up.append((name, time.monotonic()))

    def start_up_seconds(self) -> dict[str, float]:
        """What each phase took from the start of the process until now; the first call ends the count."""
        moments, self._start_up = [*(self._start_up or []), ("", time.monotonic())], None
        seconds: dict[str, float] = {}
        for (name, since), (_, until) in pairwise(moments):
            seconds[name] = round(seconds.get(name, 0.0) + until - since, 3)
        return seconds

    def tick(self) -> None:
        """Say that a long phase makes progress; from any thread."""
        self._moved = True

    def saving(self, name: str) -> None:
        """Say what a save in the background does from now on, "" when it is over; from the thread that saves."""
        if self._phase == "join":
            self._moved = True  # what the main thread waits for goes on
        self._map[self._save] = json.dumps(name[: _SAVING_BYTES // 6 - 1]).encode().ljust(_SAVING_BYTES)

    def close(self) -> None:
        """End the thread; the heartbeat stays on disk."""
        self._closing.set()
        self._thread.join(_LAST_SECONDS)
        self._beat()

    def _open_file(self) -> None:
        """Make the heartbeat file anew: a rank of an earlier attempt may still have the old one mapped."""
        host, now = json.dumps(socket.gethostname()[:64]), time.time()
        head = f'{{"rank": {self._rank}, "host": {host}, "pid": {os.getpid()}, "step": '.encode()
        main = b'%12d, "phase": %b, "since": %14.3f' % (0, self._quote("start"), now)
        text = head + main + b', "saving": ' + b'""'.ljust(_SAVING_BYTES) + b', "beat": ' + b"%14.3f" % now + b"}"
        self._main = slice(len(head), len(head) + len(main))
        self._save = slice(self._main.stop + 12, self._main.stop + 12 + _SAVING_BYTES)
        self._last = slice(self._save.stop + 10, self._save.stop + 10 + _TIME_BYTES)
        path = _heartbeat_path(self._run_dir, self._rank)
        text = text.ljust(_FILE_BYTES - 1) + b"\n"
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        # Written in full: a sparse file's page gets its place on the disk when it is touched, and a full disk kills with SIGBUS.
        write_durable(temporary, text)
        os.replace(temporary, path)
        self._file = open(path, "r+b", buffering=0)
        # On one host the file is exact at every moment, whatever becomes of this process. To be seen by other hosts it has to be
        # written out again and again, and a thread that touches a mapped page in that moment waits for the file system with the
        # interpreter's lock in its hands (measured: up to 1 s on a busy disk): there the thread copies it, once a beat.
        self._map = mmap.mmap(-1 if self._several_hosts else self._file.fileno(), _FILE_BYTES)
        self._map[:] = text

    def _quote(self, name: str) -> bytes:
        text = self._quoted[name] = json.dumps(name).encode().ljust(_PHASE_BYTES)
        assert len(text) == _PHASE_BYTES, f"phase {name!r} is longer than {_PHASE_BYTES - 2} characters"
        return text

    def _serve(self) -> None:
        while not self._closing.wait(self._interval):
            self._beat()
            if self._stop and not self._stop.reason and is_stop_requested(self._run_dir):
                self._stop.ask("halfstep stop")
            if self._hang.exists() or self._is_hanging():
                self._end()

    def _beat(self) -> None:
        """Show that the process runs, and renew the lease."""
        self._map[self._last] = b"%14.3f" % time.time()
        try:
            if self._several_hosts:
                os.pwrite(self._file.fileno(), self._map[:], 0)
                os.fsync(self._file.fileno())
            if self.lease:
                self.lease.renew()
        except OSError as error:
            logger.warning("rank %d: cannot write its heartbeat: %s", self._rank, error)

    def _is_hanging(self) -> bool:
        """Count the time since the main thread last moved; past a quarter of the limit, look at the other ranks."""
        now = time.monotonic()
        # A process that was stopped as a whole wakes up late: that was no wait of the main thread's.
        self._waited += min(now - self._beaten, 2 * self._interval)
        self._beaten = now
        if self._moved:
            self._moved, self._waited = False, 0.0
            self._seen.clear()
        limit = self._limit_seconds + _MORE_SECONDS.get(self._phase, 0.0)
        if self._waited >= limit / 4:
            self._look(now)
        return self._waited >= limit

    def _look(self, now: float) -> dict[int, Heartbeat]:
        """All heartbeats; remembers when each was seen to change, because clocks of two hosts are never compared."""
        beats = read_heartbeats(self._run_dir)
        for rank, heartbeat in beats.items():
            if rank not in self._seen or self._seen[rank][0] != heartbeat.beat:
                self._seen[rank] = (heartbeat.beat, now)
        return {rank: heartbeat for rank, heartbeat in beats.items() if rank < self._world_size}

    def _end(self) -> None:
        """Leave stacks and a reason, let the other ranks leave theirs, and end the process."""
        last_resort = threading.Timer(_LAST_SECONDS, os._exit, (PEER_LOST,))
        last_resort.daemon = True
        last_resort.start()
        try:
            self._write_stacks()
            silent = self._say_why()
            deadline = time.monotonic() + 1.5 * self._interval + 1.0
            # The first to leave breaks the others' collective, which ends them before they have written.
            while time.monotonic() < deadline and not self._all_wrote_stacks(silent):
                threading.Event().wait(0.02)
        except Exception:
            logger.exception("rank %d: a hang, of which nothing more can be said", self._rank)
        finally:
            os._exit(PEER_LOST)

    def _write_stacks(self) -> None:
        with open(self._stacks, "w") as file:
            own = read_heartbeats(self._run_dir).get(self._rank)
            file.write(f"rank {self._rank} on {socket.gethostname()} (pid {os.getpid()}): {own}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _say_why(self) -> set[int]:
        """Name the rank at fault, once for all ranks: in the log and in exit.json. Returns the ranks that answer no more."""
        now = time.monotonic()
        beats = self._look(now)
        patience = max(2 * self._interval, self._limit_seconds / 4)
        silent = {rank: now - seen for rank, (_, seen) in self._seen.items() if now - seen > patience}
        rank, reason = verdict(beats, silent, world_size=self._world_size, limit_seconds=self._limit_seconds)
        record = self._run_dir / "exit.json"
        if _made(self._hang):
            logger.error("%s; stacks of all ranks: %s", reason, self._stacks.with_name("stacks_rank_*.txt"))
            if not record.exists():
                replace_file(record, json_text({"code": PEER_LOST, "reason": reason, "rank": rank}))
        else:
            logger.error("another rank has found a hang and says why in %s", record)
        return {*silent, *(set(range(self._world_size)) - set(beats))}

    def _all_wrote_stacks(self, silent: set[int]) -> bool:
        return all(_stacks_path(self._run_dir, rank).exists() for rank in range(self._world_size) if rank not in silent)


def read_heartbeats(run_dir: Path) -> dict[int, Heartbeat]:
    """The heartbeats in a RUN_DIR by rank, also those of ranks that no longer run; one that is just being written is absent."""
    found = {}
    for path in (run_dir / "heartbeats").glob("rank_*.json"):
        try:
            fields = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            continue
        match fields:
            case {
                "rank": int(rank),
                "host": str(host),
                "pid": int(pid),
                "step": int(step),
                "phase": str(phase),
                "since": float(since),
                "saving": str(saving),
                "beat": float(beat),
            }:
                found[rank] = Heartbeat(rank, host, pid, step, phase, since, saving, beat)
    return found


def verdict(beats: Mapping[int, Heartbeat], silent: Mapping[int, float], *, world_size: int, limit_seconds: float) -> tuple[int, str]:
    """The rank at fault in a hang, and why it is.

    silent: seconds since a rank was last seen to change its beat, for ranks that no longer do.
    One that never came is at fault, else one that answers no more, else one that waits for no other, and of several the one
    furthest behind, in the rarest phase, or longest in it."""
    missing = sorted(set(range(world_size)) - set(beats))
    if missing:
        return missing[0], f"rank {missing[0]} never started: it has no heartbeat{_others(beats, missing[0])}{_advice(limit_seconds)}"
    stopped = [beats[rank] for rank in silent if rank in beats]
    phases = Counter((beat.step, beat.phase) for beat in beats.values())
    at_fault = min(
        stopped or beats.values(),
        key=lambda beat: (beat.phase in _WAITING, beat.step, phases[beat.step, beat.phase], beat.since - beat.beat, beat.rank),
    )
    rank, seconds = at_fault.rank, max(0.0, at_fault.beat - at_fault.since) + silent.get(at_fault.rank, 0.0)
    what = "answers no more (stopped, or its host is gone)" if stopped else "is stuck"
    place = f"phase {at_fault.phase} of step {at_fault.step} for {seconds:.1f} s"
    where = f"rank {rank} on {at_fault.host} (pid {at_fault.pid})"
    return rank, f"{where} {what}: {place}{_others(beats, rank)}{_advice(limit_seconds)}"


def _others(beats: Mapping[int, Heartbeat], rank: int) -> str:
    places = Counter((beat.phase, beat.step) for beat in beats.values() if beat.rank != rank)
    listed = [f"{count} in {phase} of step {step}" for (phase, step), count in places.most_common(4)]
    return f"; the other ranks: {', '.join(listed)}" if listed else ""


def _advice(limit_seconds: float) -> str:
    limit = f"nothing moved for {limit_seconds:g} s (cluster.collective_timeout_seconds)"
    return f"; {limit}; the same command goes on from the newest checkpoint"


def _age_seconds() -> float:
    """How long ago this process was started."""
    started = start_ticks(os.getpid())
    assert started is not None, "a living process has a start time"
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def _made(path: Path) -> bool:
    """Make an empty file; False if it is there already."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _heartbeat_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "heartbeats" / f"rank_{rank}.json"


def _stacks_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"stacks_rank_{rank}.txt"
