"""Files of object stores (s3, gs, az), through whichever fsspec file system is installed for them."""

import re

from data_shards.remote.locations import Location
from data_shards.remote.retry import RefusedError, TryAgainError
from data_shards.remote.transport import BLOCK_BYTES, Body

_READ_AHEAD_BYTES = 2**24  # one request of the file system
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}
# by name, because the packages that define them need not be there
_DENIED = {"NoCredentialsError", "PartialCredentialsError", "ClientAuthenticationError", "DefaultCredentialsError"}


def open_object(location: Location, *, offset: int, etag: str | None, known_etag: str | None) -> Body | None:
    """The object from byte `offset` on, if it still has `etag`, else from its start; None if it still is `known_etag`.

    Raises: RefusedError when asking again is no use, TryAgainError when it may be.
    """
    try:
        import fsspec

        store = fsspec.filesystem(location.scheme, use_listings_cache=False)
    except ImportError:
        package = _PACKAGES[location.scheme]
        raise RefusedError(f"{location}: {location.scheme}:// needs {package}; pip install {package}") from None
    except Exception as error:
        raise _judged(location, error) from error
    try:
        facts = store.info(location.secret_text)
        found = next((str(facts[key]) for key in ("ETag", "etag", "mtime", "LastModified") if facts.get(key)), None)
        if known_etag is not None and found == known_etag:
            return None
        file = store.open(location.secret_text, "rb", block_size=_READ_AHEAD_BYTES, cache_type="readahead")
        start = offset if found is not None and found == etag else 0
        file.seek(start)
    except Exception as error:
        raise _judged(location, error) from error

    def read() -> bytes:
        try:
            return file.read(BLOCK_BYTES)
        except Exception as error:
            raise _judged(location, error) from error

    return Body(start, facts.get("size"), found, read, file.close)


def _judged(location: Location, error: Exception) -> RefusedError | TryAgainError:
    """What an error of a file system means: each has its own kinds, few of them OSErrors."""
    if isinstance(error, FileNotFoundError):
        return RefusedError(f"{location}: there is no such file; check the location, or upload it")
    if isinstance(error, PermissionError) or type(error).__name__ in _DENIED:
        return RefusedError(
            f"{location}: the store does not let us read it ({type(error).__name__}); set {_CREDENTIALS[location.scheme]} "
            "to credentials that may"
        )
    text = re.sub(r"\?\S+", "", str(error))  # signatures
    return TryAgainError(f"{type(error).__name__}: {text:.200}")
