"""The processes of a run, one a machine: how they find each other, and what one does for all."""

import importlib.util
import os
import sys
import threading
from typing import NoReturn

import jax
from jax.experimental import multihost_utils
import numpy as np

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# JAX ends a process that the others have not joined after 300 seconds, with a dump of its stack.
PATIENCE_SECONDS = 270.0


class ProcessError(Exception):
    """The processes of a run cannot find each other; the message says what to set."""


def connect() -> None:
    """Joins the other processes of this run, before any device is touched.

    Where the environment has JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES
    and JAX_PROCESS_ID, it says who they are; on TPUs the machine does, unless JAX_NUM_PROCESSES is
    1; elsewhere this process is alone. If the others do not come, JAX ends it after five minutes;
    before that, a line says what it waits for.

    Raises:
      ProcessError: the environment is incomplete or wrong.
    """
    given = {name: os.environ[name] for name in (ADDRESS, COUNT, NUMBER) if os.environ.get(name)}
    if given == {COUNT: "1"} or not (given or _has_tpu()):
        return
    try:
        if not given:
            jax.distributed.initialize()
        else:
            address, count, number = _check_environment(given)
            overdue = threading.Timer(PATIENCE_SECONDS, _say_what_is_missing, (address, count))
            overdue.daemon = True
            overdue.start()
            try:
                jax.distributed.initialize(address, count, number)
            finally:
                overdue.cancel()
    except (RuntimeError, ValueError, OSError) as error:  # What JAX and its look at the machine do.
        reason = " ".join(str(error).split())[:300]
        raise ProcessError(
            f"the processes of this run cannot find each other: {reason}. Set {ADDRESS} (HOST:PORT "
            f"of process 0), {COUNT} and {NUMBER} for each, or {COUNT}=1 for this one alone"
        ) from None


def is_primary() -> bool:
    """Returns whether this process prints, and writes what is not written by all."""
    return jax.process_index() == 0


def broadcast_from_primary(value: bool) -> bool:
    """Returns what the process that writes has for `value`, in all processes."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def exit_now(exit_code: int) -> NoReturn:
    """Ends this process, at once if there are others.

    They wait for it in the middle of a step, and it would wait for them at its end.
    """
    if jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    raise SystemExit(exit_code)


def _say_what_is_missing(address: str, count: int) -> None:
    print(
        f"the processes of this run have not found each other for {PATIENCE_SECONDS:.0f} seconds, "
        f"and will not be waited for much longer: {COUNT}={count} of them must be running, and all "
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
            raise ValueError(f"{name}={given[name]} is no number")
    count, number = int(given[COUNT]), int(given[NUMBER])
    if number >= count:
        raise ValueError(f"{NUMBER}={number}, but with {COUNT}={count} they go from 0")
    return address, count, number


def _has_tpu() -> bool:
    # JAX sets the variable where it finds no TPU. No device may be touched to see.
    return importlib.util.find_spec("libtpu") is not None and not os.environ.get(
        "TPU_SKIP_MDS_QUERY"
    )
