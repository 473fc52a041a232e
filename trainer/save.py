"""Committing checkpoints: staged by the training thread, written by another one, whole or absent on all ranks alike."""

import errno
import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import final

from torch import Tensor

from data_shards import ranks
from data_shards.files import fsync_directory, write_durable
from trainer.checkpoint import Piece, Staging, agree_on_pieces, file_name, tensors_record
from trainer.engines.engine import Shard, State
from trainer.manifest import SCHEMA_VERSION, Retention, checkpoints_folder, delete, note_latest, read_checkpoint, seal, verify_files

logger = logging.getLogger(__name__)

Facts = Mapping[str, object]
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@final
class Saver:
    """One run's saves. At most one is on its way; its collectives run on a process group of their own."""

    def __init__(
        self,
        run_dir: Path,
        state: State,
        pieces: Sequence[Piece],
        *,
        retention: Retention,
        asynchronous: bool,
        timeout_seconds: float,
        before_commit: Callable[[], None] = lambda: None,
        progress: Callable[[str], None] = lambda _: None,
        may_commit: Callable[[], bool] = lambda: True,
    ) -> None:
        """before_commit: makes durable, on every rank, what the checkpoint refers to. progress: told what a save is doing.

        may_commit: asked by rank 0 just before the rename: whether this job still owns the run. Collective."""
        self.parent = checkpoints_folder(run_dir) if ranks.is_rank_0() else run_dir / "checkpoints"
        self.run_dir, self.pieces, self.retention, self.asynchronous = run_dir, pieces, retention, asynchronous
        self.before_commit, self.progress, self.may_commit = before_commit, progress, may_commit
        self.staging = Staging(state, pieces)
        self.group = ranks.new_cpu_group(timeout_seconds=timeout_seconds)
        [self.name, *_] = ranks.all_gather_text(uuid.uuid4().hex)
        sizes = [int(text) for text in ranks.all_gather_text(str(self.staging.size_bytes))]
        self.needed_bytes = sum(sizes)
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    @property
    def ended(self) -> bool:
        """Whether this rank's part of the save on its way has ended, well or not; ranks may differ."""
        return self.thread is not None and not self.thread.is_alive()

    def start(self, step: int, facts: Facts) -> None:
        """Copy the state and commit it as the checkpoint of `step`, in the background if asynchronous. facts: for the manifest. Collective.

        Raises: as `finish`, of the save before."""
        self.finish()
        self.progress("stage")
        self.staging.copy()
        self.error = None
        self.thread = threading.Thread(target=self._run, args=(step, facts), name="save", daemon=True)
        self.thread.start()
        if not self.asynchronous:
            self.thread.join()  # how it ended is for `finish` to say, as with one in the background

    def finish(self) -> None:
        """Wait for the save on its way, if any.

        Raises: OSError where a rank could not write, on all ranks alike, with its path and what was needed; PeerLost. Collective."""
        if self.thread is None:
            return
        self.thread.join()
        self.thread = None
        if self.error is not None:
            raise self.error

    def wait(self, seconds: float) -> None:
        """Give the save on its way, if any, so much time to end; how it ends is nobody's concern any more."""
        if self.thread is not None:
            self.thread.join(seconds)

    def close(self) -> None:
        """Give the process group back; no save is on its way. Collective."""
        assert self.thread is None, "finish comes first"
        ranks.destroy_group(self.group)

    def _run(self, step: int, facts: Facts) -> None:
        try:
            self._save(step, facts)
        except Exception as error:
            self.error = error
        finally:
            self.progress("")

    def _save(self, step: int, facts: Facts) -> None:
        temporary = self.parent / f"step_{step:06d}.tmp-{self.name}"
        self.progress("write")
        reports = self._agree(step, lambda: self._write_own(temporary))
        files = {file_name(rank): report for rank, report in enumerate(reports)}
        self.progress("commit")
        self._agree(step, lambda: self._commit(step, temporary, {**facts, "files": files}))

    def _agree(self, step: int, act: Callable[[], Mapping[str, int | str]]) -> list[Mapping[str, int | str]]:
        """Act, and tell all ranks what came of it; what goes wrong on one is raised on all, and the unfinished folder removed."""
        try:
            report = act()
        # Whatever it is: a rank that kept it to itself would leave the others waiting for its report.
        except Exception as error:
            number = (error.errno or errno.EIO) if isinstance(error, OSError) else 0
            what = (error.strerror or str(error)) if isinstance(error, OSError) else repr(error)
            report = {"errno": number, "error": f"rank {ranks.rank()} cannot save {self.parent / f'step_{step:06d}'}: {what}"}
        reports = [json.loads(text) for text in ranks.all_gather_text(json.dumps(report), group=self.group)]
        failed = next((report for report in reports if "error" in report), None)
        if failed is None:
            return reports
        if ranks.is_rank_0():
            for path in self.parent.glob(f"*.tmp-{self.name}"):
                shutil.rmtree(path, ignore_errors=True)
        if not failed["errno"]:
            raise RuntimeError(failed["error"])
        free = shutil.disk_usage(self.parent).free
        room = f" ({self.needed_bytes} bytes are needed, {free} are free)" if failed["errno"] in DISK_FULL else ""
        raise OSError(
            failed["errno"], f"{failed['error']}{room}; older checkpoints are as they were. Mend it, then run the same command again"
        )

    def _write_own(self, temporary: Path) -> Mapping[str, int | str]:
        self.before_commit()
        if ranks.is_rank_0() and shutil.disk_usage(self.parent).free < self.needed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        temporary.mkdir(parents=True, exist_ok=True)
        return self.staging.write(temporary / file_name(ranks.rank()))

    def _commit(self, step: int, temporary: Path, facts: Facts) -> Mapping[str, int | str]:
        """On rank 0: manifest, fsync, rename, fsync of the parent; then what need not stay is deleted."""
        if not ranks.is_rank_0():
            return {}
        manifest = {"schema_version": SCHEMA_VERSION, "step": step, **facts, "tensors": tensors_record(self.pieces)}
        write_durable(temporary / "manifest.json", seal(manifest).encode())
        fsync_directory(temporary)
        if not self.may_commit():
            raise OSError(errno.EBUSY, "another job has taken over this run")
        final = self.parent / f"step_{step:06d}"
        if os.path.lexists(final) and not _is_whole(final):
            delete(final)
        if final.exists():
            shutil.rmtree(temporary)  # it holds the same state
        else:
            os.rename(temporary, final)
        fsync_directory(self.parent)
        try:
            note_latest(self.run_dir, step)
            self.retention.delete_old(self.run_dir, newest=step)
        except OSError as error:
            logger.warning("%s is committed, but older ones cannot be tidied away: %s", final, error)
        return {}


def write_checkpoint(run_dir: Path, step: int, *, parts: Mapping[str, Mapping[str, Tensor]], facts: Facts) -> Path:
    """Commit whole tensors, by part and name, as the checkpoint of `step`; nothing older is deleted. Collective."""
    state = {
        part: {name: Shard(tuple(tensor.shape), 0, tensor.detach()) for name, tensor in tensors.items()} for part, tensors in parts.items()
    }
    keep_all = Retention(keep_last=2**31, keep_every_steps=None, keep_best=0)
    saver = Saver(run_dir, state, agree_on_pieces(state), retention=keep_all, asynchronous=False, timeout_seconds=300.0)
    saver.start(step, facts)
    saver.finish()
    return run_dir / "checkpoints" / f"step_{step:06d}"


def _is_whole(path: Path) -> bool:
    try:
        checkpoint = read_checkpoint(path)
        verify_files(checkpoint, checkpoint.files)
    except (ValueError, OSError):
        return False
    return True
