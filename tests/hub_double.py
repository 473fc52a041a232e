"""A stand-in for the Hugging Face Hub on loopback, for the real clients: `HF_ENDPOINT=http://127.0.0.1:PORT`.

It serves DIR/datasets/OWNER/NAME and DIR/models/OWNER/NAME, each folder being the head of `main`; every state that was asked for
stays readable under its commit sha. In tests: `with HubDouble(DIR) as hub: subprocess.run(..., env=hub.environment(HOME))`; as a
process: `python tests/hub_double.py DIR --port 0`, whose first line of output is the URL.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.message import Message
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, final
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".tar", ".parquet", ".arrow", ".safetensors", ".bin", ".zip", ".npy")  # as in the Hub's own .gitattributes
LFS_BYTES = 10 * 2**20
DATE = "2026-01-01T00:00:00.000Z"
Redirects = Literal["none", "relative", "absolute", "other_origin"]


@final
@dataclass(frozen=True)
class Blob:
    """One file of a commit; lfs: whether the Hub would keep it in LFS."""

    sha1: str
    sha256: str
    size: int
    lfs: bool

    @property
    def etag(self) -> str:
        """What names its content for the clients."""
        return self.sha256 if self.lfs else self.sha1


@final
@dataclass(frozen=True)
class LoggedRequest:
    """A request as it came in; path with its query; headers with lower-case names."""

    method: str
    path: str
    headers: Mapping[str, str]

    @property
    def authorized(self) -> bool:
        """Whether a token was sent along, right or wrong."""
        return "authorization" in self.headers


class AnswerError(Exception):
    """An answer that is an error; code and message as the Hub puts them into its headers."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.commit = status, code, commit


