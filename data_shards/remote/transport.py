"""One GET over HTTP(S), on the standard library: ranges, redirects within strict rules, and every answer judged."""

import netrc
import os
import re
import ssl
import time
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from typing import final
from urllib.error import URLError
from urllib.parse import quote, unquote, urljoin, urlsplit

from data_shards.remote.locations import Location, shown
from data_shards.remote.retry import RefusedError, TryAgainError

BLOCK_BYTES = 2**20
MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@final
@dataclass(frozen=True)
class Body:
    """A file's bytes from `start` on. read: the next block of at most 1 MiB, empty at the end. Raises TryAgainError.

    total_bytes: the whole file's size, None if the store does not say. etag: strong, or None.
    """

    start: int
    total_bytes: int | None
    etag: str | None
    read: Callable[[], bytes]
    close: Callable[[], None]


def open_http(location: Location, *, offset: int, etag: str | None, known_etag: str | None, stall_seconds: float) -> Body | None:
    """The file from byte `offset` on, if it still has `etag`, else from its start; None if it still is `known_etag`.

    Raises: RefusedError when asking again is no use, TryAgainError when it may be.
    """
    url, headers = _hub_request(location) if location.scheme == "hf" else _web_request(location)
    headers |= {"Accept-Encoding": "identity", "Accept": "*/*"}
    if offset and etag:
        headers |= {"Range": f"bytes={offset}-", "If-Range": etag}
    if known_etag:
        headers["If-None-Match"] = known_etag
    response = _exchange(location, url, headers, stall_seconds)
    try:
        if response.status == 304 and known_etag:
            response.close()
            return None
        return _judged(location, response, offset if etag else 0, etag)
    except BaseException:
        response.close()
        raise


def _judged(location: Location, response: HTTPResponse, offset: int, etag: str | None) -> Body:
    """The body of a final answer. Raises as `open_http` does."""
    status, headers = response.status, response.headers
    if status in _PASSING:
        raise TryAgainError(f"HTTP {status} {response.reason}", after_seconds=retry_after_seconds(headers.get("Retry-After"), time.time()))
    if status == 416:
        raise TryAgainError(f"HTTP 416: the store's file ends before byte {offset}", from_zero=True)
    if status not in (200, 206):
        raise RefusedError(f"{location}: HTTP {status} {response.reason}; {_explained(location, status)}")
    encoding = headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise TryAgainError(
            f"it came with Content-Encoding {encoding!r}, but the file's own bytes were asked for (identity)", wrong_content=True
        )
    came = headers.get("ETag", "")
    strong = came if re.fullmatch(r'"[\x21\x23-\x7e]*"', came) else None
    length = headers.get("Content-Length", "")
    size = int(length) if length.isascii() and length.isdigit() else None
    if status == 206:
        found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
        if not offset or found is None or int(found[1]) != offset:
            where = headers.get("Content-Range", "no Content-Range")
            raise TryAgainError(f"HTTP 206 with {where!r:.60}, wanted bytes from {offset} on", from_zero=True)
        if came and came != etag:
            raise TryAgainError("the file changed at the store while it was fetched (its ETag is another one)", from_zero=True)
        total = None if found[3] == "*" else int(found[3])
        return Body(offset, total, etag, _reader(response), response.close)
    return Body(0, size, strong, _reader(response), response.close)


def _reader(response: HTTPResponse) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            return response.read1(BLOCK_BYTES)  # one recv: a store that drips can't keep us here beyond the deadline
        except (OSError, HTTPException) as error:
            raise TryAgainError(f"the transfer broke: {_named(error)}") from error

    return read


def _exchange(location: Location, url: str, headers: dict[str, str], stall_seconds: float) -> HTTPResponse:
    """GET, following at most five redirects; credentials stay with the host that they were meant for."""
    for _ in range(MAX_REDIRECTS + 1):
        response = _get(location, url, headers, stall_seconds)
        if response.status not in _REDIRECTS:
            return response
        response.close()
        target = redirect_target(location, url, response.headers.get("Location", ""))
        if not _same_host(url, target):
            headers = {name: value for name, value in headers.items() if name.lower() not in ("authorization", "cookie")}
        url = target
    raise RefusedError(f"{location}: more than {MAX_REDIRECTS} redirects; mend the store, or give the address they lead to")


def redirect_target(location: Location, url: str, to: str) -> str:
    """Where a redirect from `url` leads, without user and fragment. Raises: RefusedError if it must not be followed."""
    try:
        target = quote(urljoin(url, to), safe="%/:=&?~#+!$,;'@()*[]")
        parts = urlsplit(target)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise RefusedError(f"{location}: redirected to an address that can't be read; mend the store") from None
    if parts.scheme not in ("http", "https") or not host:
        raise RefusedError(f"{location}: redirected to {shown(target)}; only http and https are followed; mend the store")
    if urlsplit(url).scheme == "https" and parts.scheme != "https":
        raise RefusedError(f"{location}: redirected from https to {shown(target)}, which is not encrypted; mend the store")
    return _without_user(target)


