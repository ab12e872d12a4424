"""Joins the workers as training does, and counts the TPUs of all: check_devices.py NUMBER."""

import socket
import sys

import jax

from grit_jax.processes import ProcessError, connect


def main(expected: int) -> None:
    """Ends with an error unless there are `expected` TPU devices on all workers together."""
    try:
        connect()
        devices = jax.devices()
    except (ProcessError, RuntimeError) as error:
        sys.exit(f"{socket.gethostname()}: {error}")
    tpus = sum(device.platform == "tpu" for device in devices)
    if tpus != expected:
        sys.exit(f"{socket.gethostname()}: there are {tpus} TPU devices, and not {expected}")
    print(f"{socket.gethostname()}: {jax.local_device_count()} of {tpus} devices")


if __name__ == "__main__":
    main(int(sys.argv[1]))
