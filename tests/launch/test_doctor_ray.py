"""Whether a Ray cluster answers, and who else could use it; the texts are a Ray 2.60's own."""

import http.server
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.doctor_ray import RayState, is_loopback, judge_access, judge_token, probe
from launch.findings import Finding

CAPTURED = Path(__file__).with_name("captured")
NODES = (CAPTURED / "ray_2_60_nodes.json").read_text()
STATUS = (CAPTURED / "ray_2_60_status.txt").read_text()
SECRET = "do-not-show-this-token"


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "auth_token"
    path.write_text(f"{SECRET}\n")
    path.chmod(0o600)
    return path


@contextmanager
def _dashboard(*, token: str | None, status: int = 200) -> Iterator[str]:
    """A job server that wants a token, or none."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = token is None or self.headers.get("Authorization") == f"Bearer {token}"
            self.send_response((status if self.path == "/nodes?view=summary" else 404) if allowed else 401)
            self.end_headers()
            if allowed:
                self.wfile.write(NODES.encode())

        def log_message(self, format: str, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_both_texts_say_the_same_of_one_cluster() -> None:
    assert str(RayState.from_nodes(NODES)) == "1 node, 2 CPU"
    assert RayState.from_status(STATUS) == RayState(1, {"CPU": 2.0})


def test_gpus_and_a_sites_own_resources_are_counted() -> None:
    text = STATUS.replace(" 0.0/2.0 CPU\n", " 1.0/96.0 CPU\n 0.0/8.0 GPU\n 0.0/1.0 accelerator_type:A100\n")
    text = text.replace("Active:\n 1 node_", "Active:\n 3 worker_a100\n 1 node_")
    assert str(RayState.from_status(text)) == "4 nodes, 96 CPU, 8 GPU, 1 accelerator_type:A100"


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.5:6379", True),
        ("http://localhost:8265", True),
        ("http://[::1]:8265", True),
        ("https://ray.example.org", False),
        ("10.0.0.1:6379", False),
        ("127.example.org:6379", False),
        ("auto", False),
    ],
)
def test_loopback_is_known_by_its_address(address: str, loopback: bool) -> None:
    assert is_loopback(address) == loopback


@pytest.mark.parametrize(
    ("address", "is_open", "status"),
    [
        ("http://10.0.0.1:8265", True, "problem"),
        ("10.0.0.1:6379", True, "problem"),
        ("http://127.0.0.1:8265", True, "warning"),
        ("http://10.0.0.1:8265", False, "ok"),
    ],
)
def test_a_cluster_that_others_reach_without_a_token_is_a_problem(address: str, is_open: bool, status: str) -> None:
    finding = judge_access(address, is_open=is_open)
    assert finding.status == status
    assert ("RAY_AUTH_MODE=token" in finding.mend) == is_open


@pytest.mark.parametrize(("mode", "status"), [(0o600, "ok"), (0o400, "ok"), (0o644, "problem"), (0o640, "problem"), (0o602, "problem")])
def test_a_token_that_others_can_read_is_a_problem(mode: int, status: str, token: Path) -> None:
    token.chmod(mode)
    [finding] = judge_token({"RAY_AUTH_TOKEN_PATH": str(token)})
    assert (finding.status, f"mode {mode:04o}" in finding.found) == (status, True)
    assert finding.mend.startswith(f"chmod 600 {token}") == (status == "problem")


def test_a_token_in_the_environment_or_nowhere_is_said(tmp_path: Path) -> None:
    nowhere = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    assert list(judge_token(nowhere)) == []
    assert [finding.status for finding in judge_token({**nowhere, "RAY_AUTH_MODE": "token"})] == ["problem"]
    [finding] = judge_token({**nowhere, "RAY_AUTH_TOKEN": SECRET})
    assert finding.status == "warning" and SECRET not in str(finding)


def test_a_job_server_without_a_token_is_described_and_warned_of(tmp_path: Path) -> None:
    with _dashboard(token=None) as address:
        state, findings = probe(address, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}, seconds=4)
    assert state == RayState(1, {"CPU": 2.0})
    found = by_name(findings)
    assert (found["cluster"].status, found["cluster"].found) == ("ok", f"{address}: 1 node, 2 CPU")
    assert found["access"].status == "warning"


def test_our_token_opens_a_job_server_and_is_not_shown(token: Path) -> None:
    variables = {"RAY_AUTH_TOKEN_PATH": str(token), "RAY_AUTH_MODE": "token"}
    with _dashboard(token=SECRET) as address:
        state, findings = probe(None, {**variables, "RAY_ADDRESS": address}, seconds=4)
    assert state is not None and {finding.status for finding in findings} == {"ok"}
    assert SECRET not in str(findings)


@pytest.mark.parametrize(
    ("mode", "says"), [("", "asks for a token; set RAY_AUTH_MODE=token and put the cluster's into"), ("token", "refuses our token")]
)
def test_a_job_server_that_refuses_us_says_what_to_set(mode: str, says: str, token: Path) -> None:
    with _dashboard(token="another") as address:
        state, findings = probe(address, {"RAY_AUTH_TOKEN_PATH": str(token), "RAY_AUTH_MODE": mode}, seconds=4)
    finding = by_name(findings)["cluster"]
    assert state is None and finding.status == "problem" and says in finding.found
    assert SECRET not in str(findings)


def _ray_status(folder: Path, monkeypatch: pytest.MonkeyPatch, *, wants: str | None) -> None:
    """A stand-in for `ray status`, of a head that wants a token, or none."""
    program = folder / "python"
    refuses = f'"$RAY_AUTH_MODE $(cat "$RAY_AUTH_TOKEN_PATH" 2>&1)" != "token {wants}"' if wants else "1 = 2"
    error = "ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: Authentication token is missing or incorrect. Note: ..."
    program.write_text(f"#!/bin/sh\nif [ {refuses} ]; then echo '{error}' >&2; exit 1; fi\ncat {CAPTURED}/ray_2_60_status.txt\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


@pytest.mark.parametrize(
    ("wants", "mode", "status", "says"),
    [
        (None, "", "warning", "no token, on loopback"),
        (None, "token", "warning", "no token, on loopback"),
        (SECRET, "token", "ok", "a token is asked for"),
        (SECRET, "", "problem", "asks for a token; set RAY_AUTH_MODE=token"),
        ("another", "token", "problem", "refuses our token"),
    ],
)
def test_whether_a_head_wants_a_token_is_tried(
    wants: str | None, mode: str, status: str, says: str, token: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ray_status(tmp_path, monkeypatch, wants=wants)
    variables = {"PATH": os.environ["PATH"], "RAY_AUTH_TOKEN_PATH": str(token), "RAY_AUTH_MODE": mode}
    with socket.create_server(("127.0.0.1", 0)) as head:
        state, findings = probe(f"127.0.0.1:{head.getsockname()[1]}", variables, seconds=4)
    finding = findings[-1]
    assert finding.status == status and says in finding.found and (state is None) == (status == "problem")
    assert SECRET not in str(findings)


def test_what_is_no_dashboard_is_said() -> None:
    with _dashboard(token=None, status=404) as address:
        assert "is this Ray's dashboard?" in by_name(probe(address, {}, seconds=4)[1])["cluster"].found


@pytest.mark.parametrize("address", ["http://127.0.0.1:{port}", "127.0.0.1:{port}", "127.0.0.1", "nonsense", "http://"])
def test_a_dead_address_is_a_problem_at_once(address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    began = time.monotonic()
    state, findings = probe(address.format(port=port), {}, seconds=4)
    assert state is None and time.monotonic() - began < 2
    assert by_name(findings)["cluster"].status == "problem"


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_an_address_that_takes_connections_and_never_answers_is_not_waited_for(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        state, findings = probe(f"{scheme}127.0.0.1:{silent.getsockname()[1]}", {}, seconds=1)
    assert state is None and time.monotonic() - began < 4
    assert by_name(findings)["cluster"].status == "problem"


def test_without_an_address_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere")
    state, findings = probe(None, {"RAY_AUTH_TOKEN_PATH": "/nowhere"}, seconds=4)
    assert state is None and [(finding.name, finding.status) for finding in findings] == [("cluster", "absent")]
