"""Runs as jobs of a Ray cluster, over http: submitted, looked at, ended."""

import json
import os
import re
import shlex
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from launch.cluster import RayCluster
from launch.job import Job
from launch.submitted import Submission, record_submission

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_STOP_SECONDS = 600
"""What a driver that is told to stop gets to let its ranks commit; Ray itself would give it 3."""
_NO_SUCH_JOB = "status code 404"


def submit(job: Job, cluster: RayCluster, address: str) -> None:
    """Hand a run to the Ray cluster at an http(s) address, and write down the job's name.

    Raises: ValueError for a cluster without authentication, or one that refuses ours; RuntimeError if it cannot be reached."""
    _check_authenticated(address)
    name = f"ray-{re.sub(r'[^A-Za-z0-9_-]', '_', job.path.name)}-{uuid.uuid4().hex[:8]}"
    python = cluster.python or sys.executable
    words = [python, "-m", "launch.ray_train", job.kind, str(job.path), json.dumps(job.options), name]
    _client(address).submit_job(
        entrypoint=f"exec {shlex.join(words)}",
        submission_id=name,
        runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS)}},
    )
    record_submission(job.path, Submission("ray", name, f"job/{name}.out", address=address))
    sys.stderr.write(
        f"queued as job {name} of the Ray cluster at {address}: {job.path}\n"
        f"  halfstep status {job.path}      halfstep logs {job.path} --follow      halfstep stop {job.path}\n"
    )


def job_state(submission: Submission) -> Literal["queued", "running", "ended"] | None:
    """Where a job stands; None if the cluster does not know it, or is gone.

    Raises: ValueError if the cluster refuses our token; RuntimeError in Ray's words."""
    from ray.job_submission import JobStatus

    client = _client_if_there(submission)
    if client is None:
        return None
    try:
        status = client.get_job_status(submission.job_id)
    except RuntimeError as error:
        if _NO_SUCH_JOB in str(error):
            return None
        raise
    if status.is_terminal():
        return "ended"
    return "queued" if status == JobStatus.PENDING else "running"


def job_log(submission: Submission) -> str | None:
    """What Ray itself has of a job's output, such as why its driver could not start; None if the cluster knows nothing of it.

    Raises: ValueError, RuntimeError as job_state."""
    client = _client_if_there(submission)
    return client.get_job_logs(submission.job_id) if client and job_state(submission) else None


def stop_job(submission: Submission) -> None:
    """End a job; one that runs commits a checkpoint first.

    Raises: ValueError, RuntimeError as job_state."""
    client = _client_if_there(submission)
    if client and job_state(submission):
        client.stop_job(submission.job_id)


def _check_authenticated(address: str) -> None:
    """Raises: ValueError if anybody on the network could start programs there, and read what we send."""
    parts = urlsplit(address)
    if _has_token():
        return
    if parts.scheme == "https" and parts.hostname:
        return  # something in front of Ray takes care of it
    if parts.hostname == "localhost" or (parts.hostname or "").startswith("127."):
        sys.stderr.write(f"warning: {address} is used without a token: every user of this machine can run programs there as you\n")
        return
    raise ValueError(
        f"{address}: no token authentication, so everybody who reaches it can run programs there; start its Ray with RAY_AUTH_MODE=token, "
        "and here set RAY_AUTH_MODE=token with the same token in ~/.ray/auth_token (mode 0600) or the file named by RAY_AUTH_TOKEN_PATH"
    )


def _has_token() -> bool:
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return False
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or path.exists()


def _client_if_there(submission: Submission) -> "JobSubmissionClient | None":
    assert submission.address is not None, "jobs of Ray are recorded with an address"
    try:
        return _client(submission.address)
    except ConnectionError:
        return None


def _client(address: str) -> "JobSubmissionClient":
    """Raises: ConnectionError if nothing answers; ValueError if it refuses our token, or Ray lacks the parts for jobs here."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ValueError(f"{address}: refused our token: {str(error).splitlines()[0]}; set RAY_AUTH_MODE=token and the token") from error