@final
class HubDouble:
    """The server, and what it is told to do; every attribute may be changed while it runs.

    token: the one valid token, of user `user`; with one, writing and the repositories in `private` need it, and `gated` ones let
    nobody download. Without one, everybody may do everything. redirects: how LFS files are answered: at once, or by a 302 to
    /cdn/... (other_origin: on another host name, as the real CDN). unplugged: closes every connection without an answer.
    intercept: called with method and path; a status that it returns is answered instead, 0 closes the connection.
    """

    def __init__(self, root: str | Path, *, port: int = 0, token: str | None = None, user: str = "tester", log: Path | None = None) -> None:
        self.root = Path(root)
        self.token, self.user, self.log = token, user, log
        self.redirects: Redirects = "other_origin"
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.unplugged = False
        self.page_entries = 1000
        self.intercept: Callable[[str, str], int | None] = lambda _method, _path: None
        self.requests: list[LoggedRequest] = []
        self.lock = threading.RLock()
        self.commits: dict[str, dict[str, dict[str, Blob]]] = {}  # repository -> commit sha -> path -> blob
        self.tags: dict[str, dict[str, str]] = {}
        self._known: dict[tuple[str, int, int, int], Blob] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, self))
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> "HubDouble":
        """Starts answering."""
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """Stops, and frees the port."""
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: str | Path, *, token: str | None = None, offline: bool = False) -> dict[str, str]:
        """The environment in which a client process talks to this double alone, and keeps its caches below `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        wanted = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # Xet's store is not imitated; LFS is
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return kept | wanted | ({"HF_TOKEN": token} if token else {}) | ({"HF_HUB_OFFLINE": "1"} if offline else {})

    def folder(self, repository: str) -> Path:
        """Where datasets/OWNER/NAME or models/OWNER/NAME lies."""
        return self.root / repository

    def head(self, repository: str) -> str:
        """The commit sha of `main`: a function of the files' names and content."""
        with self.lock:
            blobs: dict[str, Blob] = {}
            for path in sorted(self.folder(repository).rglob("*")):
                if path.is_file() and ".git" not in path.parts:
                    blobs[path.relative_to(self.folder(repository)).as_posix()] = self._blob(path)
            text = "".join(f"{name}\0{blob.sha1}\n" for name, blob in sorted(blobs.items()))
            sha = hashlib.sha1(f"{repository}\n{text}".encode()).hexdigest()
            self.commits.setdefault(repository, {})[sha] = dict(sorted(blobs.items()))
            return sha

    def tag(self, repository: str, name: str) -> str:
        """Names the head of `main`, for good."""
        sha = self.tags.setdefault(repository, {})[name] = self.head(repository)
        return sha

    def object_path(self, sha256: str) -> Path:
        """Where a content is kept."""
        return self.root / ".objects" / sha256

    def store(self, content: bytes) -> str:
        """Keeps a content and returns its sha256."""
        sha256 = hashlib.sha256(content).hexdigest()
        path = self.object_path(sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{sha256}.{threading.get_ident()}")
        temporary.write_bytes(content)
        os.replace(temporary, path)
        return sha256

    def paths(self) -> list[str]:
        """What was asked for so far, as `METHOD PATH`."""
        with self.lock:
            return [f"{request.method} {request.path}" for request in self.requests]

    def _blob(self, path: Path) -> Blob:
        """A file's hashes, and a copy of it that outlives its next version; hashed once as long as it does not change."""
        stat = path.stat()
        key = (str(path), stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if key not in self._known:
            content = path.read_bytes()
            lfs = path.suffix in LFS_SUFFIXES or len(content) > LFS_BYTES
            sha256 = self.store(content)
            git = _pointer(sha256, len(content)) if lfs else content
            self._known[key] = Blob(hashlib.sha1(b"blob %d\0" % len(git) + git).hexdigest(), sha256, len(content), lfs)
        return self._known[key]


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _card(readme: bytes) -> dict[str, object]:
    """The YAML header of a README.md."""
    found = re.match(r"---\r?\n(.*?)\r?\n---", readme.decode("utf-8", "replace"), re.DOTALL)
    content = yaml.safe_load(found[1]) if found else None
    return content if isinstance(content, dict) else {}


def _tags(card: Mapping[str, object]) -> list[str]:
    """The tags that the Hub makes of a card."""
    tags: list[str] = []
    for field in ("license", "language", "task_categories", "size_categories", "tags"):
        value = card.get(field)
        values = [str(one) for one in value] if isinstance(value, list) else [str(value)] if value else []
        tags += values if field == "tags" else [f"{field}:{one}" for one in values]
    return tags


@final
class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: 40 ms each time otherwise

    def __init__(self, hub: HubDouble, *connection: object) -> None:
        self.hub = hub
        super().__init__(*connection)  # type: ignore[arg-type]

    headers: Message  # type: ignore[assignment]

    def log_message(self, format: str, *args: object) -> None:
        return

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        hub, headers = self.hub, {name.lower(): value for name, value in self.headers.items()}
        body = self._body()
        request = LoggedRequest(self.command, self.path, headers)
        with hub.lock:
            hub.requests.append(request)
            if hub.log is not None:
                with hub.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"method": request.method, "path": request.path, "authorized": request.authorized}) + "\n")
        if hub.unplugged:
            self.close_connection = True
            return
        try:
            instead = hub.intercept(self.command, self.path)
            if instead == 0:
                self.close_connection = True
                return
            if instead is not None:
                raise AnswerError(instead, "as the test wants it")
            self._answer(body)
        except AnswerError as error:
            extra = {"X-Error-Code": error.code, "X-Error-Message": str(error), "X-Repo-Commit": error.commit}
            self._json({"error": str(error)}, error.status, {name: value for name, value in extra.items() if value})

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts: list[bytes] = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, body: bytes) -> None:
        """Finds the route: path parts are split before they are unquoted, because revisions and paths hold quoted slashes."""
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        match parts:
            case ["api", "whoami-v2"]:
                self._whoami()
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", ("datasets" | "models") as kind, owner, name, *rest]:
                self._api(f"{kind}/{owner}/{name}", rest, query, body)
            case ["lfs", sha256] if self.command == "PUT":
                if hashlib.sha256(body).hexdigest() != sha256:
                    raise AnswerError(400, "the content is not of that sha256")
                self.hub.store(body)
                self._send(b"", 200, {})
            case ["cdn", kind, owner, name, sha, *path]:
                self._file(f"{kind}/{owner}/{name}", sha, "/".join(path))
            case ["datasets", owner, name, "resolve", revision, *path]:
                self._resolve(f"datasets/{owner}/{name}", revision, "/".join(path))
            case [owner, name, "resolve", revision, *path]:
                self._resolve(f"models/{owner}/{name}", revision, "/".join(path))
            case ["datasets", owner, name, "info", "lfs", "objects", "batch"]:
                self._lfs_batch(f"datasets/{owner}/{name.removesuffix('.git')}", json.loads(body))
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self._lfs_batch(f"models/{owner}/{name.removesuffix('.git')}", json.loads(body))
            case _:
                raise AnswerError(404, f"no such route: {self.command} {self.path}")

    def _is_user(self) -> bool:
        """Whether the one who asks is known. Raises: AnswerError if the token is wrong."""
        sent = self.headers.get("Authorization")
        if self.hub.token is not None and sent is not None and sent != f"Bearer {self.hub.token}":
            raise AnswerError(401, "Invalid credentials in Authorization header")
        return sent is not None

    def _check(self, repository: str, *, write: bool = False, download: bool = False) -> None:
        """Raises what the Hub answers to one who may not; it does not tell a private repository from none at all."""
        hub, user = self.hub, self._is_user()
        if not hub.folder(repository).is_dir():
            raise AnswerError(404, "Repository not found", "RepoNotFound") if user else AnswerError(401, "Invalid username or password.")
        if hub.token is not None and not user and (write or repository in hub.private):
            raise AnswerError(401, "Invalid username or password.")
        if download and repository in hub.gated:
            raise AnswerError(403 if user else 401, f"Access to {repository} is restricted.", "GatedRepo")

    def _commit(self, repository: str, revision: str) -> tuple[str, dict[str, Blob]]:
        """The commit sha and the files of a revision."""
        head = self.hub.head(repository)
        sha = head if revision in ("main", "refs/heads/main") else self.hub.tags.get(repository, {}).get(revision, revision)
        files = self.hub.commits[repository].get(sha)
        if files is None:
            raise AnswerError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, files

    def _whoami(self) -> None:
        if not self._is_user():
            raise AnswerError(401, "Invalid username or password.")
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self._json({"type": "user", "name": self.hub.user, "fullname": self.hub.user, "orgs": [], "auth": access})

    def _create(self, wanted: Mapping[str, str]) -> None:
        hub = self.hub
        if not self._is_user():
            raise AnswerError(401, "Invalid username or password.")
        kind = wanted.get("type") or "model"
        repository = f"{kind}s/{wanted.get('organization') or hub.user}/{wanted['name']}"
        url = f"{hub.url}/{repository.removeprefix('models/')}"
        if hub.folder(repository).exists():
            self._json({"error": "You already created this repo", "url": url}, 409)
            return
        hub.folder(repository).mkdir(parents=True)
        (hub.folder(repository) / ".gitattributes").write_text("*.tar filter=lfs diff=lfs merge=lfs -text\n")
        if wanted.get("visibility") == "private":
            hub.private.add(repository)
        self._json({"url": url, "name": repository.partition("/")[2]})

    def _api(self, repository: str, rest: list[str], query: Mapping[str, str], body: bytes) -> None:
        """The routes below /api/datasets/OWNER/NAME."""
        post = self.command == "POST"
        self._check(repository, write=post and rest[0] in ("commit", "preupload"))
        match rest:
            case []:
                self._info(repository, "main", query)
            case ["revision", revision]:
                self._info(repository, revision, query)
            case ["auth-check", *_]:
                self._check(repository, download=True)
                self._json({})
            case ["refs"]:
                tags = [_ref("tags", name, sha) for name, sha in self.hub.tags.get(repository, {}).items()]
                head = _ref("heads", "main", self.hub.head(repository))
                self._json({"branches": [head], "converts": [], "tags": tags, "pullRequests": []})
            case ["commits", revision]:
                sha, _ = self._commit(repository, revision)
                self._json([{"id": sha, "title": "state", "message": "", "date": DATE, "authors": [{"user": self.hub.user}]}])
            case ["tree", revision, *path]:
                self._tree(repository, revision, "/".join(path), query)
            case ["paths-info", revision] if post:
                sent = json.loads(body) if "json" in self.headers.get("Content-Type", "") else parse_qs(body.decode())
                files = self._commit(repository, revision)[1]
                entries = {entry["path"]: entry for entry in _entries(files, "", recursive=True)}
                self._json([entries[path.strip("/")] for path in sent.get("paths", []) if path.strip("/") in entries])
            case ["preupload", revision] if post:
                self._preupload(repository, revision, json.loads(body))
            case ["commit", "main"] if post and "create_pr" not in query:
                self._apply(repository, [json.loads(line) for line in body.splitlines() if line.strip()])
            case _:
                raise AnswerError(404, f"no such route: {self.command} {self.path}")

    def _info(self, repository: str, revision: str, query: Mapping[str, str]) -> None:
        sha, files = self._commit(repository, revision)
        readme = files.get("README.md")
        card = _card(self.hub.object_path(readme.sha256).read_bytes()) if readme else {}
        siblings: list[dict[str, object]] = []
        for name, blob in files.items():
            sibling: dict[str, object] = {"rfilename": name}
            if query.get("blobs", "").lower() in ("true", "1"):
                sibling |= {"size": blob.size, "blobId": blob.sha1}
                sibling |= {"lfs": {"size": blob.size, "sha256": blob.sha256, "pointerSize": 134}} if blob.lfs else {}
            siblings.append(sibling)
        owner_and_name = repository.partition("/")[2]
        info: dict[str, object] = {
            "_id": sha[:24],
            "id": owner_and_name,
            "author": owner_and_name.partition("/")[0],
            "sha": sha,
            "lastModified": DATE,
            "createdAt": DATE,
            "private": repository in self.hub.private,
            "gated": "manual" if repository in self.hub.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": _tags(card),
            "cardData": card,
            "siblings": siblings,
        }
        self._json(info)

    def _tree(self, repository: str, revision: str, path: str, query: Mapping[str, str]) -> None:
        sha, files = self._commit(repository, revision)
        entries = list(_entries(files, path.strip("/"), recursive=query.get("recursive", "").lower() in ("true", "1")))
        if not entries and path.strip("/"):
            raise AnswerError(404, f"{path} does not exist on {revision}", "EntryNotFound", sha)
        first = int(query.get("cursor", "0"))
        rest = "&".join(f"{name}={quote(value)}" for name, value in query.items() if name != "cursor")
        after = first + self.hub.page_entries
        link = f'<{self.hub.url}{urlsplit(self.path).path}?{rest}&cursor={after}>; rel="next"'
        self._json(entries[first:after], headers={"Link": link} if after < len(entries) else {})

    def _resolve(self, repository: str, revision: str, path: str) -> None:
        hub = self.hub
        self._check(repository, download=True)
        sha, files = self._commit(repository, revision)
        blob = files.get(path)
        if blob is None:
            raise AnswerError(404, "Entry not found", "EntryNotFound", sha)
        if not blob.lfs or hub.redirects == "none":
            self._file(repository, sha, path)
            return
        host = {"relative": "", "absolute": hub.url, "other_origin": f"http://localhost:{hub.port}"}[hub.redirects]
        linked = {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.etag}"', "ETag": f'"{blob.sha1}"', "X-Repo-Commit": sha}
        self._send(b"Found", 302, {"Location": f"{host}/cdn/{repository}/{sha}/{quote(path)}", **linked})

    def _file(self, repository: str, sha: str, path: str) -> None:
        """The bytes of a file, or the range of them that is asked for."""
        blob = self.hub.commits.get(repository, {}).get(sha, {}).get(path)
        if blob is None:
            raise AnswerError(404, "Entry not found", "EntryNotFound", sha)
        headers = {
            "ETag": f'"{blob.etag}"',
            "X-Repo-Commit": sha,
            "X-Linked-Size": str(blob.size),
            "X-Linked-Etag": f'"{blob.etag}"',
            "Accept-Ranges": "bytes",
            "Content-Disposition": f'inline; filename="{path.rpartition("/")[2]}"',
        }
        content = self.hub.object_path(blob.sha256).read_bytes()
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or wanted[0] == "bytes=-":
            self._send(content, 200, headers)
            return
        first = int(wanted[1]) if wanted[1] else max(0, len(content) - int(wanted[2]))
        last = min(int(wanted[2]), len(content) - 1) if wanted[1] and wanted[2] else len(content) - 1
        if first >= len(content) or last < first:
            self._send(b"", 416, {**headers, "Content-Range": f"bytes */{len(content)}"})
            return
        self._send(content[first : last + 1], 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"})

    def _preupload(self, repository: str, revision: str, wanted: Mapping[str, list[dict[str, object]]]) -> None:
        files, answers = self._commit(repository, revision)[1], []
        for file in wanted["files"]:
            path, size = str(file["path"]), file["size"]
            lfs = path.endswith(LFS_SUFFIXES) or (isinstance(size, int) and size > LFS_BYTES)
            oid = {"oid": files[path].etag} if path in files else {}
            answers.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **oid})
        self._json({"files": answers})

    def _lfs_batch(self, repository: str, wanted: Mapping[str, list[dict[str, object]]]) -> None:
        self._check(repository, write=True)
        objects: list[dict[str, object]] = []
        for one in wanted["objects"]:
            there = self.hub.object_path(str(one["oid"])).exists()
            objects.append({**one} if there else {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}})
        self._json({"transfer": "basic", "objects": objects})

    def _apply(self, repository: str, lines: list[dict[str, dict[str, str]]]) -> None:
        """A commit: all of it, or nothing if a part of it was not uploaded or `main` has moved."""
        hub, folder = self.hub, self.hub.folder(repository)
        with hub.lock:
            parent = lines[0]["value"].get("parentCommit")
            if parent is not None and not hub.head(repository).startswith(parent):
                raise AnswerError(412, "A commit has happened since. Please refresh and try again.")
            for line in lines[1:]:
                if line["key"] == "lfsFile" and not hub.object_path(line["value"]["oid"]).exists():
                    raise AnswerError(400, f"{line['value']['path']}: its content was not uploaded")
            for line in lines[1:]:
                value, path = line["value"], folder / line["value"]["path"]
                match line["key"]:
                    case "file":
                        _replace(path, base64.b64decode(value["content"]))
                    case "lfsFile":
                        _replace(path, hub.object_path(value["oid"]).read_bytes())
                    case "deletedFile":
                        path.unlink()
                    case _:
                        shutil.rmtree(path)
            sha = hub.head(repository)
        url = f"{hub.url}/{repository.removeprefix('models/')}/commit/{sha}"
        self._json({"success": True, "commitUrl": url, "commitOid": sha, "hookOutput": ""})

    def _json(self, content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/octet-stream", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a new file: the old one's hashes are known by its inode
    path.write_bytes(content)


def _ref(kind: str, name: str, sha: str) -> dict[str, str]:
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha}


