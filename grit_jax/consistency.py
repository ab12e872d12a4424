"""Whether all processes of a run were started alike: one that was not would train another model.

They would go on together for hours, or wait for each other for ever. So they compare what they
are about to do before they do anything.
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
import jax
from jax.experimental import multihost_utils
import numpy as np

from grit_jax.files import json_sha256
from grit_jax.processes import ProcessError, is_primary

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Bytes of a host's name that are told to the others.
NAME_BYTES = 64
# Most differences that a message lists.
MOST_LISTED = 5


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Checks that all processes have as many devices, the same code, packages and facts.

    Args:
      facts: values that JSON can hold, by names fit for a message; the same names everywhere
        where the code is the same.

    Raises:
      ProcessError: they differ; the message names what does, and the hosts.
    """
    _check_devices()
    # Where the code differs, so may the names of the facts: the code goes first.
    _check({"the code of grit-jax": _code(), "the versions of packages": _versions()})
    _check(facts)


def _check_devices() -> None:
    """The devices of all processes are known to each of them, without asking."""
    counts = Counter(device.process_index for device in jax.devices())
    usual, _ = Counter(counts.values()).most_common(1)[0]
    if unusual := {process: count for process, count in counts.items() if count != usual}:
        named = ", ".join(f"process {process} has {count}" for process, count in unusual.items())
        raise ProcessError(
            f"{named} devices, the others {usual} each: look at that host's devices, and that "
            "nothing else runs on them"
        )


def check_shared(folder: epath.Path) -> None:
    """Checks that a folder is the same one for all processes; each saves its part of a checkpoint.

    Raises:
      ProcessError: it is not; the message names the hosts that have another.
    """
    # A name that no host has looked for before: a disk over a network remembers what was not there.
    number = multihost_utils.broadcast_one_to_all(np.array(secrets.randbits(31), np.int32))
    mark = folder / f".shared-{number}"
    if is_primary():
        mark.write_text("")
    multihost_utils.sync_global_devices("the mark is there")
    (seen,), names = _of_all([mark.exists()])
    if is_primary():
        mark.unlink()
    if others := [process for process, digest in enumerate(seen) if digest != seen[0]]:
        raise ProcessError(
            f"{_named(others, names)} has another folder {folder} than process 0: --workdir must "
            "be on a file system that all share, or in a bucket"
        )


def _check(facts: Mapping[str, Any]) -> None:
    of_all, names = _of_all(list(facts.values()))
    differing = {}
    for fact, digests in zip(facts, of_all, strict=True):
        if unusual := _unusual(digests):
            differing[fact] = unusual
    if not differing:
        return
    processes = sorted({process for unusual in differing.values() for process in unusual})
    listed = list(differing)[:MOST_LISTED]
    more = f" and {len(differing) - MOST_LISTED} more" if len(differing) > MOST_LISTED else ""
    raise ProcessError(
        f"{_named(processes, names)} differs from the other processes in "
        f"{', '.join(listed)}{more}: start all with the same command, code, packages and data"
    )


def _of_all(values: list[Any]) -> tuple[list[list[bytes]], list[str]]:
    """Returns for each value its digests in all processes, and the names of their hosts."""
    digests = np.stack([_digest(value) for value in values])
    name = np.zeros(NAME_BYTES, np.uint8)
    encoded = socket.gethostname().encode()[:NAME_BYTES]
    name[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    # Of all processes: [processes, values, bytes of a digest] and [processes, bytes of a name].
    of_all, names = multihost_utils.process_allgather((digests, name))
    by_value = [[digest.tobytes() for digest in of_all[:, n]] for n in range(len(values))]
    return by_value, [each.tobytes().rstrip(bytes(1)).decode() for each in names]


def _named(processes: list[int], names: list[str]) -> str:
    return ", ".join(f"process {process} on {names[process]}" for process in processes)


def _unusual(values: list[bytes]) -> list[int]:
    """Returns the numbers of the values that differ from the most common one, the first of them."""
    usual, _ = Counter(values).most_common(1)[0]
    return [number for number, value in enumerate(values) if value != usual]


def _digest(value: Any) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(json_sha256(value)), np.uint8)


def _code() -> dict[str, str]:
    folder = Path(__file__).parent
    files = sorted(path for part in (folder, folder / "models") for path in part.rglob("*.py"))
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions}
