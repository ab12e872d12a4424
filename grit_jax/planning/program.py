"""What a compiled program does on each device: operations, memory traffic, and what it sends.

It is read from the text of the program (HLO) as the compiler leaves it. The body of a loop counts
as often as it runs; the compiler's own analysis takes it once. Memory traffic is that of the
arrays that an operation reads and writes in the device's main memory, a slice for what is sliced.
Attention kernels count all pairs of tokens, those that a causal mask spares too; of the experts'
kernels only the rows that hold something count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
import dataclasses
import functools
import math
import re

import numpy as np

from grit_jax.arithmetic import ceil_div

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}

# Operations that move nothing by themselves.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "recv",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "copy-done",
}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "send",  # Between slices, of which each has a program of its own.
)
# Products of [queries, keys] x size of a head in each of splash attention's kernels.
SPLASH_PRODUCTS = {"_fwd": 2, "_dq": 3, "_dkv": 4}
# XLA's kernel for products of rows with their group's weight, and megablox's for their gradient.
EXPERTS_KERNELS = ("ragged-dot-none", "tgmm")
SLICING = {"dynamic-slice", "slice", "gather"}
# Those whose result is what is given and what is made of it: a copy's two ends.
BOTH_ENDS = {"copy-start", "collective-permute-start", "all-gather-start", "send"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Devices that exchange something.

    Attributes:
      kind: one of `COLLECTIVES`.
      num_bytes: of the whole that each takes part in: what it gathers, reduces or sends.
      group: numbers of the devices of one of the groups, in a slice, or a sender and its receiver.
      channel: the compiler's number of it. One that runs beside other work stands in several
        places of a program, under one number.
    """

    kind: str
    num_bytes: float
    group: tuple[int, ...]
    channel: int


@dataclasses.dataclass
class ProgramCost:
    """What a device does.

    Attributes:
      flops: operations of matrix products.
      hbm_bytes: bytes read and written in its main memory.
      collectives: how often each is run.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: Counter[Collective] = dataclasses.field(default_factory=Counter)

    def add(self, other: ProgramCost, times: int = 1) -> None:
        """Adds what is done so many times."""
        self.flops += times * other.flops
        self.hbm_bytes += times * other.hbm_bytes
        for collective, count in other.collectives.items():
            self.collectives[collective] += times * count


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's type, sizes and place."""

    dtype: str
    sizes: tuple[int, ...]
    is_in_hbm: bool

    @property
    def num_bytes(self) -> float:
        """Its size."""
        width = BYTES.get(self.dtype)
        if width is None:
            bits = re.search(r"\d+", self.dtype)
            width = int(bits.group()) / 8 if bits else 0
        return width * math.prod(self.sizes)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, *keys: str) -> list[str]:
        """Returns the names of the computations that it calls under these keys."""
        found = (re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes) for key in keys)
        return [match.group(1) for match in found if match]


def program_cost(text: str, num_devices: int, rows_used: float = 1.0) -> ProgramCost:
    """Returns what each device does in a program.

    Args:
      text: the program, as HLO.
      num_devices: number of devices that it is for.
      rows_used: part of the rows of experts' products that hold something.
    """
    return _Program(text, num_devices, rows_used).work


