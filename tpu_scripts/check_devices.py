"""Connects all workers as training does, and counts their TPUs: check_devices.py NUMBER."""

import socket
import sys

import jax

from grit_jax.processes import ProcessError, connect


def main(expected: int) -> None:
    """Exits with an error unless all workers together have `expected` TPU devices."""
    try:
        connect()
        devices = jax.devices()
    except (ProcessError, RuntimeError) as error:
        sys.exit(f"{socket.gethostname()}: {error}")
    tpus = sum(device.platform == "tpu" for device in devices)
    if tpus != expected:
        sys.exit(f"{socket.gethostname()}: found {tpus} TPU devices, expected {expected}")
    print(f"{socket.gethostname()}: {jax.local_device_count()} of {tpus} devices")


if __name__ == "__main__":
    main(int(sys.argv[1]))
