"""Folders in Google Cloud Storage buckets, gs://BUCKET/FOLDER.

They are accessed with gcsfs, even if TensorFlow is installed.
"""

from collections.abc import Iterator
import contextlib
import errno
import importlib.util
import logging
import os

from etils import epath

SCHEME = "gs://"
# Permissions that a run needs. Overwriting an object needs the permission to delete it.
PERMISSIONS = [f"storage.objects.{verb}" for verb in ("create", "delete", "get", "list")]
# Timeouts in seconds: for finding the bucket, and for any later request.
FIND_TIMEOUT, REQUEST_TIMEOUT = 30, 300

# Storage errors that may disappear after a restart come from these libraries, or their messages
# contain these words (of tensorstore, of gcsfs, or of the system for a disconnected network disk).
LIBRARIES = ("aiohttp", "gcsfs", "google", "requests")
TRANSIENT_ERRORS = (
    *("DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "Forbidden"),
    os.strerror(errno.ESTALE),
)


class BucketError(Exception):
    """A bucket cannot be used. The message names it and says what to do."""


def in_bucket(path: epath.PathLike) -> bool:
    """Returns whether a path is in a bucket."""
    return os.fspath(path).startswith(SCHEME)


def open_bucket(path: epath.PathLike) -> epath.Path:
    """Returns the path of a folder in a bucket after checking that the bucket can be accessed.

    Raises:
      BucketError: the bucket does not exist or cannot be accessed.
    """
    bucket = os.fspath(path).removeprefix(SCHEME).partition("/")[0]
    if not bucket:
        raise BucketError(f"{path} names no bucket: use gs://BUCKET/FOLDER")
    _use_gcsfs(path)
    with _as_bucket_errors(bucket):
        _find(bucket)
    return epath.Path(path)


def check_writing(folder: epath.Path) -> None:
    """Checks that this account has the permissions that a run needs, if the folder is in a bucket.

    Raises:
      BucketError: it does not; the message names the missing permissions.
    """
    if not in_bucket(folder):
        return
    name = folder.parts[2]
    with _as_bucket_errors(name):
        allowed = _find(name).test_iam_permissions(PERMISSIONS, timeout=FIND_TIMEOUT)
    if missing := sorted(set(PERMISSIONS) - set(allowed)):
        raise BucketError(
            f"{SCHEME}{name} cannot be written to: this account lacks {', '.join(missing)}; grant "
            "it the role storage.objectAdmin"
        )


def _use_gcsfs(path: epath.PathLike) -> None:
    """Makes etils, and so Orbax and JAX, access buckets with gcsfs."""
    if importlib.util.find_spec("gcsfs") is None:
        raise BucketError(f"{path} needs the package gcsfs: pip install 'grit-jax[bucket]'")
    os.environ["EPATH_USE_TF"] = "false"
    # Otherwise gcsfs asks for the type of the bucket over gRPC, for each file if it may not.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # It also raises these errors.
    from fsspec.config import conf

    # A cached listing is wrong as soon as another process writes to the folder.
    conf.setdefault("gs", {}).update(use_listings_cache=False, requests_timeout=REQUEST_TIMEOUT)


def _find(name: str):
    """Returns a bucket, with the request that Orbax makes for its type."""
    from google.cloud import storage
    from google.cloud.storage.retry import DEFAULT_RETRY

    retry = DEFAULT_RETRY.with_timeout(FIND_TIMEOUT)
    return storage.Client().get_bucket(name, timeout=FIND_TIMEOUT, retry=retry)


@contextlib.contextmanager
def _as_bucket_errors(bucket: str) -> Iterator[None]:
    """A context manager that turns errors about a bucket into `BucketError`s."""
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
        return
    except exceptions.NotFound:
        reason = "it does not exist"
    except (exceptions.Unauthorized, exceptions.Forbidden) as error:
        reason = f"{one_line(error)} (the role storage.legacyBucketReader has storage.buckets.get)"
    except GoogleAuthError as error:
        reason = f"{one_line(error)} (run gcloud auth application-default login)"
    except (exceptions.GoogleAPIError, OSError) as error:
        reason = one_line(error)
    raise BucketError(f"{SCHEME}{bucket} cannot be used: {reason}")


def is_transient_storage_error(error: BaseException | None) -> bool:
    """Returns whether an error is about access to storage, and not about its content."""
    while error is not None:
        library = type(error).__module__.partition(".")[0]
        if library in LIBRARIES or any(word in str(error) for word in TRANSIENT_ERRORS):
            return True
        error = error.__cause__ or error.__context__
    return False


def one_line(error: BaseException) -> str:
    """Returns the first 300 characters of an error's message, in one line."""
    return " ".join(str(error).split())[:300]
