"""Checks that all processes of a run have the same devices, code, packages, settings and data.

Otherwise they would train a wrong model without an error, or wait for each other forever.
"""

from collections import Counter
from collections.abc import Mapping
import importlib.metadata
from pathlib import Path
import platform
import secrets
import socket
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict
import jax
from jax.experimental import multihost_utils
import numpy as np

from grit_jax.files import json_sha256
from grit_jax.processes import ProcessError, is_primary

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Maximum bytes of a host name in messages.
NAME_BYTES = 64
# Maximum number of differences in a message.
MAX_LISTED = 5


def check_agreement(settings: Mapping[str, Any]) -> None:
    """Checks that all processes have the same number of devices, code, packages and settings.

    Args:
      settings: JSON values, keyed by names for error messages.

    Raises:
      ProcessError: they differ; the message names what differs and the hosts.
    """
    _check_devices()
    # The code first: with other code, the processes could have other settings.
    _check({"the code of grit-jax": _code(), "the versions of packages": _versions()})
    _check(settings)


def describe_differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Returns a description of each value that differs between two nested dictionaries.

    A key that only one of them has counts as None in the other.
    """
    before, now = (flatten_dict(dict(tree), sep=".") for tree in (stored, current))
    return [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _check_devices() -> None:
    """Checks that all processes have the same number of devices."""
    counts = Counter(device.process_index for device in jax.devices())
    usual, _ = Counter(counts.values()).most_common(1)[0]
    if unusual := {process: count for process, count in counts.items() if count != usual}:
        named = ", ".join(f"process {process} has {count}" for process, count in unusual.items())
        raise ProcessError(
            f"{named} devices, the others {usual} each: check that host's devices, and that no "
            "other program uses them"
        )


def check_shared(folder: epath.Path) -> None:
    """Checks that a folder is shared by all processes, each of which saves a part of a checkpoint.

    Raises:
      ProcessError: it is not; the message names the hosts that have another folder.
    """
    # A random name, since network file systems cache that a file does not exist.
    suffix = multihost_utils.broadcast_one_to_all(np.array(secrets.randbits(31), np.int32))
    marker = folder / f".shared-{suffix}"
    if is_primary():
        marker.write_text("")
    multihost_utils.sync_global_devices("shared folder marker")
    (found,), names = _gather([marker.exists()])
    if is_primary():
        marker.unlink()
    if others := [process for process, digest in enumerate(found) if digest != found[0]]:
        raise ProcessError(
            f"{_named(others, names)} has another folder {folder} than process 0: --workdir must "
            "be on a file system that all processes share, or in a bucket"
        )


def _check(settings: Mapping[str, Any]) -> None:
    gathered, names = _gather(list(settings.values()))
    differing = {}
    for setting, digests in zip(settings, gathered, strict=True):
        if unusual := _unusual(digests):
            differing[setting] = unusual
    if not differing:
        return
    processes = sorted({process for unusual in differing.values() for process in unusual})
    listed = list(differing)[:MAX_LISTED]
    more = f" and {len(differing) - MAX_LISTED} more" if len(differing) > MAX_LISTED else ""
    raise ProcessError(
        f"{_named(processes, names)} differs from the other processes in "
        f"{', '.join(listed)}{more}: start all with the same command, code, packages and data"
    )


def _gather(values: list[Any]) -> tuple[list[list[bytes]], list[str]]:
    """Returns the digests of each value in all processes, and the names of their hosts."""
    digests = np.stack([_digest(value) for value in values])
    name = np.zeros(NAME_BYTES, np.uint8)
    encoded = socket.gethostname().encode()[:NAME_BYTES]
    name[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    # [processes, values, bytes of a digest] and [processes, bytes of a name].
    gathered, names = multihost_utils.process_allgather((digests, name))
    by_value = [[digest.tobytes() for digest in gathered[:, n]] for n in range(len(values))]
    return by_value, [each.tobytes().rstrip(bytes(1)).decode() for each in names]


def _named(processes: list[int], names: list[str]) -> str:
    return ", ".join(f"process {process} on {names[process]}" for process in processes)


def _unusual(values: list[bytes]) -> list[int]:
    """Returns the indices of the values that differ from the most common one."""
    usual, _ = Counter(values).most_common(1)[0]
    return [index for index, value in enumerate(values) if value != usual]


def _digest(value: Any) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(json_sha256(value)), np.uint8)


def _code() -> dict[str, str]:
    folder = Path(__file__).parent
    files = sorted(folder.rglob("*.py"))
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions}
