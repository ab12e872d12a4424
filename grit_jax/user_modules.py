"""Imports the Python modules that users name with --module."""

import importlib
import sys
from types import ModuleType


class ModuleError(ValueError):
    """There is no module of this name."""


def import_named(name: str) -> ModuleType:
    """Imports a module from the current folder or an installed package.

    Raises:
      ModuleError: there is no module of this name.
      ModuleNotFoundError: the module imports another one that does not exist.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ModuleError(
            f"--module {name}: there is no module {error.name} in this folder or installed"
        ) from None
