"""Folders in a bucket of Google's storage, gs://BUCKET/FOLDER: whether they can be used.

They are reached with gcsfs, and never with TensorFlow, whether that is installed or not.
"""

from collections.abc import Iterator
import contextlib
import errno
import importlib.util
import logging
import os

from etils import epath

SCHEME = "gs://"
# What a run does with the objects in its folder. Replacing one needs the right to delete it.
PERMISSIONS = [f"storage.objects.{verb}" for verb in ("create", "delete", "get", "list")]
# Seconds: for how long a bucket is asked for, and for how long any request is waited on.
PATIENCE, LONGEST_REQUEST = 30, 300

# What reaches a bucket has errors of its own; these are the words of tensorstore, of gcsfs, and of
# the system where another machine's disk has been away.
LIBRARIES = ("aiohttp", "gcsfs", "google", "requests")
REFUSALS = (
    *("DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "Forbidden"),
    os.strerror(errno.ESTALE),
)


class BucketError(Exception):
    """A bucket cannot be used; the message names it and says what to do."""


def in_bucket(path: epath.PathLike) -> bool:
    """Returns whether a path is one in a bucket."""
    return os.fspath(path).startswith(SCHEME)


def open_bucket(path: epath.PathLike) -> epath.Path:
    """Returns the path of a folder in a bucket, which can be read and written from then on.

    Raises:
      BucketError: there is no such bucket, or it cannot be reached; the message says why.
    """
    bucket = os.fspath(path).removeprefix(SCHEME).partition("/")[0]
    if not bucket:
        raise BucketError(f"{path} names no bucket: it must be gs://BUCKET/FOLDER")
    _choose_gcsfs(path)
    with _in_one_line(bucket):
        _find(bucket)
    return epath.Path(path)


def check_writing(folder: epath.Path) -> None:
    """Checks that this account may do in a folder what a run does; on a disk that shows itself.

    Raises:
      BucketError: it may not; the message says what it lacks.
    """
    if not in_bucket(folder):
        return
    name = folder.parts[2]
    with _in_one_line(name):
        allowed = _find(name).test_iam_permissions(PERMISSIONS, timeout=PATIENCE)
    if lacking := sorted(set(PERMISSIONS) - set(allowed)):
        raise BucketError(
            f"{SCHEME}{name} cannot be written to: this account lacks {', '.join(lacking)}, which "
            "the role storage.objectAdmin has"
        )


def _choose_gcsfs(path: epath.PathLike) -> None:
    """Has etils, and through it Orbax and JAX, reach buckets with gcsfs."""
    if importlib.util.find_spec("gcsfs") is None:
        raise BucketError(f"{path} needs the package gcsfs: pip install 'grit-jax[bucket]'")
    os.environ["EPATH_USE_TF"] = "false"
    # Else the kind of the bucket is asked for over gRPC, with each file if that is not allowed.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # What it cannot do, it also raises.
    from fsspec.config import conf

    # What is remembered of a folder is wrong as soon as another process writes to it.
    conf.setdefault("gs", {}).update(use_listings_cache=False, requests_timeout=LONGEST_REQUEST)


def _find(name: str):
    """Returns a bucket, as Orbax asks for it to know of what kind it is."""
    from google.cloud import storage
    from google.cloud.storage.retry import DEFAULT_RETRY

    retry = DEFAULT_RETRY.with_timeout(PATIENCE)
    return storage.Client().get_bucket(name, timeout=PATIENCE, retry=retry)


@contextlib.contextmanager
def _in_one_line(bucket: str) -> Iterator[None]:
    """A context that raises a BucketError for whatever goes wrong with a bucket."""
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
        return
    except exceptions.NotFound:
        reason = "it does not exist"
    except (exceptions.Unauthorized, exceptions.Forbidden) as error:
        reason = (
            f"{one_line(error)} (storage.buckets.get is in the role storage.legacyBucketReader)"
        )
    except GoogleAuthError as error:
        reason = f"{one_line(error)} (gcloud auth application-default login)"
    except (exceptions.GoogleAPIError, OSError) as error:
        reason = one_line(error)
    raise BucketError(f"{SCHEME}{bucket} cannot be used: {reason}")


def is_transient_storage_error(error: BaseException | None) -> bool:
    """Returns whether an error is about reaching a bucket or a disk, not about what lies there."""
    while error is not None:
        library = type(error).__module__.partition(".")[0]
        if library in LIBRARIES or any(word in str(error) for word in REFUSALS):
            return True
        error = error.__cause__ or error.__context__
    return False


def one_line(error: BaseException) -> str:
    """Returns the beginning of what an error says, in one line."""
    return " ".join(str(error).split())[:300]
