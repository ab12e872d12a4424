"""Finds the mixtures that the sources of `grit-jax prepare` name: mixtures, folders and files."""

from collections.abc import Mapping, Sequence
import re
import sys

import cloudpickle
from etils import epath

from grit_jax.data.manifest import PreparedDataError
from grit_jax.prepare.data_file import SUFFIXES, stem_of_name
from grit_jax.prepare.datasets import (
    COLLECTIONS,
    MIXTURES,
    SEQIO_MIXTURES,
    Mixture,
    mixture_names,
    mixtures_of_files,
)
from grit_jax.prepare.files import DataFiles
from grit_jax.prepare.hub import PREFIX, download_dataset
from grit_jax.text.compression import without_compression_suffix
from grit_jax.text.jsonl import SourceError
from grit_jax.user_modules import import_named


def find_mixtures(
    names: Sequence[str],
    modules: Sequence[str],
    held_out: float,
    seed: int,
    columns: Mapping[str, Sequence[str]] | None = None,
) -> list[Mixture]:
    """Returns the mixtures of these names and paths.

    Args:
      names: names of mixtures, or folders, files and hf:OWNER/NAME as PATH or NAME=PATH.
      modules: Python modules to import first, for the mixtures that they declare.
      held_out: fraction of the datasets of a PATH to hold out.
      seed: seed for choosing held-out rows.
      columns: the columns to read for each name (see `RowReader`), in files.

    Raises:
      PreparedDataError: a mixture is unknown.
      SourceError: a file or folder cannot be used, or two sources have the same name.
    """
    for module in modules:
        # By value, so that workers import neither the module nor what it imports (e.g. seqio).
        cloudpickle.register_pickle_by_value(import_named(module))
    mixtures = [
        mixture
        for name in dict.fromkeys(names)
        for mixture in _find(name, held_out, seed, columns or {})
    ]
    _check_unique(mixtures)
    return mixtures


def _find(
    name: str, held_out: float, seed: int, columns: Mapping[str, Sequence[str]]
) -> list[Mixture]:
    given, path = _name_and_path(name)
    if not given:
        if name in MIXTURES:
            return [MIXTURES[name]]
        # Without seqio loaded, no module can have declared a seqio Mixture.
        if name in SEQIO_MIXTURES or sys.modules.get("seqio"):
            from grit_jax.prepare.seqio_tasks import find_seqio_mixture

            if mixture := find_seqio_mixture(name):
                return [mixture]
    if path.startswith(PREFIX):
        folder, patterns = download_dataset(path)
        given = given or re.sub(r"[^\w.]+", "_", path.removeprefix(PREFIX).partition("/")[2])
        return mixtures_of_files(given, folder, held_out, seed, columns, patterns)
    is_file_name = without_compression_suffix(name).endswith(SUFFIXES)
    if given or "/" in name or is_file_name or epath.Path(name).exists():
        own_name = stem_of_name(epath.Path(path).resolve().name)
        given = given or re.sub(r"[^\w.]+", "_", own_name)
        return mixtures_of_files(given, path, held_out, seed, columns)
    if name in COLLECTIONS:
        raise PreparedDataError(f"{name!r} is read from files: use {name}=FOLDER")
    raise PreparedDataError(
        f"unknown mixture {name!r}, and no such file or folder; there are: "
        f"{', '.join(sorted(mixture_names()))}"
    )


def _name_and_path(source: str) -> tuple[str, str]:
    """Splits NAME=PATH; returns an empty name for a PATH, which may contain "=" itself."""
    name, equals, path = source.partition("=")
    is_path = not equals or "/" in name or name.startswith(PREFIX) or epath.Path(source).exists()
    return ("", source) if is_path else (name, path)


def _check_unique(mixtures: Sequence[Mixture]) -> None:
    """Checks that no two paths give the same name to different mixtures or datasets."""
    found: dict[str, Mixture] = {}
    files: dict[str, DataFiles | None] = {}
    for mixture in mixtures:
        taken = [] if found.setdefault(mixture.name, mixture) is mixture else [mixture.name]
        for dataset in mixture.rates:
            if files.setdefault(dataset.name, dataset.source.files) != dataset.source.files:
                taken.append(dataset.name)
        if taken:
            raise SourceError(f"two sources are both called {taken[0]!r}: use OTHER_NAME=PATH")
