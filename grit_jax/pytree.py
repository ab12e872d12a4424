"""Dataclasses that are JAX pytrees."""

import dataclasses
from typing import dataclass_transform

import jax


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def pytree_dataclass[Class: type](cls: Class) -> Class:
    """Makes a class a frozen dataclass that is registered as a pytree.

    Fields with `metadata={"static": True}` are static. Runtime type checkers do not check the
    fields: JAX makes copies with shapes, shardings or None instead of arrays.
    """
    cls = jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))
    cls.__no_type_check__ = True
    return cls