def _entries(files: Mapping[str, Blob], folder: str, *, recursive: bool) -> Iterator[dict[str, object]]:
    """Files and folders below a folder as tree and paths-info tell them; folders before what they hold."""
    prefix, told = f"{folder}/" if folder else "", set[str]()
    last = {"lastCommit": {"id": "0" * 40, "title": "state", "date": DATE}}
    for path, blob in files.items():
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            directory = prefix + "/".join(parts[:depth])
            if directory not in told:
                told.add(directory)
                yield {"type": "directory", "path": directory, "oid": hashlib.sha1(directory.encode()).hexdigest(), "size": 0, **last}
        if recursive or len(parts) == 1:
            lfs = {"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}} if blob.lfs else {}
            yield {"type": "file", "path": path, "oid": blob.sha1, "size": blob.size, **lfs, **last}


def main() -> None:
    """Serves until it is killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="holds datasets/OWNER/NAME and models/OWNER/NAME")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--token", help="the one valid token; without it everybody may do everything")
    parser.add_argument("--private", action="append", default=[], metavar="datasets/OWNER/NAME")
    parser.add_argument("--log", type=Path, help="a JSON line a request goes there")
    given = parser.parse_args()
    with HubDouble(given.root, port=given.port, token=given.token, log=given.log) as hub:
        hub.private |= set(given.private)
        sys.stdout.write(f"{hub.url}\n")
        sys.stdout.flush()
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