class _Program:
    def __init__(self, text: str, num_devices: int, rows_used: float):
        self._num_devices, self._rows_used = num_devices, rows_used
        self._computations, entry = _parse(text)
        self.work = self._of_computation(entry)

    @functools.cache  # noqa: B019  it lives as long as the program is read
    def _of_computation(self, name: str) -> ProgramCost:
        work = ProgramCost()
        by_name = {instruction.name: instruction for instruction in self._computations[name]}
        channels: set[int] = set()
        for instruction in by_name.values():
            part = self._of_instruction(instruction, by_name)
            if instruction.opcode == "fusion":
                for collective in [c for c in part.collectives if c.channel in channels]:
                    del part.collectives[collective]
                channels |= {collective.channel for collective in part.collectives}
            work.add(part)
        return work

    def _of_instruction(self, i: Instruction, by_name: dict[str, Instruction]) -> ProgramCost:
        if i.opcode in FREE or i.opcode.endswith("-done") or "AsyncCollectiveDone" in i.attributes:
            return ProgramCost()
        if i.opcode == "while":
            return self._of_loop(i)
        if i.opcode == "conditional":
            return self._of_branches(i)
        if i.opcode in ("call", "async-start"):
            work = ProgramCost()
            for callee in i.called("to_apply", "calls"):
                work.add(self._of_computation(callee))
            return work
        work = ProgramCost(hbm_bytes=self._traffic(i, by_name))
        kind = i.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            work.collectives[self._collective(kind, i, by_name)] += 1
        elif i.opcode == "fusion":
            for callee in i.called("calls"):
                inner = self._of_computation(callee)
                work.add(ProgramCost(inner.flops, 0.0, inner.collectives))
        elif i.opcode == "convolution":
            work.flops = _convolution_flops(i, by_name)
        elif i.opcode == "dot":
            work.flops = _dot_flops(i, by_name)
        elif "tpu_custom_call" in i.attributes:
            work.flops = _attention_flops(i, by_name)
            work.flops += self._rows_used * _experts_flops(i, by_name)
        return work

    def _of_loop(self, i: Instruction) -> ProgramCost:
        (condition,), (body,) = i.called("condition"), i.called("body")
        work = ProgramCost()
        work.add(self._of_computation(body), self._trip_count(condition, body, i))
        return work

    def _trip_count(self, condition: str, body: str, loop: Instruction) -> int:
        """Returns how often a loop runs: its counter goes from 0 to what it is compared with."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known.group(1))
        constants = [value for i in self._computations[condition] if (value := _constant(i))]
        return ceil_div(constants[0], self._step(condition, body)) if len(constants) == 1 else 1

    def _step(self, condition: str, body: str) -> int:
        """Returns what a turn adds to a loop's counter: 2 where the compiler has unrolled it."""
        by_name = {i.name: i for i in self._computations[body]}
        (root,) = (i for i in by_name.values() if i.is_root)
        for read in self._computations[condition]:
            place = re.search(r"\bindex=(\d+)", read.attributes)
            if read.opcode == "get-tuple-element" and place:
                counter = by_name.get(root.operands[int(place.group(1))])
                if counter is not None and counter.opcode == "add":
                    added = [_constant(by_name[name]) for name in counter.operands]
                    return next((value for value in added if value), 1)
        return 1

    def _of_branches(self, i: Instruction) -> ProgramCost:
        """Returns the larger of the branches' work."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
        names = re.findall(r"%?([\w.\-]+)", listed.group(1)) if listed else []
        names += i.called("true_computation", "false_computation")
        branches = [self._of_computation(name) for name in names]
        return max(branches, key=lambda work: (work.flops, work.hbm_bytes), default=ProgramCost())

    def _collective(self, kind: str, i: Instruction, by_name: dict[str, Instruction]) -> Collective:
        given = sum(s.num_bytes for name in i.operands for s in by_name[name].shapes)
        made = sum(shape.num_bytes for shape in i.shapes)
        if i.opcode.endswith("-start"):  # Its result names what is given too.
            made = max(shape.num_bytes for shape in i.shapes)
        if kind == "send":
            made = i.shapes[0].num_bytes
        num_bytes = given if kind in ("reduce-scatter", "collective-permute") else made
        channel = re.search(r"channel_id=(\d+)", i.attributes)
        group = _group(i.attributes, self._num_devices)
        return Collective(kind, num_bytes, group, int(channel.group(1)) if channel else 0)

    def _traffic(self, i: Instruction, by_name: dict[str, Instruction]) -> float:
        """Returns the bytes that an instruction reads and writes in main memory."""
        if i.opcode == "fusion":
            (callee,) = i.called("calls")
            inside = self._computations[callee]
            read = sum(
                _bytes_read(parameter, inside, by_name[name])
                for parameter, name in zip(_parameters(inside), i.operands, strict=True)
            )
            return read + _bytes_written(inside, i)
        if i.opcode.removesuffix("-start") in SLICING:
            given = by_name[i.operands[0]].shapes[0]
            part = i.shapes[-2 if i.opcode.endswith("-start") else 0]
            return part.num_bytes * (given.is_in_hbm + part.is_in_hbm)
        if i.opcode in BOTH_ENDS:
            return _in_hbm(i)
        if i.opcode == "dynamic-update-slice":
            return 2 * _in_hbm(by_name[i.operands[1]])
        return _in_hbm(i) + sum(_in_hbm(by_name[name]) for name in i.operands)


def _in_hbm(i: Instruction) -> float:
    return sum(shape.num_bytes for shape in i.shapes if shape.is_in_hbm)


def _parameters(inside: list[Instruction]) -> list[Instruction]:
    found = [i for i in inside if i.opcode == "parameter"]
    return sorted(found, key=lambda i: int(i.attributes.split(")")[0]))


def _bytes_read(parameter: Instruction, inside: list[Instruction], given: Instruction) -> float:
    """Returns the bytes of an operand that a fusion reads: of one that it slices, the slices."""
    whole = _in_hbm(given)
    users = [i for i in inside if parameter.name in i.operands]
    if not users or not whole:
        return 0.0
    sizes = {i.name: sum(shape.num_bytes for shape in i.shapes) for i in inside}
    parts = 0.0
    for user in users:
        if user.opcode in SLICING and user.operands[0] == parameter.name:
            parts += sizes[user.name]
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
            continue  # Written where it lies: what is not replaced is not touched.
        else:
            return whole
    return min(parts, whole)


def _bytes_written(inside: list[Instruction], fusion: Instruction) -> float:
    """Returns the bytes that a fusion writes: of an array that it changes in place, the change."""
    by_name = {i.name: i for i in inside}
    (root,) = (i for i in inside if i.is_root)
    results = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(results) != len(fusion.shapes):
        return _in_hbm(fusion)
    written = 0.0
    for result, shape in zip(results, fusion.shapes, strict=True):
        while result.opcode == "bitcast":
            result = by_name[result.operands[0]]
        if shape.is_in_hbm and result.opcode == "dynamic-update-slice":
            written += sum(s.num_bytes for s in by_name[result.operands[1]].shapes)
        elif shape.is_in_hbm:
            written += shape.num_bytes
    return written


def _dot_flops(i: Instruction, by_name: dict[str, Instruction]) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
    assert contracted is not None
    left = by_name[i.operands[0]].shapes[0].sizes
    axes = [int(axis) for axis in contracted.group(1).split(",") if axis]
    return 2.0 * math.prod(i.shapes[0].sizes) * math.prod(left[axis] for axis in axes)


def _convolution_flops(i: Instruction, by_name: dict[str, Instruction]) -> float:
    """Returns the operations of a convolution, which most matrix products are on a TPU.

    Only places of the window that lie on the input count, not those on padding or in holes.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels is not None
    inputs, kernel, outputs = (dict(zip(word, range(9), strict=False)) for word in labels.groups())
    left, right = (by_name[name].shapes[0].sizes for name in i.operands)
    out = i.shapes[0].sizes
    flops = 2.0 * out[outputs["b"]] * out[outputs["f"]] * right[kernel["i"]]
    spatial = sorted(label for label in outputs if label.isdigit())
    for place, label in enumerate(spatial):
        stride, low, hole_in, hole_out = (
            _window(i.attributes, key, place, default)
            for key, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
        )
        starts = np.arange(out[outputs[label]])[:, None] * stride - low
        places = starts + np.arange(right[kernel[label]]) * hole_out
        last = (left[inputs[label]] - 1) * hole_in
        flops *= np.count_nonzero((places >= 0) & (places <= last) & (places % hole_in == 0))
    return float(flops)


