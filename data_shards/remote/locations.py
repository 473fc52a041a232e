"""Where shards may lie: a local path, the Hub, an object store or a web server; nothing else, and no secret is shown."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import final
from urllib.parse import unquote, urlsplit

REMOTE_SCHEMES = ("hf", "s3", "gs", "az", "http", "https")
_ALLOWED = "a local path, " + ", ".join(f"{scheme}://" for scheme in REMOTE_SCHEMES)
# fsspec and webdataset also know schemes without slashes, such as `pipe:`
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
# A revision of several parts is one of Git's own refs, or has its slashes quoted: as HfFileSystem reads it.
_HUB = re.compile(
    r"(?:(datasets|models|spaces)/)?(?!(?:datasets|models|spaces|buckets|kernels)/)([\w.-]+/[\w.-]+)(?:@(refs/(?:pr/\d+|convert/[^/]+)|[^/@]+))?(?:/(.*))?"
)


@final
@dataclass(frozen=True)
class HubFile:
    """A file or folder of a Hub repository; kind as the Hub spells it: dataset, model or space."""

    kind: str
    repository: str
    revision: str | None
    path: str


@final
@dataclass(frozen=True, repr=False)
class Location:
    """A folder or file of shards. As text (`str`, `repr`, f-strings) it shows neither user nor password nor query.

    scheme: one of REMOTE_SCHEMES, or "" for a local path. secret_text: all of it, for the one who connects.
    """

    scheme: str
    secret_text: str

    @classmethod
    def parse(cls, text: str | Path) -> "Location":
        """A location as a user writes it.

        Raises: ValueError naming the scheme if it is none of ours, or what is missing in the rest.
        """
        text = str(text)
        found = _SCHEME.match(text)
        if found is None:
            if not text:
                raise ValueError(f"a location of shards is empty; allowed are {_ALLOWED}")
            return cls("", text)
        scheme, rest = found[1].lower(), text[found.end() :]
        if scheme not in REMOTE_SCHEMES or not rest.startswith("//"):
            raise ValueError(
                f"{found[1]}: is not a scheme that shards are read from; allowed are {_ALLOWED} (a local path: ./{found[1]}:...)"
            )
        location = cls(scheme, f"{scheme}:{rest}")
        problem = location._problem()
        if problem is not None:
            raise ValueError(f"{location}: {problem}")
        return location

    def _problem(self) -> str | None:
        text = self.secret_text
        if any(character <= " " or character == "\x7f" for character in text):
            return "holds a space or a control character; quote it as %20 and so on"
        if self.scheme == "hf":
            return None if _HUB.fullmatch(text[5:]) else "wanted hf://datasets/OWNER/NAME[@REVISION]/PATH"
        if "::" in text and self.scheme not in ("http", "https"):
            return f"chains file systems with `::`; wanted one location, such as {self.scheme}://BUCKET/PATH"
        try:
            parts = urlsplit(text)
            host, _ = parts.hostname, parts.port
        except ValueError:
            return "its host or port can't be read"
        if not host:
            return f"names no {'host' if self.scheme in ('http', 'https') else 'bucket'}"
        if parts.fragment and self.scheme in ("http", "https"):
            return "has a fragment (#...), which a server never sees; remove it"
        return None

    @property
    def is_remote(self) -> bool:
        """Whether its files have to be fetched."""
        return bool(self.scheme)

    @property
    def path(self) -> Path:
        """The local path. Raises: ValueError if it is remote."""
        if self.is_remote:
            raise ValueError(f"{self}: is not a local path; fetch it first")
        return Path(self.secret_text)

    @property
    def identity(self) -> str:
        """What stays equal when a URL is signed anew; no secrets."""
        return str(self) if self.scheme in ("http", "https") else self.secret_text.partition("?")[0]

    def join(self, name: str) -> "Location":
        """The file of this name in this folder; a query (a signature) stays with it.

        Raises: ValueError if the name would lead anywhere else.
        """
        if not _NAME.fullmatch(name) or ".." in name.split("/"):
            raise ValueError(f"{self}: {name!r} is not a plain file name below it; wanted letters, digits, '.', '_' and '-'")
        if not self.is_remote:
            return Location("", str(Path(self.secret_text) / name))
        base, mark, query = self.secret_text.partition("?")
        return Location(self.scheme, f"{base.rstrip('/')}/{name}{mark}{query}")

    def hub_file(self) -> HubFile:
        """The parts of an hf:// location. Raises: ValueError if it is of another scheme."""
        found = _HUB.fullmatch(self.secret_text[5:]) if self.scheme == "hf" else None
        if found is None:
            raise ValueError(f"{self}: is not hf://datasets/OWNER/NAME[@REVISION]/PATH")
        kind, repository, revision, path = found.groups()
        return HubFile((kind or "models")[:-1], repository, unquote(revision) if revision else None, path or "")

    def __str__(self) -> str:
        """The location without user, password and query."""
        return shown(self.secret_text) if self.is_remote else self.secret_text

    def __repr__(self) -> str:
        """As `str`, with the type."""
        return f"Location({str(self)!r})"


def shown(url: str) -> str:
    """A URL for people: without user, password, query and fragment."""
    scheme, colon, rest = url.partition("://")
    if not colon:
        return url.partition("?")[0].partition(":")[0] + ":" if _SCHEME.match(url) else url.partition("?")[0]
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
