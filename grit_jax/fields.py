"""Sections of a configuration: dataclasses whose fields are checked by their annotations.

A field is an int, float, bool, str, a `Literal` of choices or a dict. `Annotated` adds a `Check`.
"""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import difflib
import math
import typing
from typing import Annotated, Any, Literal, NamedTuple


class Check(NamedTuple):
    """A condition on the value of a field.

    Attributes:
      is_valid: returns whether a value meets the condition.
      rule: completes the error message "config.FIELD=VALUE ...".
    """

    is_valid: Callable[[Any], bool]
    rule: str


PositiveInt = Annotated[int, Check(lambda value: value >= 1, "must be at least 1")]
NonNegativeInt = Annotated[int, Check(lambda value: value >= 0, "must be at least 0")]
NonNegativeFloat = Annotated[float, Check(lambda value: value >= 0, "must be at least 0")]
BelowOne = Annotated[float, Check(lambda value: 0 <= value < 1, "must be from 0 to below 1")]


def plain_fields(section: type) -> dict[str, Any]:
    """Returns the annotations of a dataclass's fields that are not dataclasses themselves."""
    hints = typing.get_type_hints(section, include_extras=True)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(section)}
    return {name: hint for name, hint in fields.items() if not dataclasses.is_dataclass(hint)}


def field_type(annotation: Any) -> type:
    """Returns the type of a field's values, such as `str` for a `Literal` of strings."""
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is Literal:
        return type(typing.get_args(annotation)[0])
    return typing.get_origin(annotation) or annotation


def check_section(section: type, values: Any, name: str) -> dict[str, Any]:
    """Checks the values of a section's fields and returns them, integers as floats where needed.

    Args:
      section: the dataclass.
      values: a dictionary with a value for each of `plain_fields(section)`.
      name: the section's full name, such as "config.loss".

    Raises:
      ValueError: a field is unknown, missing, of the wrong type or out of range.
    """
    annotations = plain_fields(section)
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must be a section, not {values!r}")
    for field in values:
        check_known(f"{name}.{field}", annotations)
    checked = {}
    for field, annotation in annotations.items():
        if field not in values:
            raise ValueError(f"{name}.{field} is missing: start from default_config()")
        checked[field] = _check_field(f"{name}.{field}", values[field], annotation)
    return checked


def check_known(name: str, known: Collection[str]) -> None:
    """Checks that the last part of a field's full name is among the known fields of its section.

    Raises:
      ValueError: it is not; the message proposes the closest of them.
    """
    section, _, field = name.rpartition(".")
    if field not in known:
        close = difflib.get_close_matches(field, known, 1)
        hint = f"; did you mean {section}.{close[0]}?" if close else ""
        raise ValueError(f"{name}: there is no such field{hint}")


def _check_field(name: str, value: Any, annotation: Any) -> Any:
    wanted = field_type(annotation)
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        if wanted is dict:
            raise ValueError(f"{name} must be a section, not {value!r}")
        raise ValueError(f"{name}={value!r} must be of type {wanted.__name__}")
    if wanted is float and not math.isfinite(value):
        raise ValueError(f"{name}={value} must be a finite number")
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, Check) and not part.is_valid(value):
            raise ValueError(f"{name}={value!r} {part.rule}")
        if typing.get_origin(part) is Literal and value not in typing.get_args(part):
            choices = ", ".join(typing.get_args(part))
            raise ValueError(f"{name}={value!r} must be one of {choices}")
    return value
