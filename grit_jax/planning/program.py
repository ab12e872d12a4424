"""The cost of a compiled program on each device: operations, memory traffic, communication.

The cost is computed from the program's text (HLO) after all compiler passes. The body of a loop
counts once for each iteration, while the compiler's own cost analysis counts it once. Memory
traffic is the size of the arrays that an instruction reads from and writes to the device's main
memory; of a sliced array, only the slice. Attention kernels count all pairs of tokens, including
those that a causal mask skips. Kernels of experts count only rows that hold a token.
"""

from __future__ import annotations

from collections import Counter
import dataclasses
import functools
import math
import re

import numpy as np

from grit_jax.arithmetic import ceil_div
from grit_jax.planning.hlo import Instruction, parse_hlo

# Instructions that move no data by themselves.
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
    "send",  # Between slices: each slice has a program of its own.
)
# Number of matrix products of size queries x keys x head dimension in each splash kernel.
SPLASH_PRODUCTS = {"_fwd": 2, "_dq": 3, "_dkv": 4}
# Grouped matrix products: XLA's kernel, and megablox's kernel for the gradient.
EXPERT_KERNELS = ("ragged-dot-none", "tgmm")
SLICING = {"dynamic-slice", "slice", "gather"}
# Asynchronous starts, whose result is a tuple of the source and the destination.
SOURCE_AND_DESTINATION = {"copy-start", "collective-permute-start", "all-gather-start", "send"}

# The instructions of a computation, by their names.
Instructions = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
    """A communication between devices.

    Attributes:
      kind: one of `COLLECTIVES`.
      num_bytes: the size of the whole array that each device gathers, reduces or sends.
      group: the indices of the devices in the first group, or of a sender and its receiver; empty
        between slices.
      channel: the compiler's id. A collective that overlaps with other instructions appears several
        times in a program under the same id.
    """

    kind: str
    num_bytes: float
    group: tuple[int, ...]
    channel: int


