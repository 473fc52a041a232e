"""Locations of shards: what is allowed, where a name leads, and that no secret is shown."""

import subprocess
import sys
from pathlib import Path

import pytest

from data_shards.remote.locations import HubFile, Location, shown

SECRET = "hf_verysecret"


@pytest.mark.parametrize(
    "text",
    [
        "shards",
        "/data/shards",
        "./a:b",
        "hf://datasets/owner/name/shards",
        "hf://datasets/owner/name@main",
        "s3://bucket/shards",
        "gs://bucket",
        "az://container/shards",
        "http://127.0.0.1:8000/shards",
        "HTTPS://host/shards?sig=1",
    ],
)
def test_every_allowed_scheme_is_parsed(text: str) -> None:
    location = Location.parse(text)
    assert location.is_remote == ("://" in text)
    assert location.scheme == text.lower().partition("://")[0] * location.is_remote


@pytest.mark.parametrize(
    "text", ["pipe:cat x", "file:///etc/passwd", "ftp://host/x", "data:v1", "simplecache::s3://b/x", "memory://x", "hf:x"]
)
def test_other_schemes_are_refused_by_name_with_the_allowed_ones(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a scheme that shards are read from; allowed are a local path, hf://, s3://") as error:
        Location.parse(text)
    assert text.partition(":")[0] + ":" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("hf://name", "wanted hf://datasets/OWNER/NAME"),
        ("hf://datasets/owner", "wanted hf://datasets/OWNER/NAME"),
        ("hf://buckets/owner/name/x", "wanted hf://datasets/OWNER/NAME"),
        ("s3://", "names no bucket"),
        ("https:///x", "names no host"),
        ("http://host:port/x", "host or port"),
        ("http://host/a b", "quote it as %20"),
        ("http://host/x\r\nAuthorization:y", "control character"),
        ("http://host/x#y", "fragment"),
        ("s3://bucket/x::pipe:ls", "chains"),
    ],
)
def test_what_is_missing_or_too_much_is_said(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Location.parse(text)


def test_a_scheme_that_is_refused_shows_nothing_of_what_follows() -> None:
    with pytest.raises(ValueError) as error:
        Location.parse(f"pipe:curl -H 'Authorization: {SECRET}' https://host")
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        ("/data/shards", "/data/shards/a.tar"),
        ("s3://bucket", "s3://bucket/a.tar"),
        ("hf://datasets/o/n@v1/x/", "hf://datasets/o/n@v1/x/a.tar"),
        ("https://host/x?sig=1/2", "https://host/x/a.tar?sig=1/2"),
        ("https://host?sig=1", "https://host/a.tar?sig=1"),
    ],
)
def test_a_file_name_is_joined_before_the_query(text: str, joined: str) -> None:
    assert Location.parse(text).join("a.tar").secret_text == joined


@pytest.mark.parametrize("name", ["", "..", "../a.tar", "/a.tar", "a/../b", "a?b", "http://host/a", "a b", "a/", ".hidden"])
@pytest.mark.parametrize("text", ["/data", "https://host/x"])
def test_a_name_that_leads_elsewhere_is_refused(text: str, name: str) -> None:
    with pytest.raises(ValueError, match="plain file name"):
        Location.parse(text).join(name)


@pytest.mark.parametrize(
    "text",
    [f"https://user:{SECRET}@host:8443/x?sig={SECRET}", f"http://{SECRET}@host:8443/x", f"s3://key:{SECRET}@host:8443/x?{SECRET}#{SECRET}"],
)
def test_no_text_of_a_location_shows_user_password_or_query(text: str) -> None:
    location = Location.parse(text)
    for words in (str(location), repr(location), f"{location}", shown(text), str([location]), location.join("a.tar").__str__()):
        assert SECRET not in words and "user" not in words
    assert str(location) == text.partition(":")[0] + "://host:8443/x"
    assert location.scheme == "s3" or SECRET not in location.identity


def test_shown_copes_with_any_text() -> None:
    assert shown("file:/etc/passwd") == "file:"
    assert shown("http://a:b@c@host/x?y") == "http://host/x"
    assert shown("/local/path") == "/local/path"


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("hf://datasets/o/n/x/a.tar", HubFile("dataset", "o/n", None, "x/a.tar")),
        ("hf://datasets/o/n@v1.0/a.tar", HubFile("dataset", "o/n", "v1.0", "a.tar")),
        ("hf://datasets/o/n@refs/pr/3/x/a.tar", HubFile("dataset", "o/n", "refs/pr/3", "x/a.tar")),
        ("hf://datasets/o/n@feature%2Fx/a.tar", HubFile("dataset", "o/n", "feature/x", "a.tar")),
        ("hf://o/n/a.tar", HubFile("model", "o/n", None, "a.tar")),
    ],
)
def test_a_hub_location_is_read_as_the_hubs_own_file_system_reads_it(text: str, file: HubFile) -> None:
    parse = pytest.importorskip("huggingface_hub.utils._hf_uris").parse_hf_uri(text)
    assert Location.parse(text).hub_file() == file
    assert (parse.type, parse.id, parse.revision, parse.path_in_repo) == (file.kind, file.repository, file.revision, file.path)


def test_a_local_path_is_a_path_and_a_remote_one_is_not() -> None:
    assert Location.parse(Path("/data")).path == Path("/data")
    with pytest.raises(ValueError, match="not a local path"):
        _ = Location.parse("s3://bucket/x").path


def test_a_login_node_needs_no_heavy_module_for_it() -> None:
    use = "Location.parse('hf://datasets/o/n/x').join('a.tar')"
    code = f"import sys; from data_shards.remote.locations import Location; {use}; print(sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in ("torch", "numpy", "PIL", "fsspec", "huggingface_hub"):
        assert f"'{name}'" not in ran.stdout
