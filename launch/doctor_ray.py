"""halfstep doctor: whether a Ray cluster answers, what it has, and whether strangers could run programs on it."""

import http.client
import importlib.util
import json
import re
import socket
import stat
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Self, final
from urllib.parse import urlsplit

from launch.findings import Finding, ask

_GROUP = "Ray"
_CONNECT_SECONDS = 2.0
_LARGEST_ANSWER_BYTES = 1 << 24
_REFUSED = (http.client.UNAUTHORIZED, http.client.FORBIDDEN)
_OTHERS_RIGHTS = 0o077
_PLAIN = re.compile(r"node:|memory$|objectStoreMemory$")
"""Resources that every node has, and nobody asks for."""
_OPEN = "no token authentication: everybody who reaches it can run programs there as its user"
_ASKS = "asks for a token; set RAY_AUTH_MODE=token and put the cluster's into ~/.ray/auth_token, mode 0600"
_CLOSE = "start its Ray with RAY_AUTH_MODE=token, and set the same here with the token in ~/.ray/auth_token, mode 0600"


@final
@dataclass(frozen=True)
class RayState:
    """A Ray cluster that answers."""

    nodes: int
    resources: Mapping[str, float]
    """In all: CPU, GPU and what the site has named."""

    @classmethod
    def from_status(cls, text: str) -> Self:
        """From `ray status`."""
        active = re.search(r"^Active:\n(.*?)^Pending:", text, re.MULTILINE | re.DOTALL)
        nodes = sum(int(number) for number in re.findall(r"^ (\d+) \S", active[1], re.MULTILINE)) if active else 0
        usage = re.findall(r"^ [\d.]+/([\d.]+) (\S+)$", text, re.MULTILINE)
        return cls(nodes, {name: float(amount) for amount, name in usage})

    @classmethod
    def from_nodes(cls, text: str) -> Self:
        """From the dashboard's /nodes?view=summary."""
        raylets = [node["raylet"] for node in json.loads(text)["data"]["summary"]]
        total: dict[str, float] = {}
        for name, amount in (item for raylet in raylets for item in raylet.get("resourcesTotal", {}).items()):
            if not _PLAIN.match(name):
                total[name] = total.get(name, 0.0) + amount
        return cls(len(raylets), total)

    def __str__(self) -> str:
        amounts = ", ".join(f"{amount:g} {name}" for name, amount in sorted(self.resources.items()))
        return f"{self.nodes} node{'' if self.nodes == 1 else 's'}, {amounts or 'no resources'}"


def probe(address: str | None, variables: Mapping[str, str], *, seconds: float) -> tuple[RayState | None, list[Finding]]:
    """What the cluster at an address says, judged. address: as in a cluster file; None takes RAY_ADDRESS."""
    findings = [*judge_token(variables)]
    address = address or variables.get("RAY_ADDRESS") or None
    if importlib.util.find_spec("ray") is None:
        return None, [*findings, Finding(_GROUP, "cluster", "absent", "Ray is not installed", "pip install 'halfstep[ray]'")]
    if address is None:
        return None, [*findings, Finding(_GROUP, "cluster", "absent", "RAY_ADDRESS is not set: a run of kind ray starts a Ray of its own")]
    try:
        if address.startswith(("http://", "https://")):
            state, is_open = _ask_dashboard(address, _token(variables), seconds=seconds)
        else:
            state, is_open = _ask_head(address, variables, seconds=seconds)
    except (OSError, RuntimeError, ValueError, KeyError, http.client.HTTPException) as error:
        mend = "is its head running (ray status), and reachable from here? RAY_ADDRESS or cluster.address names it"
        return None, [*findings, Finding(_GROUP, "cluster", "problem", f"{address}: {error}", mend)]
    findings.append(Finding(_GROUP, "cluster", "ok", f"{address}: {state}"))
    return state, [*findings, judge_access(address, is_open=is_open)]


