"""Integer arithmetic that every part of the program may use."""

from typing import Any


def ceil_div(numerator: Any, denominator: Any) -> Any:
    """Returns the quotient rounded up, for integers or integer arrays."""
    return -(-numerator // denominator)


def round_up(number: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `number`."""
    return ceil_div(number, multiple) * multiple


def bucket_size(number: int, unit: int = 1) -> int:
    """Returns the smallest of `unit` times 1, 2, 3, 4, 6, 8, 12, 16, ... that is at least `number`.

    As sizes of arrays, these values need few compiled programs and at most a third of padding.
    """
    size = unit
    while size < number:
        if size >= 2 * unit and 3 * size // 2 >= number:
            return 3 * size // 2
        size *= 2
    return size
