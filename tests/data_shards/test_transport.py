"""Where a request goes and what it carries: redirects, tokens and passwords."""

import logging
from pathlib import Path

import pytest

from data_shards.remote.fetch import fetch
from data_shards.remote.locations import Location
from data_shards.remote.retry import RefusedError
from data_shards.remote.transport import redirect_target, retry_after_seconds
from tests.data_shards.store_cases import CONTENT, PATH, SHA, Slept, get, names
from tests.data_shards.store_server import Fault, StoreServer

SECRET = "hf_verysecret"
pytest_plugins = ["tests.data_shards.store_fixtures"]


def test_redirects_are_followed_five_times(store: StoreServer, tmp_path: Path, slept: Slept) -> None:
    for hop in range(6):
        store.faults[f"/{hop}"] += [Fault("redirect", to=f"/{hop + 1}", status=(301, 302, 303, 307, 308, 302)[hop])] * 2
    store.put("/5", CONTENT)
    store.faults["/5"].clear()
    fetch(Location.parse(store.url + "/0"), tmp_path / "a", size_bytes=len(CONTENT), sha256=SHA, policy=slept.policy())
    assert (tmp_path / "a").read_bytes() == CONTENT
    store.faults["/5"] += [Fault("redirect", to="/6")]
    with pytest.raises(RefusedError, match="more than 5 redirects"):
        fetch(Location.parse(store.url + "/0"), tmp_path / "b", size_bytes=len(CONTENT), sha256=SHA, policy=slept.policy())


@pytest.mark.parametrize(
    "to", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x", "gopher://127.0.0.1/x", "http://:80/x", "http://a:b/x"]
)
def test_a_redirect_leads_to_no_other_scheme(store: StoreServer, tmp_path: Path, slept: Slept, to: str) -> None:
    store.faults[PATH] += [Fault("redirect", to=to)]
    with pytest.raises(RefusedError, match=r"only http and https|address that can't be read"):
        get(store, tmp_path / "a.tar", slept.policy())
    assert names(tmp_path) == [] and len(store.asked) == 1


def test_a_redirect_does_not_leave_encryption_behind() -> None:
    location = Location.parse("https://host/a")
    with pytest.raises(RefusedError, match="from https to http://other/b, which is not encrypted"):
        redirect_target(location, "https://host/a", "http://other/b?secret")
    assert redirect_target(location, "https://host/a", "https://user:password@other/b c?d#e") == "https://other/b%20c?d"
    assert redirect_target(location, "http://host/a/x", "../b") == "http://host/b"


def test_the_token_goes_to_the_hub_and_not_to_the_host_it_redirects_to(
    store: StoreServer, tmp_path: Path, slept: Slept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("HF_ENDPOINT", store.url)
    on_hub = "/datasets/o/n/resolve/v1/x/a.tar"
    location = Location.parse("hf://datasets/o/n@v1/x").join("a.tar")
    other = StoreServer()
    other.put("/cdn", CONTENT)
    with other.running():
        store.faults[on_hub] += [Fault("redirect", to="/moved")]
        store.faults["/moved"] += [Fault("redirect", to=other.url + "/cdn?signature=x")]
        fetch(location, tmp_path / "a.tar", size_bytes=len(CONTENT), sha256=SHA, policy=slept.policy())
    assert (tmp_path / "a.tar").read_bytes() == CONTENT
    assert [asked.path for asked in store.asked] == [on_hub, "/moved"]
    assert all(asked.headers["authorization"] == f"Bearer {SECRET}" for asked in store.asked)
    assert "authorization" not in other.asked[0].headers


def test_the_hub_s_no_names_the_variable_and_not_the_token(
    store: StoreServer, tmp_path: Path, slept: Slept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("HF_ENDPOINT", store.url)
    store.faults["/datasets/o/n/resolve/main/a.tar"] += [Fault("status", status=500), Fault("status", status=401)]
    with caplog.at_level(logging.DEBUG), pytest.raises(RefusedError, match="set HF_TOKEN to a token that may read o/n") as error:
        fetch(Location.parse("hf://datasets/o/n/a.tar"), tmp_path / "a", size_bytes=1, sha256=None, policy=slept.policy())
    assert SECRET not in str(error.value) + caplog.text


def test_user_and_password_go_into_a_header_and_into_no_message(
    store: StoreServer, tmp_path: Path, slept: Slept, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = store.url.replace("//", f"//user:{SECRET}@") + PATH + f"?sig={SECRET}"
    store.faults[PATH] += [Fault("status", status=500), Fault("status", status=404)]
    with caplog.at_level(logging.DEBUG), pytest.raises(RefusedError) as error:
        fetch(Location.parse(text), tmp_path / "a", size_bytes=1, sha256=None, policy=slept.policy())
    assert store.asked[0].headers["authorization"] == "Basic dXNlcjpoZl92ZXJ5c2VjcmV0"
    assert SECRET not in str(error.value) + caplog.text
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password hf_verysecret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    get(store, tmp_path / "a.tar", slept.policy())
    assert store.asked[-1].headers["authorization"] == "Basic dXNlcjpoZl92ZXJ5c2VjcmV0"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("12", 12), (" 3 ", 3), (None, 0), ("", 0), ("-5", 0), ("soon", 0), ("9" * 40, 1e9), ("Thu, 01 Jan 1970 00:02:00 GMT", 60)],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(text: str | None, seconds: float) -> None:
    assert retry_after_seconds(text, now=60.0) == seconds