def judge_access(address: str, *, is_open: bool) -> Finding:
    """is_open: whether it answers without a token."""
    if not is_open:
        return Finding(_GROUP, "access", "ok", "a token is asked for")
    if is_loopback(address):
        found = "no token, on loopback: every user of this machine can run programs there as its user"
        return Finding(_GROUP, "access", "warning", found, _CLOSE)
    return Finding(_GROUP, "access", "problem", f"{address}: {_OPEN}", _CLOSE)


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address; auto is where Ray itself says, mostly one that others reach."""
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def judge_token(variables: Mapping[str, str]) -> Iterator[Finding]:
    """Where our token is and who can read it; its text is not shown."""
    if variables.get("RAY_AUTH_TOKEN"):
        mend = "put it into ~/.ray/auth_token, mode 0600, and unset the variable"
        yield Finding(_GROUP, "token", "warning", "in RAY_AUTH_TOKEN: every program and job that you start inherits it", mend)
        return
    path = _token_path(variables)
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        if is_token_mode(variables):
            found = f"RAY_AUTH_MODE=token, but no {path}"
            yield Finding(_GROUP, "token", "problem", found, "copy the cluster's token there, mode 0600")
        return
    if mode & _OTHERS_RIGHTS:
        found = f"{path} has mode {mode:04o}: others can read it"
        yield Finding(_GROUP, "token", "problem", found, f"chmod 600 {path}, then a new token (Ray writes it with your umask)")
    else:
        yield Finding(_GROUP, "token", "ok", f"in {path}, mode {mode:04o}")


def is_token_mode(variables: Mapping[str, str]) -> bool:
    """Whether Ray is told here to authenticate."""
    return variables.get("RAY_AUTH_MODE", "").lower() == "token"


def _token_path(variables: Mapping[str, str]) -> Path:
    return Path(variables.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def _token(variables: Mapping[str, str]) -> str | None:
    """The token that Ray itself would send; None where it would send none."""
    if not is_token_mode(variables):
        return None
    path = _token_path(variables)
    return variables.get("RAY_AUTH_TOKEN") or (path.read_text().strip() if path.exists() else None)


def _ask_dashboard(address: str, token: str | None, *, seconds: float) -> tuple[RayState, bool]:
    """The cluster behind a job server, and whether it answers without a token."""
    status, text = _get(address, None, seconds=seconds / 2)
    is_open = status not in _REFUSED
    if not is_open:
        if token is None:
            raise RuntimeError(_ASKS)
        status, text = _get(address, token, seconds=seconds / 2)
    if status != http.client.OK:
        raise RuntimeError("refuses our token" if status in _REFUSED else f"answers with status {status}; is this Ray's dashboard?")
    return RayState.from_nodes(text), is_open


def _get(address: str, token: str | None, *, seconds: float) -> tuple[int, str]:
    parts = urlsplit(address)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.netloc, timeout=seconds)
    try:
        connection.request(
            "GET", f"{parts.path.rstrip('/')}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"} if token else {}
        )
        answer = connection.getresponse()
        return answer.status, answer.read(_LARGEST_ANSWER_BYTES).decode(errors="replace")
    finally:
        connection.close()


def _ask_head(address: str, variables: Mapping[str, str], *, seconds: float) -> tuple[RayState, bool]:
    """The cluster of a head, by Ray's own command, and whether it answers without a token.

    Ray tries for 20 s where nothing listens: that is found out first."""
    if address not in ("auto", "local"):
        host, _, port = address.rpartition(":")
        if not port.isdecimal():
            raise ValueError("wanted auto, HOST:PORT, or http(s)://HOST:PORT")
        socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=_CONNECT_SECONDS).close()
    words = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    without = {key: value for key, value in variables.items() if not key.startswith("RAY_AUTH_")}
    with ThreadPoolExecutor() as pool:
        stranger = pool.submit(ask, words, seconds=seconds, environment={**without, "RAY_AUTH_MODE": "disabled"})
        ours = pool.submit(ask, words, seconds=seconds, environment=variables) if is_token_mode(variables) else stranger
    if stranger.exception() is None:
        return RayState.from_status(stranger.result()), True
    trouble = ours.exception()
    if trouble is None:
        return RayState.from_status(ours.result()), False
    if "AuthenticationError" not in str(trouble):
        raise trouble
    raise RuntimeError(_ASKS if ours is stranger else "refuses our token")
