"""Parses the text of a compiled program (HLO)."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import math
import re

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of an array.

    Attributes:
      dtype: HLO's name of the type.
      sizes: the size of each axis.
      is_in_hbm: whether the array is in the device's main memory.
    """

    dtype: str
    sizes: tuple[int, ...]
    is_in_hbm: bool

    @property
    def num_bytes(self) -> float:
        """The size of the array."""
        width = BYTES.get(self.dtype)
        if width is None:
            bits = re.search(r"\d+", self.dtype)
            width = int(bits.group()) / 8 if bits else 0
        return width * math.prod(self.sizes)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a computation.

    Attributes:
      name: the name of its result.
      shapes: the shape of its result, or of each element of a tuple.
      opcode: its operation.
      operands: the names of its operands.
      attributes: the text after the operands; for a parameter or constant, its number or value.
      is_root: whether its result is the result of the computation.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, *keys: str) -> list[str]:
        """Returns the names of the computations in these attributes."""
        found = (re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes) for key in keys)
        return [match.group(1) for match in found if match]


def parse_hlo(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the instructions of each computation, and the name of the entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry = name = ""
    for line in _logical_lines(text):
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = header.group(2)
            computations[name] = []
            entry = name if header.group(1) else entry
        elif match := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line, re.DOTALL):
            computations[name].append(_parse_instruction(match))
    return computations, entry


def _logical_lines(text: str) -> Iterator[str]:
    """Yields a line for each instruction; an attribute may contain line breaks."""
    current = ""
    for line in text.splitlines():
        begins = re.match(r"\s+(ROOT )?%?[\w.\-]+ = |(ENTRY )?%?[\w.\-]+ \(|\}|HloModule", line)
        if begins and current:
            yield current
            current = ""
        current += line
    yield current


def _parse_instruction(match: re.Match[str]) -> Instruction:
    root, name, rest = match.groups()
    end = _end_of_parentheses(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _end_of_parentheses("(" + rest) - 1
    operands, attributes = rest[: end - 1], rest[end:]
    if opcode in ("parameter", "constant"):
        operands, attributes = "", rest  # Their parentheses hold a number or value, not operands.
    return Instruction(
        name,
        tuple(_parse_shapes(shape)),
        opcode,
        tuple(re.findall(r"%([\w.\-]+)", operands)),
        attributes,
        is_root=bool(root),
    )


def _end_of_parentheses(text: str) -> int:
    """Returns the index after the parenthesis that closes the first one."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return index + 1
    return len(text)


def _parse_shapes(text: str) -> Iterator[Shape]:
    for dtype, sizes, layout in re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", text):
        # A layout with S(n) puts the array into another memory space than HBM.
        yield Shape(
            dtype, tuple(int(size) for size in sizes.split(",") if size), "S(" not in layout
        )
