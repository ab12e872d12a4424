"""Integer arithmetic that every part of the program may use."""

from typing import Any


def ceil_div(numerator: Any, denominator: Any) -> Any:
    """Returns the quotient rounded up, for integers or integer arrays."""
    return -(-numerator // denominator)


def round_up(number: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `number`."""
    return ceil_div(number, multiple) * multiple
