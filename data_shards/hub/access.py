"""What halfstep needs of the Hugging Face Hub whatever it does there: the client, its errors in our words, and commits for names.

Nothing here sees a token: the client finds it in HF_TOKEN or where `hf auth login` left it, and no error of ours repeats a URL.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from data_shards.remote.locations import HubFile, Location

if TYPE_CHECKING:
    from huggingface_hub import HfApi

COMMIT = re.compile(r"[0-9a-f]{40}")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
TIMEOUT_SECONDS = 30.0  # for one answer of the Hub's own pages; files have the client's own limits
_INSTALL = "pip install 'halfstep[hub]'"
_TOKEN = "set HF_TOKEN to a token that may read it (or run `hf auth login`)"


def hub_api() -> HfApi:
    """The Hub's client. Raises: RuntimeError naming the extra if it is not installed."""
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise RuntimeError(f"the Hugging Face Hub needs huggingface_hub, which is not installed: {_INSTALL}") from None
    return HfApi(library_name="halfstep")


def need_datasets() -> None:
    """Raises: RuntimeError naming the extra if `datasets` is not installed."""
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise RuntimeError(f"data sets of the Hugging Face Hub need the datasets library, which is not installed: {_INSTALL}") from None


def checked_repository(name: str) -> str:
    """The name itself. Raises: ValueError if it is not NAME or OWNER/NAME."""
    name = name.removeprefix("hf://").removeprefix("datasets/")
    if not REPOSITORY.fullmatch(name) or ".." in name or "--" in name:
        raise ValueError(f"{name!r} is not the name of a repository on the Hugging Face Hub; wanted OWNER/NAME, such as huggan/smithsonian")
    return name


def commit_sha(repo: str, revision: str | None, *, kind: str = "dataset") -> str:
    """The commit that a branch, tag or short commit names now; kind: dataset, model or space.

    Raises: ValueError if there is no such repository or revision, or it may not be read; ConnectionError if the Hub can't be reached.
    """
    with hub_errors(repo, kind=kind, revision=revision):
        found = hub_api().repo_info(repo, repo_type=kind, revision=revision, timeout=TIMEOUT_SECONDS)
        if kind == "dataset" and getattr(found, "gated", None):
            hub_api().auth_check(repo, repo_type=kind)
    sha = found.sha
    if sha is None or not COMMIT.fullmatch(sha):
        raise ValueError(f"{repo}: the Hub named no commit for revision {revision or 'main'}; give the commit itself as the revision")
    return sha


def resolve_hub_location(location: str) -> str:
    """An hf:// location with the commit that its revision (main, if it names none) is now, so that it means the same for good.

    A location that names a commit comes back as it is, and nobody is asked. Raises: as commit_sha; ValueError for other schemes.
    """
    file = Location.parse(location).hub_file()
    if file.revision is not None and COMMIT.fullmatch(file.revision):
        return location
    pinned = replace(file, revision=commit_sha(file.repository, file.revision, kind=file.kind))
    return _location(pinned)


def _location(file: HubFile) -> str:
    return f"hf://{file.kind}s/{file.repository}@{file.revision}" + (f"/{file.path}" if file.path else "")


@contextmanager
def hub_errors(repo: str, *, kind: str = "dataset", revision: str | None = None) -> Iterator[None]:
    """Turns what the Hub's libraries raise into ValueError (mend the input) or ConnectionError (mend the network, or wait)."""
    try:
        yield
    except Exception as error:
        ours = _explained(error, f"{repo} on the Hugging Face Hub", repo, kind, revision)
        if ours is None:
            raise
        raise ours from None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from, outermost first."""
    seen = 0
    while error is not None and seen < 20:
        yield error
        error, seen = error.__cause__ or error.__context__, seen + 1


def _explained(error: Exception, what: str, repo: str, kind: str, revision: str | None) -> Exception | None:
    """The first cause that we know, in our words; None if there is none."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import httpx

    shelf = "" if kind == "model" else f"{kind}s/"
    page = f"{constants.ENDPOINT}/{shelf}{repo}"
    for cause in _causes(error):
        match cause:
            case errors.GatedRepoError():
                return ValueError(f"{what} is gated: accept its terms on {page}, then {_TOKEN}")
            case errors.RevisionNotFoundError():
                return ValueError(f"{what} has no revision {revision or 'main'!r}; give a branch, a tag or a commit that {page} lists")
            case errors.RepositoryNotFoundError():
                return _absent(what, kind)
            case errors.RemoteEntryNotFoundError() if cause is not error:
                continue  # `datasets` asks for files that need not be there, and goes on in the handler
            case errors.RemoteEntryNotFoundError():
                return ValueError(f"{what} lacks a file at revision {revision or 'main'}; look on {page}/tree/{revision or 'main'}")
            case errors.LocalTokenNotFoundError():
                return ValueError(f"{what}: no token was found; {_TOKEN}")
            case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError() if _is_offline(cause):
                return ConnectionError(
                    f"{what}: it is not in the cache, and HF_HUB_OFFLINE or HF_DATASETS_OFFLINE forbids to ask for it; unset them, or "
                    "copy the cache (HF_HOME) of a machine that has it"
                )
            case errors.HfHubHTTPError():
                sent = "authorization" in cause.response.request.headers
                return _refused(cause.response.status_code, what, kind, sent=sent)
            case httpx.TransportError() | httpx.TooManyRedirects() | ConnectionError() | TimeoutError():
                return ConnectionError(
                    f"{what}: {constants.ENDPOINT} can't be reached ({type(cause).__name__}); check the network and HF_ENDPOINT, or set "
                    "HF_HUB_OFFLINE=1 to work with what is in the cache"
                )
            case RuntimeError() if "scripts are no longer supported" in str(cause):
                return ValueError(
                    f"{what} is made by a Python script, which is never run here; its parquet copy, if the Hub has one, is at "
                    "revision refs/convert/parquet, or look for another copy"
                )
            case _:
                continue
    return None


def _is_offline(cause: BaseException) -> bool:
    from huggingface_hub import constants, errors

    return constants.is_offline_mode() or type(cause) is errors.OfflineModeIsEnabled


def _absent(what: str, kind: str) -> Exception:
    return ValueError(f"{what}: there is no such {kind}, or it is private; check the name, or {_TOKEN}. The Hub does not tell which it is")


def _refused(status: int, what: str, kind: str, *, sent: bool) -> Exception:
    """An answer that is an error, by its number; sent: whether a token went along."""
    if status == 401 and not sent:
        return _absent(what, kind)
    if status == 401:
        return ValueError(f"{what}: the Hub does not know the token that was sent; {_TOKEN}, or unset it")
    if status == 403:
        return ValueError(f"{what}: the token that was sent may not do this; {_TOKEN}, with write access for a push")
    if status == 429 or status >= 500:
        return ConnectionError(f"{what}: the Hub answered {status}; try again in a few minutes")
    return ValueError(f"{what}: the Hub answered {status}; check the name and the revision")
