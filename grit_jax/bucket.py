"""Folders in a bucket of Google's storage, gs://BUCKET/FOLDER: whether they can be used.

They are reached with gcsfs, and never with TensorFlow, whether that is installed or not.
"""

import importlib.util
import os

from etils import epath

SCHEME = "gs://"
# What a run does with the objects in its folder. Replacing one needs the right to delete it.
PERMISSIONS = [f"storage.objects.{verb}" for verb in ("create", "delete", "get", "list")]
# Seconds: for how long a bucket is asked for, and for how long any request is waited on.
PATIENCE, LONGEST_REQUEST = 30, 300


class BucketError(Exception):
    """A bucket cannot be used; the message names it and says what to do."""


def in_bucket(path: epath.PathLike) -> bool:
    """Returns whether a path is one in a bucket."""
    return os.fspath(path).startswith(SCHEME)


def as_folder(path: epath.PathLike) -> epath.Path:
    """Returns the path of a folder on a disk or in a bucket, which is reached from then on.

    Raises:
      BucketError: there is no such bucket, or it cannot be reached.
    """
    if not in_bucket(path):
        return epath.Path(path).resolve()
    bucket = os.fspath(path).removeprefix(SCHEME).partition("/")[0]
    if not bucket:
        raise BucketError(f"{path} names no bucket: it must be gs://BUCKET/FOLDER")
    _choose_gcsfs(path)
    _find(bucket)
    return epath.Path(path)


def check_writing(folder: epath.Path) -> None:
    """Checks that this account may do in a folder what a run does; on a disk that shows itself.

    Raises:
      BucketError: it may not; the message says what it lacks.
    """
    if not in_bucket(folder):
        return
    bucket = _find(folder.parts[2])
    allowed = bucket.test_iam_permissions(PERMISSIONS, timeout=PATIENCE)
    if lacking := sorted(set(PERMISSIONS) - set(allowed)):
        raise BucketError(
            f"{SCHEME}{bucket.name}: this account lacks {', '.join(lacking)}, "
            "which the role storage.objectAdmin has"
        )


def _choose_gcsfs(path: epath.PathLike) -> None:
    """Has etils, and through it Orbax and JAX, reach buckets with gcsfs."""
    if importlib.util.find_spec("gcsfs") is None:
        raise BucketError(f"{path} needs the package gcsfs: pip install 'grit-jax[gcs]'")
    os.environ["EPATH_USE_TF"] = "false"
    # Else the kind of the bucket is asked for over gRPC, with each file if that is not allowed.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    from fsspec.config import conf

    # What is remembered of a folder is wrong as soon as another process writes to it.
    conf.setdefault("gs", {}).update(use_listings_cache=False, requests_timeout=LONGEST_REQUEST)


def _find(name: str):
    """Returns a bucket, as Orbax asks for it.

    Raises:
      BucketError: it does not exist, is not this account's to see, or does not answer.
    """
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import storage
    from google.cloud.storage.retry import DEFAULT_RETRY

    try:
        retry = DEFAULT_RETRY.with_timeout(PATIENCE)
        return storage.Client().get_bucket(name, timeout=PATIENCE, retry=retry)
    except exceptions.NotFound:
        reason = "it does not exist"
    except (exceptions.Unauthorized, exceptions.Forbidden):
        reason = (
            "this account lacks storage.buckets.get, which the role storage.legacyBucketReader has"
        )
    except GoogleAuthError as error:
        reason = f"{in_short(error)} (gcloud auth application-default login)"
    except (exceptions.GoogleAPIError, OSError) as error:
        reason = in_short(error)
    raise BucketError(f"{SCHEME}{name} cannot be used: {reason}")


def in_short(error: BaseException) -> str:
    """Returns the beginning of what an error says, in one line."""
    return " ".join(str(error).split())[:300]