def _window(attributes: str, key: str, place: int, default: int) -> int:
    """Returns a number of a convolution's window, such as the low padding of an axis."""
    found = re.search(rf"window=\{{[^}}]*\b{key}=([\w\-]+)", attributes)
    if not found:
        return default
    return int(found.group(1).split("x")[place].split("_")[0])


def _constant(i: Instruction) -> int | None:
    """Returns the whole number that an instruction is, None if it is none."""
    number = i.attributes.split(")")[0]
    return int(number) if i.opcode == "constant" and number.lstrip("-").isdigit() else None


def _experts_flops(i: Instruction, by_name: dict[str, Instruction]) -> float:
    """Returns the operations of a kernel for rows grouped by expert, 0 for another."""
    if not i.name.startswith(EXPERTS_KERNELS):
        return 0.0
    operands = (shape for name in i.operands for shape in by_name[name].shapes)
    rows = next(shape.sizes for shape in operands if shape.dtype in ("bf16", "f32"))
    return 2.0 * math.prod(rows) * i.shapes[0].sizes[-1]


def _attention_flops(i: Instruction, by_name: dict[str, Instruction]) -> float:
    """Returns the operations of a kernel of splash attention, 0 for another."""
    products = next((n for part, n in SPLASH_PRODUCTS.items() if part in i.name), 0)
    if not i.name.startswith("splash") or not products:
        return 0.0
    # [rows, heads, S, H], rows left out where there is one: queries and keys come first.
    operands = (shape for name in i.operands for shape in by_name[name].shapes)
    floating = [s.sizes for s in operands if s.dtype in ("bf16", "f32") and len(s.sizes) > 2]
    queries, keys = floating[:2]
    return 2.0 * products * math.prod(queries) * keys[-2]


