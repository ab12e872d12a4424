"""Integer arithmetic that every part of the program may use."""

from typing import Any


def ceil_div(numerator: Any, denominator: Any) -> Any:
    """Returns the quotient rounded up, for integers or integer arrays."""
    return -(-numerator // denominator)