def _get(location: Location, url: str, headers: Mapping[str, str], stall_seconds: float) -> HTTPResponse:
    opener = urllib.request.OpenerDirector()  # bare: it has no handler for file:, ftp: or data:, and judges no answer
    opener.add_handler(urllib.request.ProxyHandler())
    opener.add_handler(urllib.request.HTTPSHandler() if url.startswith("https:") else urllib.request.HTTPHandler())
    opener.addheaders = [("User-Agent", "halfstep")]
    try:
        response = opener.open(urllib.request.Request(url, headers=dict(headers)), timeout=stall_seconds)
    except (InvalidURL, ValueError) as error:
        raise RefusedError(f"{location}: {shown(url)} is not an address that can be asked ({type(error).__name__})") from None
    except (OSError, HTTPException) as error:
        cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise RefusedError(
                f"{location}: the certificate of {shown(url)} is not trusted ({cause.verify_message}); "
                "set SSL_CERT_FILE to the certificates of your site"
            ) from error
        raise TryAgainError(f"{urlsplit(url).hostname} can't be reached: {_named(cause)}") from error
    if not isinstance(response, HTTPResponse):
        raise RefusedError(f"{location}: no answer to be had from {shown(url)}; wanted http:// or https://")
    return response


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _same_host(url: str, target: str) -> bool:
    old, new = urlsplit(url), urlsplit(target)
    ports = {"http": 80, "https": 443}
    before, after = ((parts.scheme, parts.port or ports[parts.scheme]) for parts in (old, new))
    return old.hostname == new.hostname and (before == after or (before, after) == (("http", 80), ("https", 443)))


def _without_user(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()


def _web_request(location: Location) -> tuple[str, dict[str, str]]:
    """URL and headers; user and password come from the URL or from ~/.netrc, and go into a header only."""
    parts = urlsplit(location.secret_text)
    url = _without_user(location.secret_text)
    if parts.username is not None:
        user, password = unquote(parts.username), unquote(parts.password or "")
    else:
        found = _netrc(parts.hostname or "")
        if found is None:
            return url, {}
        user, password = found
    return url, {"Authorization": "Basic " + b64encode(f"{user}:{password}".encode()).decode()}


def _netrc(host: str) -> tuple[str, str] | None:
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        found = netrc.netrc(path).hosts.get(host) if path.is_file() else None  # `default` entries would go to any host
    except (OSError, netrc.NetrcParseError) as error:
        raise RefusedError(f"{path}: can't be read as netrc ({type(error).__name__}); mend or remove it") from None
    return None if found is None else (found[0], found[2] or "")


def _hub_request(location: Location) -> tuple[str, dict[str, str]]:
    """URL and headers of a file on the Hub, or on the mirror in HF_ENDPOINT; the token is the library's to find."""
    try:
        from huggingface_hub import constants, get_token, hf_hub_url
    except ImportError:
        raise RefusedError(f"{location}: hf:// needs huggingface_hub; pip install 'halfstep[hub]'") from None
    file = location.hub_file()
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    url = hf_hub_url(file.repository, file.path, repo_type=file.kind, revision=file.revision, endpoint=endpoint)
    # Not build_hf_headers: since 2.x it asks the Hub for a list of agents before anything else, outside our limits.
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return url, {} if token is None else {"Authorization": f"Bearer {token}"}


def _explained(location: Location, status: int) -> str:
    hub = location.hub_file() if location.scheme == "hf" else None
    if status in (401, 403):
        if hub is not None:
            return (
                f"set HF_TOKEN to a token that may read {hub.repository} (or run `hf auth login`), accept its terms if it is gated, "
                "and check the name: the Hub answers the same for one that does not exist"
            )
        return (
            f"give user and password of {urlsplit(location.secret_text).hostname} in ~/.netrc, or sign the URL anew if it is a signed one"
        )
    if status in (404, 410):
        return f"there is no such file{' at revision ' + (hub.revision or 'main') if hub else ''}; check the location, or upload it"
    return "ask the store's owner, or give another location"


def retry_after_seconds(text: str | None, now: float) -> float:
    """Seconds that a Retry-After header asks to wait, in whole seconds or as a date; 0 if it says neither. now: seconds since 1970."""
    text = (text or "").strip()
    if text.isascii() and text.isdigit():
        return float(min(int(text[:12]), 10**9))
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except (TypeError, ValueError, OverflowError):
        return 0.0
