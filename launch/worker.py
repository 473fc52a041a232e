"""One rank's process: join the others, do the job, end with an exit code that the launcher understands."""

import contextlib
import errno
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from data_shards.files import json_text, replace_file
from data_shards.host_memory import keep_freed_memory
from data_shards.remote.retry import FetchError, RefusedError
from trainer.exit_codes import BAD_INPUT, CRASH, DATA_BUDGET, DONE, INTERRUPTED, IO_ERROR, NUMERIC, PEER_LOST
from trainer.lease import Lease
from trainer.stop import StopRequest, unblock_signals
from trainer.watch import Watch

logger = logging.getLogger(__name__)

_JOBS = {
    "train": "trainer.train:train_job",
    "distill": "trainer.distill:distill_job",
    "sample": "trainer.sample:sample_job",
    "evaluate": "trainer.evaluate:evaluate_job",
    "export": "trainer.export:export_job",
    "report": "trainer.report.job:report_job",
    "hash": "trainer.hash:hash_job",
    "plan": "trainer.plan.job:plan_job",
    "make-tiny": "trainer.tiny_models.make:make_tiny_job",
    "import": "trainer.import_checkpoint:import_job",
    "caption": "data_shards.derive.caption:caption_job",
    "encode": "data_shards.derive.encode:encode_job",
    "draw": "trainer.draw_shards:draw_job",
}
# Libraries of frozen models draw bars and print advice once a rank, into which our own lines would vanish.
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
_RUNS = ("train", "distill", "caption", "encode", "draw")
_LATER_SECONDS = 30.0
"""By which collectives give up after the watch, which can name the rank at fault."""


def main() -> None:
    """`python -m launch.worker KIND PATH OPTIONS`, with torch's standard variables in the environment."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    kind, path, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    code = CRASH
    try:
        code = _run(path, kind, options) if kind in _RUNS else _work(path, kind, options)
    except BaseException:
        with contextlib.suppress(OSError):
            sys.stderr.write(traceback.format_exc())
    finally:
        with contextlib.suppress(OSError, ValueError):  # a full disk under a redirected output
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        # Threads of gloo may abort while the interpreter tears down; all work is done and flushed.
        os._exit(code)


def _run(run_dir: Path, kind: str, options: dict[str, object]) -> int:
    """A job that owns a folder: it can be asked to stop, is watched, and is alone in its folder."""
    stop = StopRequest()
    stop.install()  # before the seconds that importing torch takes
    rank, limit_seconds = _rank(), _limit_seconds()
    # Where this host does not see the folder, the ranks find out together, once they have met.
    seen, lease, watch = run_dir.is_dir(), None, None
    try:
        _init_logging(run_dir if seen else None)
        if seen and rank == 0:
            lease = Lease.take(run_dir)
    except (ValueError, OSError) as error:
        code = _exit_code(error)
        _report(None, error, code)  # the folder may be another job's
        _refuse(error)
        return code
    try:
        if seen:
            watch = _watch(run_dir, rank, limit_seconds, lease, stop)
        _join(limit_seconds + _LATER_SECONDS, watch)
        _check_visible(run_dir, limit_seconds)
        assert watch is not None, "a folder that is not there is an error of check_visible"
        watch.phase("import", 0)
        code = _job(kind)(run_dir, options, stop, watch)
        if rank == 0:
            reason = "done" if code == DONE else "asked to stop; the same command goes on from the checkpoint"
            _write_record(run_dir, {"code": code, "reason": reason})
        watch.phase("end", 0)
        _part()
    except Exception as error:
        code = _exit_code(error)
        _report(run_dir, error, code)
    if watch:
        watch.close()  # before the lease goes, which it renews
    if lease:
        _release(lease)
    return code


def _work(path: Path, kind: str, options: dict[str, object]) -> int:
    """A job that only reads what a run has left."""
    unblock_signals()
    _init_logging(None)
    try:
        _join(_limit_seconds(), None)
        code = _job(kind)(path, options)
        _leave()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        code = _exit_code(error)
        _report(None, error, code)
        return code


def _watch(run_dir: Path, rank: int, limit_seconds: float, lease: Lease | None, stop: StopRequest) -> Watch:
    world_size, here = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    several_hosts = here < world_size
    return Watch(
        run_dir, rank=rank, world_size=world_size, limit_seconds=limit_seconds, several_hosts=several_hosts, lease=lease, stop=stop
    )


def _join(timeout_seconds: float, watch: Watch | None) -> None:
    """Meet the other ranks. Collective."""
    if watch:
        watch.phase("import", 0)
    from data_shards import ranks

    if ranks.device().type == "cpu":
        keep_freed_memory()
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which other libraries import, prints that it found no GPU
    if watch:
        watch.phase("rendezvous", 0)
    ranks.init_process_group(timeout_seconds=timeout_seconds)


def _check_visible(run_dir: Path, limit_seconds: float) -> None:
    from trainer.visible import PATIENCE_SECONDS, check_visible

    # The ranks that see all wait for those that do not, and may not take them for lost.
    check_visible(run_dir, patience_seconds=min(PATIENCE_SECONDS, limit_seconds / 2))


def _part() -> None:
    """Leave the others after rank 0 has written how the run ended: some launchers end all ranks when the first one leaves."""
    from data_shards import ranks

    with contextlib.suppress(RuntimeError):  # the run has ended, whatever becomes of a rank from now on
        ranks.barrier()
    _leave()


def _leave() -> None:
    from data_shards import ranks

    ranks.destroy_process_group()


def _job(kind: str) -> Callable[..., int]:
    """The job's function; its module is imported now, after the ranks have joined."""
    module, function = _JOBS[kind].split(":")
    return getattr(import_module(module), function)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _limit_seconds() -> float:
    return float(os.environ.get("HALFSTEP_TIMEOUT_SECONDS", "300"))