@dataclasses.dataclass
class ProgramCost:
    """The cost of a program on one device.

    Attributes:
      flops: operations of matrix products.
      hbm_bytes: bytes read from and written to main memory.
      collectives: how often each collective runs.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: Counter[Collective] = dataclasses.field(default_factory=Counter)

    def add(self, other: ProgramCost, times: int = 1) -> None:
        """Adds the cost of running another program `times` times."""
        self.flops += times * other.flops
        self.hbm_bytes += times * other.hbm_bytes
        for collective, count in other.collectives.items():
            self.collectives[collective] += times * count


def program_cost(text: str, num_devices: int, expert_occupancy: float = 1.0) -> ProgramCost:
    """Returns the cost of a program on each device.

    Args:
      text: the program, as HLO.
      num_devices: the number of devices that the program is compiled for.
      expert_occupancy: the fraction of the rows of experts' products that hold a token.
    """
    return _Program(text, num_devices, expert_occupancy).cost()


class _Program:
    def __init__(self, text: str, num_devices: int, expert_occupancy: float):
        self._num_devices, self._expert_occupancy = num_devices, expert_occupancy
        self._computations, self._entry = parse_hlo(text)

    def cost(self) -> ProgramCost:
        return self._computation_cost(self._entry)

    @functools.cache  # noqa: B019  the object lives for one call of program_cost
    def _computation_cost(self, name: str) -> ProgramCost:
        total = ProgramCost()
        by_name = {instruction.name: instruction for instruction in self._computations[name]}
        channels: set[int] = set()
        for instruction in by_name.values():
            cost = self._instruction_cost(instruction, by_name)
            if instruction.opcode == "fusion":
                for collective in [c for c in cost.collectives if c.channel in channels]:
                    del cost.collectives[collective]
                channels |= {collective.channel for collective in cost.collectives}
            total.add(cost)
        return total

    def _instruction_cost(self, i: Instruction, by_name: Instructions) -> ProgramCost:
        if i.opcode in FREE or i.opcode.endswith("-done") or "AsyncCollectiveDone" in i.attributes:
            return ProgramCost()
        if i.opcode == "while":
            return self._loop_cost(i)
        if i.opcode == "conditional":
            return self._branch_cost(i)
        if i.opcode in ("call", "async-start"):
            cost = ProgramCost()
            for callee in i.called("to_apply", "calls"):
                cost.add(self._computation_cost(callee))
            return cost
        cost = ProgramCost(hbm_bytes=self._traffic(i, by_name))
        kind = i.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            cost.collectives[self._collective(kind, i, by_name)] += 1
        elif i.opcode == "fusion":
            for callee in i.called("calls"):
                inner = self._computation_cost(callee)
                cost.add(ProgramCost(inner.flops, 0.0, inner.collectives))
        elif i.opcode == "convolution":
            cost.flops = _convolution_flops(i, by_name)
        elif i.opcode == "dot":
            cost.flops = _dot_flops(i, by_name)
        elif "tpu_custom_call" in i.attributes:
            cost.flops = _attention_flops(i, by_name)
            cost.flops += self._expert_occupancy * _expert_flops(i, by_name)
        return cost

    def _loop_cost(self, i: Instruction) -> ProgramCost:
        (condition,), (body,) = i.called("condition"), i.called("body")
        cost = ProgramCost()
        cost.add(self._computation_cost(body), self._trip_count(condition, body, i))
        return cost

    def _trip_count(self, condition: str, body: str, loop: Instruction) -> int:
        """Returns how often a loop runs, from its counter's limit and step; 1 if unknown.

        The counter starts at 0 and is compared with the only constant of the condition.
        """
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known.group(1))
        limits = [value for i in self._computations[condition] if (value := _constant(i))]
        return ceil_div(limits[0], self._counter_step(condition, body)) if len(limits) == 1 else 1

    def _counter_step(self, condition: str, body: str) -> int:
        """Returns what an iteration adds to a loop's counter; 2 in a loop unrolled twice."""
        by_name = {i.name: i for i in self._computations[body]}
        (root,) = (i for i in by_name.values() if i.is_root)
        for i in self._computations[condition]:
            index = re.search(r"\bindex=(\d+)", i.attributes)
            if i.opcode == "get-tuple-element" and index:
                counter = by_name.get(root.operands[int(index.group(1))])
                if counter is not None and counter.opcode == "add":
                    added = [_constant(by_name[name]) for name in counter.operands]
                    return next((value for value in added if value), 1)
        return 1

    def _branch_cost(self, i: Instruction) -> ProgramCost:
        """Returns the cost of the most expensive branch of a conditional."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
        names = re.findall(r"%?([\w.\-]+)", listed.group(1)) if listed else []
        names += i.called("true_computation", "false_computation")
        branches = [self._computation_cost(name) for name in names]
        return max(branches, key=lambda cost: (cost.flops, cost.hbm_bytes), default=ProgramCost())

    def _collective(self, kind: str, i: Instruction, by_name: Instructions) -> Collective:
        operand_bytes = sum(s.num_bytes for name in i.operands for s in by_name[name].shapes)
        result_bytes = sum(shape.num_bytes for shape in i.shapes)
        if i.opcode.endswith("-start"):  # The operands are part of its result.
            result_bytes = max(shape.num_bytes for shape in i.shapes)
        if kind == "send":
            result_bytes = i.shapes[0].num_bytes
        is_larger_before = kind in ("reduce-scatter", "collective-permute")
        num_bytes = operand_bytes if is_larger_before else result_bytes
        channel = re.search(r"channel_id=(\d+)", i.attributes)
        group = _first_group(i.attributes, self._num_devices)
        return Collective(kind, num_bytes, group, int(channel.group(1)) if channel else 0)

    def _traffic(self, i: Instruction, by_name: Instructions) -> float:
        """Returns the bytes that an instruction reads from and writes to main memory."""
        if i.opcode == "fusion":
            (callee,) = i.called("calls")
            fused = self._computations[callee]
            read = sum(
                _fusion_bytes_read(parameter, fused, by_name[name])
                for parameter, name in zip(_parameters(fused), i.operands, strict=True)
            )
            return read + _fusion_bytes_written(fused, i)
        if i.opcode.removesuffix("-start") in SLICING:
            source = by_name[i.operands[0]].shapes[0]
            result = i.shapes[-2 if i.opcode.endswith("-start") else 0]
            return result.num_bytes * (source.is_in_hbm + result.is_in_hbm)
        if i.opcode in SOURCE_AND_DESTINATION:
            return _hbm_bytes(i)
        if i.opcode == "dynamic-update-slice":
            return 2 * _hbm_bytes(by_name[i.operands[1]])
        return _hbm_bytes(i) + sum(_hbm_bytes(by_name[name]) for name in i.operands)


def _hbm_bytes(i: Instruction) -> float:
    """Returns the size of the part of an instruction's result that is in main memory."""
    return sum(shape.num_bytes for shape in i.shapes if shape.is_in_hbm)


def _parameters(fused: list[Instruction]) -> list[Instruction]:
    """Returns the parameters of a fusion in the order of its operands."""
    found = [i for i in fused if i.opcode == "parameter"]
    return sorted(found, key=lambda i: int(i.attributes.split(")")[0]))


def _fusion_bytes_read(
    parameter: Instruction, fused: list[Instruction], operand: Instruction
) -> float:
    """Returns the bytes of an operand that a fusion reads: only the slices if it slices it."""
    operand_bytes = _hbm_bytes(operand)
    users = [i for i in fused if parameter.name in i.operands]
    if not users or not operand_bytes:
        return 0.0
    sizes = {i.name: sum(shape.num_bytes for shape in i.shapes) for i in fused}
    slice_bytes = 0.0
    for user in users:
        if user.opcode in SLICING and user.operands[0] == parameter.name:
            slice_bytes += sizes[user.name]
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
            continue  # It is updated in place, which does not read the rest of the array.
        else:
            return operand_bytes
    return min(slice_bytes, operand_bytes)


