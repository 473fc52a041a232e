"""One rank's process: join the others, do the job, end with an exit code that the launcher understands."""

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
from trainer.exit_codes import BAD_INPUT, CRASH, DATA_BUDGET, INTERRUPTED, IO_ERROR, NUMERIC, PEER_LOST
from trainer.stop import StopRequest

_JOBS = {
    "train": "trainer.train:train_job",
    "distill": "trainer.distill:distill_job",
    "sample": "trainer.sample:sample_job",
    "evaluate": "trainer.evaluate:evaluate_job",
    "export": "trainer.export:export_job",
    "report": "trainer.report:report_job",
    "hash": "trainer.hash:hash_job",
}
_RUNS = ("train", "distill")


def main() -> None:
    """`python -m launch.worker KIND PATH OPTIONS`, with torch's standard variables in the environment."""
    kind, path, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    _init_logging(path if kind in _RUNS else None)
    try:
        code = _run(kind, path, options)
    except KeyboardInterrupt:
        code = INTERRUPTED
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of gloo may abort while the interpreter tears down; all work is done and flushed.
    os._exit(code)


def _run(kind: str, path: Path, options: dict[str, object]) -> int:
    stop = StopRequest()
    if kind in _RUNS:
        stop.install()  # before the seconds that importing torch takes
    from trainer import dist

    try:
        dist.init_process_group(timeout_seconds=float(os.environ.get("HALFSTEP_TIMEOUT_SECONDS", "300")))
        code = _job(kind)(path, options, stop) if kind in _RUNS else _job(kind)(path, options)
        if kind in _RUNS and dist.is_rank_0():
            reason = "done" if code == 0 else "asked to stop; the same command goes on from the checkpoint"
            replace_file(path / "exit.json", json_text({"code": code, "reason": reason}))
        dist.destroy_process_group()
        return code
    except Exception as error:
        code = _exit_code(error)
        _report(path if kind in _RUNS else None, error, code)
        return code


def _job(kind: str) -> Callable[..., int]:
    module, function = _JOBS[kind].split(":")
    return getattr(import_module(module), function)


def _exit_code(error: Exception) -> int:
    """The worker's exit code (design: the only language between trainer and launchers)."""
    from trainer.dist import PeerLost
    from trainer.engines.engine import NumericError
    from trainer.metrics import DataBudgetSpent

    match error:
        case NumericError():
            return NUMERIC
        case DataBudgetSpent():
            return DATA_BUDGET
        case PeerLost():
            return PEER_LOST
        case ValueError():
            return BAD_INPUT
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EIO | errno.EROFS):
            return IO_ERROR
        case _:
            return CRASH


def _report(run_dir: Path | None, error: Exception, code: int) -> None:
    """Say why this rank ends: a message for what a user can mend, a traceback for our own faults."""
    rank = os.environ.get("RANK", "0")
    if code == CRASH:
        text = "".join(traceback.format_exception(error))
    else:
        text = f"error: {error}\n" if rank == "0" else f"rank {rank}: error: {error}\n"
    sys.stderr.write(text)
    if run_dir and rank == "0" and (run_dir / "logs").is_dir():
        with open(run_dir / "logs" / "rank_0.log", "a", encoding="utf-8") as log:
            log.write(text)
    if run_dir and run_dir.is_dir() and code != PEER_LOST:
        record = {"code": code, "reason": f"{type(error).__name__}: {error}", "rank": int(rank)}
        replace_file(run_dir / "exit.json", json_text(record))


def _init_logging(run_dir: Path | None) -> None:
    """Rank 0 logs to the terminal and its file, the others' output is their file."""
    rank = int(os.environ.get("RANK", "0"))
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if run_dir and rank == 0:
        (run_dir / "logs").mkdir(exist_ok=True)
        handlers.append(logging.FileHandler(run_dir / "logs" / "rank_0.log"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", handlers=handlers
    )


if __name__ == "__main__":
    main()
