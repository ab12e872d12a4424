"""Python modules of a user's own, which --module names."""

import importlib
import sys
from types import ModuleType


class ModuleError(ValueError):
    """There is no module of that name."""


def import_named(name: str) -> ModuleType:
    """Imports a module that lies in the current folder or is installed.

    Raises:
      ModuleError: there is none of that name.
      ModuleNotFoundError: there is, and it imports another that is not there.
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
