"""TPU chips, and slices of them described without having any."""

import contextlib
import dataclasses
import math
import os
import re
from typing import Any

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What a chip has, from Google's pages on each TPU; its peak is in `training.flops`.

    Attributes:
      hbm_bytes: main memory that a program can use.
      hbm_bandwidth: bytes a second of it.
      link_bandwidth: bytes a second each way over a link to a neighbour.
      network_bandwidth: bytes a second of a chip's share of its host's network, between slices.
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


class TopologyError(ValueError):
    """There is no such topology, or nothing to compile for it with."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of chips, each a block such as 4x4x4.

    Attributes:
      name: such as "v5p:4x4x4".
      num_slices: how many such blocks.
      devices: the chips, for meshes and the compiler; they cannot run anything.
    """

    name: str
    num_slices: int
    devices: list[Any]

    @property
    def chip(self) -> Chip:
        """What each chip has."""
        return CHIPS[self.name.partition(":")[0]]


def describe_topology(name: str, num_slices: int = 1) -> Topology:
    """Returns a topology to compile for; no TPU is needed, but the package libtpu.

    Args:
      name: chip and sizes, such as "v5e:16x16" or "v5p:4x4x8".
      num_slices: number of such slices.

    Raises:
      TopologyError: it cannot be compiled for; the message says why.
    """
    chip, _, sizes = name.partition(":")
    dimensions = 3 if chip == "v5p" else 2
    if chip not in CHIPS or not re.fullmatch(r"\d+(x\d+)" + f"{{{dimensions - 1}}}", sizes):
        raise TopologyError(
            f"--topology={name}: it is a chip and the sizes of its slice, such as v5e:4x4, v6e:8x8 "
            f"or v5p:4x4x4; chips are {', '.join(CHIPS)}"
        )
    # Before libtpu is loaded: it is not to look for the chips of this machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    slices = {"num_slices": num_slices} if num_slices > 1 else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **slices)
    except Exception as error:  # Whatever libtpu, or its absence, makes of it.
        reason = " ".join(str(error).split())[:300]
        raise TopologyError(
            f"--topology={name} cannot be compiled for: {reason}. It takes the package libtpu: "
            "pip install 'grit-jax[tpu]'"
        ) from None
    devices = list(described.devices)
    expected = num_slices * math.prod(int(size) for size in sizes.split("x"))
    if len(devices) != expected:
        raise TopologyError(f"--topology={name} has {len(devices)} devices, not {expected}")
    return Topology(name, num_slices, devices)


@contextlib.contextmanager
def quiet():
    """A context without what libtpu prints about the machine, which has no TPU."""
    null, kept = os.open(os.devnull, os.O_WRONLY), os.dup(2)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(null)
        os.close(kept)


def dimensions_spanned(group: list[jax.Device]) -> int:
    """Returns along how many dimensions of their slice some chips lie."""
    coordinates: list[tuple[int, ...]] = [tuple(chip.coords) for chip in group]  # pyright: ignore[reportAttributeAccessIssue]
    return sum(len(set(along)) > 1 for along in zip(*coordinates, strict=True))
