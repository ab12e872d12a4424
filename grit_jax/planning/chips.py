"""TPU chips, and topologies of them to compile for on a machine without TPUs."""

import contextlib
import dataclasses
import math
import os
import re
from typing import Any

import jax

from grit_jax.bucket import one_line

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """The memory and bandwidths of a TPU chip, from Google's documentation of each TPU.

    `training.flops` has the peak operations a second.

    Attributes:
      hbm_bytes: main memory that a program can use.
      hbm_bandwidth: bytes a second from and to main memory.
      link_bandwidth: bytes a second in each direction over a link to a neighboring chip (ICI).
      network_bandwidth: bytes a second between slices (DCN), a chip's share of its host's network.
    """

    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float


CHIPS = {
    "v5e": Chip(
        hbm_bytes=15.75 * GIB,
        hbm_bandwidth=819e9,
        link_bandwidth=50e9,
        network_bandwidth=3.125e9,
    ),
    "v5p": Chip(
        hbm_bytes=95.74 * GIB,
        hbm_bandwidth=2765e9,
        link_bandwidth=100e9,
        network_bandwidth=6.25e9,
    ),
    "v6e": Chip(
        hbm_bytes=31.25 * GIB,
        hbm_bandwidth=1640e9,
        link_bandwidth=100e9,
        network_bandwidth=12.5e9,
    ),
}


# The names of chips in Google Cloud's accelerator types, and what the number in such a type counts
# for each chip: v5p-128 has 128 cores, two a chip.
ACCELERATORS = {"v5litepod": ("v5e", 1), "v5e": ("v5e", 1), "v6e": ("v6e", 1), "v5p": ("v5p", 2)}


class TopologyError(ValueError):
    """A topology does not exist, or libtpu is not installed or does not support it."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more slices of TPU chips.

    Attributes:
      name: the chip and the shape of a slice, such as "v5p:4x4x4".
      num_slices: the number of slices.
      devices: the chips, for meshes and the compiler. They cannot run programs.
    """

    name: str
    num_slices: int
    devices: list[Any]

    @property
    def chip(self) -> Chip:
        """The memory and bandwidths of each chip."""
        return CHIPS[self.name.partition(":")[0]]


def describe_topology(name: str, num_slices: int = 1) -> Topology:
    """Returns a topology to compile for. It needs the package libtpu, but no TPU.

    Args:
      name: the chip and the shape of a slice, such as "v5e:16x16" or "v5p:4x4x8", or an
        accelerator type of Google Cloud, such as "v5litepod-256" or "v5p-256".
      num_slices: the number of slices.

    Raises:
      TopologyError: there is no such topology, or libtpu cannot compile for it.
    """
    given, name = name, _slice_shape(name)
    chip, _, sizes = name.partition(":")
    shape = r"\d+(x\d+){" + str(_num_dimensions(chip) - 1) + "}"
    if chip not in CHIPS or not re.fullmatch(shape, sizes):
        raise TopologyError(
            f"--topology={given} must be an accelerator type, such as v5litepod-64, v6e-64 or "
            f"v5p-128, or a chip ({', '.join(CHIPS)}) and the shape of a slice, such as v5e:4x4 or "
            "v5p:4x4x4"
        )
    # Set before libtpu is loaded, so that it does not look for chips in this machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    slices = {"num_slices": num_slices} if num_slices > 1 else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **slices)
    except Exception as error:  # libtpu and its absence raise many types.
        reason = one_line(error)
        raise TopologyError(
            f"--topology={given} cannot be compiled for: {reason}. It needs the package libtpu "
            "(pip install 'grit-jax[tpu]')"
        ) from None
    devices = list(described.devices)
    expected = num_slices * math.prod(int(size) for size in sizes.split("x"))
    if len(devices) != expected:
        raise TopologyError(f"--topology={name} has {len(devices)} devices, not {expected}")
    return Topology(name, num_slices, devices)


def _slice_shape(accelerator_type: str) -> str:
    """Returns the chip and the default shape of a slice of an accelerator type, such as v6e:8x8.

    Any other name is returned as it is, and so is a type whose number of chips is no power of two.
    """
    prefix, _, number = accelerator_type.partition("-")
    if prefix not in ACCELERATORS or not number.isdigit():
        return accelerator_type
    chip, per_chip = ACCELERATORS[prefix]
    num_chips, rest = divmod(int(number), per_chip)
    if rest or num_chips.bit_count() != 1:
        return accelerator_type
    dimensions = _num_dimensions(chip)
    # Sides differ by a factor of two at most, the longest last, as in Google's tables.
    exponents = [(num_chips.bit_length() - 1 + i) // dimensions for i in range(dimensions)]
    if chip == "v5p" and exponents[0] == 0:
        exponents.reverse()  # Four chips are 2x2x1.
    return f"{chip}:{'x'.join(str(2**exponent) for exponent in exponents)}"


def _num_dimensions(chip: str) -> int:
    return 3 if chip == "v5p" else 2


@contextlib.contextmanager
def suppress_stderr():
    """Discards what is written to standard error: libtpu prints that the machine has no TPU."""
    null, stderr = os.open(os.devnull, os.O_WRONLY), os.dup(2)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(null)
        os.close(stderr)


def dimensions_spanned(group: list[jax.Device]) -> int:
    """Returns the number of dimensions of their slice in which some chips differ."""
    coordinates: list[tuple[int, ...]] = [tuple(chip.coords) for chip in group]  # pyright: ignore[reportAttributeAccessIssue]
    return sum(len(set(axis)) > 1 for axis in zip(*coordinates, strict=True))