def _exit_code(error: Exception) -> int:
    """The worker's exit code (design: the only language between trainer and launchers)."""
    match error:
        case ValueError():
            return BAD_INPUT
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EIO | errno.EROFS):
            return IO_ERROR
        case RefusedError():  # a store that says no will say it again
            return BAD_INPUT
        case OSError() | ImportError() | FetchError():
            return CRASH
    from data_shards.ranks import PeerLost
    from trainer.engines.engine import NumericError
    from trainer.metrics import DataBudgetSpent

    match error:
        case NumericError():
            return NUMERIC
        case DataBudgetSpent():
            return DATA_BUDGET
        case PeerLost():
            return PEER_LOST
        case RuntimeError() if _is_broken_collective(error):
            return PEER_LOST
        case _:
            return CRASH


def _is_broken_collective(error: RuntimeError) -> bool:
    """Whether a collective inside torch's or DeepSpeed's own code lost a peer: nccl and stores have a class for it, gloo a text."""
    return "DistError" in {kind.__name__ for kind in type(error).__mro__} or "gloo/transport" in str(error)


def _report(run_dir: Path | None, error: Exception, code: int) -> None:
    """Say why this rank ends: a message for what a user can mend, a traceback for our own faults."""
    rank = _rank()
    if code == CRASH and not isinstance(error, FetchError | ConnectionError):
        text = "".join(traceback.format_exception(error))
    else:
        text = f"error: {error}\n" if rank == 0 else f"rank {rank}: error: {error}\n"
    log = run_dir / "logs" / "rank_0.log" if run_dir and rank == 0 else None
    # A rank that only lost its peers is no cause: the launcher shows the one at fault, and the log keeps this.
    if log is None or code != PEER_LOST:
        _write_or_say(lambda: sys.stderr.write(text), "the cause")
    if log is not None:
        _write_or_say(lambda: _append(log, text), str(log))
    if run_dir and code != PEER_LOST:
        _write_record(run_dir, {"code": code, "reason": f"{type(error).__name__}: {error}", "rank": rank})


def _refuse(error: Exception) -> None:
    """Tell the launcher that this attempt was not allowed to begin, in a file of its own: exit.json may be another job's."""
    path = os.environ.get("HALFSTEP_REFUSAL")
    if path:
        _write_or_say(lambda: replace_file(Path(path), f"{error}\n"), path)


def _write_record(run_dir: Path, record: dict[str, object]) -> None:
    _write_or_say(lambda: replace_file(run_dir / "exit.json", json_text(record)), str(run_dir / "exit.json"))


def _append(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def _write_or_say(write: Callable[[], object], what: str) -> None:
    """Write, and on a disk that takes no more go on: how a job ended does not depend on whether it can be written down."""
    try:
        write()
    except OSError as error:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"rank {_rank()}: cannot write {what}: {error}\n")


def _release(lease: Lease) -> None:
    try:
        lease.release()
    except OSError as error:
        logger.warning("the run's lease cannot be given back: %s; the next job waits until it is seen to be dead", error)


def _init_logging(run_dir: Path | None) -> None:
    """Rank 0 logs to the terminal and its file, the others' output is their file."""
    rank = _rank()
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if run_dir and rank == 0:
        (run_dir / "logs").mkdir(exist_ok=True)
        handlers.append(logging.FileHandler(run_dir / "logs" / "rank_0.log"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", handlers=handlers
    )
    # why its kernels do not run here is what `halfstep doctor` says, and engine.attention=xformers; not every start of a rank
    logging.getLogger("xformers").setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