def _group(attributes: str, num_devices: int) -> tuple[int, ...]:
    """Returns the numbers of the devices of the first of a collective's groups."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return int(pairs.group(1)), int(pairs.group(2))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(int(number) for number in listed.group(1).split(","))
    if iota := re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        groups, size, sizes, order = iota.groups()
        sizes = [int(size) for size in sizes.split(",")]
        numbers = np.arange(math.prod(sizes)).reshape(sizes)
        if order:
            numbers = numbers.transpose([int(axis) for axis in order.split(",")])
        return tuple(numbers.reshape(int(groups), int(size))[0].tolist())
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
        sizes = [int(size) for size in axes.values()]
        numbers = np.arange(math.prod(sizes)).reshape(sizes)
        inside = re.findall(r"'(\w+)'", mesh.group(2))
        index = tuple(slice(None) if axis in inside else 0 for axis in axes)
        return tuple(np.atleast_1d(numbers[index]).reshape(-1).tolist())
    return () if "megascale" in attributes else tuple(range(num_devices))


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the instructions of each computation, and the name of the first to run."""
    computations: dict[str, list[Instruction]] = {}
    entry = name = ""
    for line in _logical_lines(text):
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = head.group(2)
            computations[name] = []
            entry = name if head.group(1) else entry
        elif parsed := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line, re.DOTALL):
            computations[name].append(_instruction(parsed))
    return computations, entry


def _logical_lines(text: str) -> Iterator[str]:
    """Yields the lines, those that an attribute's text was broken into joined again."""
    current = ""
    for line in text.splitlines():
        begins = re.match(r"\s+(ROOT )?%?[\w.\-]+ = |(ENTRY )?%?[\w.\-]+ \(|\}|HloModule", line)
        if begins and current:
            yield current
            current = ""
        current += line
    yield current


def _instruction(parsed: re.Match[str]) -> Instruction:
    root, name, rest = parsed.groups()
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    operands, attributes = rest[: end - 1], rest[end:]
    if opcode in ("parameter", "constant"):
        operands, attributes = "", rest  # What stands there is a number, or a value.
    return Instruction(
        name,
        tuple(_shapes(kind)),
        opcode,
        tuple(re.findall(r"%([\w.\-]+)", operands)),
        attributes,
        is_root=bool(root),
    )


def _closing(text: str) -> int:
    """Returns the place after the parenthesis that closes the one at the start."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return place + 1
    return len(text)


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, sizes, layout in re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", text):
        yield Shape(dtype, tuple(int(n) for n in sizes.split(",") if n), "S(" not in layout)
