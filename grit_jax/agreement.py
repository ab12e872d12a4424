"""Whether all processes of a run were started alike: one that was not would train another model.

They would go on together for hours, or wait for each other for ever. So they compare what they
are about to do before they do anything.
"""

from collections import Counter
from collections.abc import Mapping
import importlib.metadata
from pathlib import Path
import platform
import socket
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from grit_jax.data.fingerprints import fingerprint
from grit_jax.processes import ProcessError

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


def _check(facts: Mapping[str, Any]) -> None:
    digests = np.stack([_digest(value) for value in facts.values()])
    name = np.zeros(NAME_BYTES, np.uint8)
    encoded = socket.gethostname().encode()[:NAME_BYTES]
    name[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    # Of all processes: [processes, facts, bytes of a digest] and [processes, bytes of a name].
    of_all, names = multihost_utils.process_allgather((digests, name))
    differing = {}
    for number, fact in enumerate(facts):
        if unusual := _unusual([digest.tobytes() for digest in of_all[:, number]]):
            differing[fact] = unusual
    if not differing:
        return
    processes = sorted({process for unusual in differing.values() for process in unusual})
    hosts = [
        f"process {process} on {names[process].tobytes().rstrip(bytes(1)).decode()}"
        for process in processes
    ]
    listed = list(differing)[:MOST_LISTED]
    more = f" and {len(differing) - MOST_LISTED} more" if len(differing) > MOST_LISTED else ""
    raise ProcessError(
        f"{', '.join(hosts)} differs from the other processes in {', '.join(listed)}{more}: start "
        "all with the same command, code, packages and data"
    )


def _unusual(values: list[bytes]) -> list[int]:
    """Returns the numbers of the values that differ from the most common one, the first of them."""
    usual, _ = Counter(values).most_common(1)[0]
    return [number for number, value in enumerate(values) if value != usual]


def _digest(value: Any) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(fingerprint(value)), np.uint8)


def _code() -> dict[str, str]:
    folder = Path(__file__).parent
    files = sorted(path for part in (folder, folder / "models") for path in part.rglob("*.py"))
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions}
