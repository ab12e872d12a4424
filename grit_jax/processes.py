"""The processes of a distributed run, usually one per machine."""

import glob
import importlib.util
import os
import sys
import threading
from typing import NoReturn

import jax
from jax.experimental import multihost_utils
import numpy as np

from grit_jax.bucket import one_line

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# The files of TPU chips, whatever the environment says.
TPU_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")
# JAX waits 300 seconds for the other processes, then aborts with a stack trace.
CONNECTION_WARNING_SECONDS = 270.0


class ProcessError(Exception):
    """The processes of a run cannot connect, or differ. The message says what to do."""


def skip_absent_tpu() -> None:
    """Keeps JAX from loading libtpu on a machine without TPUs, where it prints warnings.

    It has no effect if `jax_platforms` is set, if JAX has plugins for other devices, or once JAX
    has used a device.
    """
    has_other_devices = importlib.util.find_spec("jax_plugins") or any(map(glob.glob, TPU_DEVICES))
    if jax.config.jax_platforms is None and not has_other_devices and not _has_tpu():
        jax.config.update("jax_platforms", "cpu")


def connect() -> None:
    """Connects this process to the others of the run; to be called before JAX uses any device.

    The environment variables JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES
    and JAX_PROCESS_ID configure the run. Without them, TPU machines configure themselves, and other
    machines run a single process. JAX_NUM_PROCESSES=1 alone also runs a single process. A process
    that waits for the others prints what it waits for before JAX aborts it.

    Raises:
      ProcessError: the environment is incomplete or wrong, or the connection failed.
    """
    skip_absent_tpu()
    given = {name: os.environ[name] for name in (ADDRESS, COUNT, NUMBER) if os.environ.get(name)}
    if given == {COUNT: "1"} or not (given or _has_tpu()):
        return
    try:
        if not given:
            jax.distributed.initialize()
        else:
            address, count, number = _check_environment(given)
            overdue = threading.Timer(CONNECTION_WARNING_SECONDS, _report_waiting, (address, count))
            overdue.daemon = True
            overdue.start()
            try:
                jax.distributed.initialize(address, count, number)
            finally:
                overdue.cancel()
    except (RuntimeError, ValueError, OSError) as error:
        raise ProcessError(
            f"the processes of this run cannot connect: {one_line(error)}. Set {ADDRESS} "
            f"(HOST:PORT of process 0), {COUNT} and {NUMBER} for each process, or {COUNT}=1 for a "
            "single one"
        ) from None


def is_primary() -> bool:
    """Returns whether this process prints and writes the files that only one process writes."""
    return jax.process_index() == 0


def broadcast_from_primary(value: bool) -> bool:
    """Broadcasts the primary process's `value` to every process."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def exit_now(exit_code: int) -> NoReturn:
    """Exits, without a clean shutdown if there are other processes.

    A clean shutdown waits for the others, which may be blocked in a step that waits for this one.
    """
    if jax.distributed.is_initialized():  # Unlike process_count(), this starts no backend.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    raise SystemExit(exit_code)


def _report_waiting(address: str, count: int) -> None:
    print(
        f"the processes of this run have not connected for {CONNECTION_WARNING_SECONDS:.0f} "
        f"seconds, and JAX is about to give up: {COUNT}={count} of them must run, and all must "
        f"reach {ADDRESS}={address}, which is HOST:PORT of process 0",
        file=sys.stderr,
        flush=True,
    )


def _check_environment(given: dict[str, str]) -> tuple[str, int, int]:
    missing = [name for name in (ADDRESS, COUNT, NUMBER) if name not in given]
    if missing:
        raise ValueError(f"{', '.join(given)} is set, but not {', '.join(missing)}")
    address = given[ADDRESS]
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) >= 2**16:
        raise ValueError(f"{ADDRESS}={address} is not of the form HOST:PORT")
    for name in (COUNT, NUMBER):
        if not given[name].isdecimal():
            raise ValueError(f"{name}={given[name]} is not a number")
    count, number = int(given[COUNT]), int(given[NUMBER])
    if number >= count:
        raise ValueError(f"{NUMBER}={number}, but with {COUNT}={count} they are 0 to {count - 1}")
    return address, count, number


def _has_tpu() -> bool:
    # JAX sets the variable if there is no TPU. Asking for devices would initialize JAX too early.
    return importlib.util.find_spec("libtpu") is not None and not os.environ.get(
        "TPU_SKIP_MDS_QUERY"
    )