def _fusion_bytes_written(fused: list[Instruction], fusion: Instruction) -> float:
    """Returns the bytes that a fusion writes: only the slice if it updates an array in place."""
    by_name = {i.name: i for i in fused}
    (root,) = (i for i in fused if i.is_root)
    results = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(results) != len(fusion.shapes):
        return _hbm_bytes(fusion)
    written = 0.0
    for result, shape in zip(results, fusion.shapes, strict=True):
        while result.opcode == "bitcast":
            result = by_name[result.operands[0]]
        if shape.is_in_hbm and result.opcode == "dynamic-update-slice":
            written += sum(s.num_bytes for s in by_name[result.operands[1]].shapes)
        elif shape.is_in_hbm:
            written += shape.num_bytes
    return written


def _dot_flops(i: Instruction, by_name: Instructions) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
    assert contracted is not None
    left = by_name[i.operands[0]].shapes[0].sizes
    axes = [int(axis) for axis in contracted.group(1).split(",") if axis]
    return 2.0 * math.prod(i.shapes[0].sizes) * math.prod(left[axis] for axis in axes)


def _convolution_flops(i: Instruction, by_name: Instructions) -> float:
    """Returns the operations of a convolution, the form of most matrix products on TPUs.

    Only window positions on elements of the input count, not those on padding or dilation holes.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels is not None
    inputs, kernel, outputs = (dict(zip(word, range(9), strict=False)) for word in labels.groups())
    left, right = (by_name[name].shapes[0].sizes for name in i.operands)
    out = i.shapes[0].sizes
    flops = 2.0 * out[outputs["b"]] * out[outputs["f"]] * right[kernel["i"]]
    spatial = sorted(label for label in outputs if label.isdigit())
    for axis, label in enumerate(spatial):
        stride, padding, input_dilation, kernel_dilation = (
            _window(i.attributes, key, axis, default)
            for key, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
        )
        starts = np.arange(out[outputs[label]])[:, None] * stride - padding
        positions = starts + np.arange(right[kernel[label]]) * kernel_dilation
        last = (left[inputs[label]] - 1) * input_dilation
        is_element = (positions >= 0) & (positions <= last) & (positions % input_dilation == 0)
        flops *= np.count_nonzero(is_element)
    return float(flops)


def _window(attributes: str, key: str, axis: int, default: int) -> int:
    """Returns a number of a convolution's window, such as the low padding of an axis."""
    found = re.search(rf"window=\{{[^}}]*\b{key}=([\w\-]+)", attributes)
    if not found:
        return default
    return int(found.group(1).split("x")[axis].split("_")[0])


def _constant(i: Instruction) -> int | None:
    """Returns the value of an integer constant, or None for another instruction."""
    value = i.attributes.split(")")[0]
    return int(value) if i.opcode == "constant" and value.lstrip("-").isdigit() else None


def _expert_flops(i: Instruction, by_name: Instructions) -> float:
    """Returns the operations of a kernel for rows grouped by expert, 0 for another kernel."""
    if not i.name.startswith(EXPERT_KERNELS):
        return 0.0
    operands = (shape for name in i.operands for shape in by_name[name].shapes)
    rows = next(shape.sizes for shape in operands if shape.dtype in ("bf16", "f32"))
    return 2.0 * math.prod(rows) * i.shapes[0].sizes[-1]


def _attention_flops(i: Instruction, by_name: Instructions) -> float:
    """Returns the operations of a kernel of splash attention, 0 for another kernel."""
    num_products = next((n for part, n in SPLASH_PRODUCTS.items() if part in i.name), 0)
    if not i.name.startswith("splash") or not num_products:
        return 0.0
    # The first floating-point operands are queries and keys [rows, heads, S, H]; an axis of one row
    # is left out.
    operands = (shape for name in i.operands for shape in by_name[name].shapes)
    floating = [s.sizes for s in operands if s.dtype in ("bf16", "f32") and len(s.sizes) > 2]
    queries, keys = floating[:2]
    return 2.0 * num_products * math.prod(queries) * keys[-2]


def _first_group(attributes: str, num_devices: int) -> tuple[int, ...]:
    """Returns the indices of the devices in a collective's first group."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return int(pairs.group(1)), int(pairs.group(2))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(int(index) for index in listed.group(1).split(","))
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
        group_axes = re.findall(r"'(\w+)'", mesh.group(2))
        index = tuple(slice(None) if axis in group_axes else 0 for axis in axes)
        return tuple(np.atleast_1d(numbers[index]).reshape(-1).tolist())
    return () if "megascale" in attributes else tuple(range(num_devices))
