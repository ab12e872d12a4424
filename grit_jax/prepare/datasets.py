"""Declares datasets of files, and mixtures of datasets with their rates.

A Python module declares them with `add_dataset` and `add_mixture`, and `grit-jax prepare --module`
imports it. The embedded sample is declared here. For datasets of seqio, see `seqio_tasks`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import re
import sys
from typing import Any

from etils import epath

from grit_jax.prepare.data_file import DataFile
from grit_jax.prepare.files import DataFiles, Paths, kind_of_files
from grit_jax.prepare.finding import find_datasets, find_files
from grit_jax.prepare.hub import is_of
from grit_jax.prepare.sources import Dataset, FilesSource
from grit_jax.sample import SAMPLE_FOLDER
from grit_jax.text.columns import RowReader
from grit_jax.text.formats import Preprocess, tulu2, tulu3
from grit_jax.text.jsonl import SourceError
from grit_jax.text.kinds import TEXT_KINDS

# Number of files of a folder that are named because they are not read.
MAX_NAMED_FILES = 5

# How often a dataset is drawn from: a number, or a function of the dataset, called once all
# datasets are prepared.
Rate = int | float | Callable[[Any], float]

# Published collections by name, with the function that changes each of their lines.
COLLECTIONS: dict[str, Preprocess | None] = {
    "medi2": None,
    "e5": None,
    "tulu2": tulu2,
    "tulu3": tulu3,
}

# Declared in `seqio_tasks`, which is only imported when one of these is asked for.
SEQIO_DATASETS, SEQIO_MIXTURES = ("squad",), ("squad_embedding",)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Datasets that are trained on together.

    Attributes:
      name: name of the mixture.
      rates: the rate of each dataset.
    """

    name: str
    rates: Mapping[Dataset, Rate]

    def rate(self, dataset: Dataset) -> int | float:
        """Returns the rate of a dataset as a number."""
        rate = self.rates[dataset]
        return rate(dataset) if callable(rate) else rate


DATASETS: dict[str, Dataset] = {}
MIXTURES: dict[str, Mixture] = {}


def add_dataset(
    name: str,
    kind: str,
    files: Paths | Mapping[str, Paths],
    preprocess: Preprocess | None = None,
    held_out: float = 0.0,
    seed: int = 0,
) -> str:
    """Declares a dataset of files of any type that `prepare` reads.

    Args:
      name: name of the dataset: letters, digits, "_", ".", ":" and "#".
      kind: "embedding" or "generative".
      files: for each split a file or folder, or several; without splits, those of "train".
      preprocess: function from a row to one in an accepted format, or to None to skip it.
      held_out: fraction of the rows of "train" that forms the split "held_out".
      seed: seed for choosing these rows.

    Returns:
      The name.

    Raises:
      SourceError: the name is taken or invalid, the kind unknown, or a file does not exist.
    """
    if kind not in TEXT_KINDS:
        raise SourceError(f"dataset {name!r}: kind {kind!r} is not one of {', '.join(TEXT_KINDS)}")
    _check_name(name)
    _check_free("dataset", [name], dataset_names(), "choose another name")
    source = FilesSource(DataFiles.find(files, preprocess, held_out, seed))
    DATASETS[name] = Dataset(name, kind, source)
    return name


def add_mixture(name: str, rates: Mapping[str, Rate]) -> str:
    """Declares a mixture of declared datasets.

    Args:
      name: name of the mixture.
      rates: for each dataset by name, how often it is drawn from relative to the others: a number,
        or `by_size`.

    Returns:
      The name.

    Raises:
      SourceError: the name is taken or invalid, or a dataset is not declared.
    """
    _check_name(name)
    _check_free("mixture", [name], mixture_names(), "choose another name")
    for dataset in rates:
        if dataset not in DATASETS:
            raise SourceError(
                f"mixture {name!r}: there is no dataset {dataset!r}; declare it with add_dataset"
            )
    MIXTURES[name] = Mixture(name, {DATASETS[dataset]: rate for dataset, rate in rates.items()})
    return name


def add_collection(
    name: str, path: epath.PathLike, held_out: float = 0.0, seed: int = 0
) -> list[str]:
    """Declares the mixtures of a folder of files, and returns their names.

    See `mixtures_of_files`.
    """
    mixtures = mixtures_of_files(name, path, held_out, seed)
    for mixture in mixtures:
        MIXTURES[mixture.name] = mixture
        DATASETS.update({dataset.name: dataset for dataset in mixture.rates})
    return [mixture.name for mixture in mixtures]


def dataset_names() -> set[str]:
    """Returns the names of all declared datasets, including seqio Tasks if seqio is loaded."""
    seqio = sys.modules.get("seqio")
    return {*DATASETS, *SEQIO_DATASETS, *(seqio.TaskRegistry.names() if seqio else ())}


def mixture_names() -> set[str]:
    """Returns the names of all declared mixtures, including seqio Mixtures if seqio is loaded."""
    seqio = sys.modules.get("seqio")
    return {*MIXTURES, *SEQIO_MIXTURES, *(seqio.MixtureRegistry.names() if seqio else ())}


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[\w.:#]+", name):
        raise SourceError(f"{name!r} is not a name: use letters, digits, '_', '.', ':' and '#'")


def _check_free(what: str, names: Iterable[str], taken: set[str], remedy: str) -> None:
    for name in names:
        if name in taken:
            raise SourceError(f"there is a {what} {name!r} already: {remedy}")


# Number of training examples by dataset, recorded as datasets are prepared.
_sizes: dict[str, int] = {}


def record_size(dataset: str, count: int) -> None:
    """Records a dataset's number of training examples for `by_size`."""
    _sizes[dataset] = count


def by_size(dataset: Any) -> float:
    """The rate of a dataset by its number of training examples, known once it is prepared.

    Args:
      dataset: the `Dataset` or seqio Task.
    """
    count = _sizes.get(dataset.name)
    if not count:
        raise SourceError(f"dataset {dataset.name!r} has no known size: give it a number as rate")
    return float(count)


def mixtures_of_files(
    name: str,
    path: epath.PathLike,
    held_out: float = 0.0,
    seed: int = 0,
    columns: Mapping[str, Sequence[str]] | None = None,
    patterns: Sequence[str] = (),
) -> list[Mixture]:
    """Returns mixtures of the files in a folder, in which each dataset has a rate by its size.

    `find_datasets` says which files are a dataset. All examples of a dataset are of one kind. If
    the folder has both kinds, each kind has a mixture, `NAME_embedding` and `NAME_chat`. Files in a
    subfolder `held_out` are the held-out split of the files of the same name in the subfolder
    `train`.

    Args:
      name: name of the mixture; a name in `COLLECTIONS` selects the function for its rows.
      path: a folder, or a single file.
      held_out: fraction of each dataset to hold out.
      seed: seed for choosing held-out rows.
      columns: the columns to read for each name (see `RowReader`).
      patterns: patterns of the paths in the folder to read; by default all are read.

    Raises:
      SourceError: there is no file, a file has no example, or a name is taken or invalid.
    """
    if not re.fullmatch(r"[\w.:#]+", name):
        raise SourceError(f"{name!r} is no name: NAME={path} has letters, digits, '_' and '.'")
    preprocess = COLLECTIONS.get(name)
    datasets: dict[str, list[Dataset]] = {}
    for dataset, by_split in _files_by_dataset(name, epath.Path(path), patterns).items():
        kind = kind_of_files(by_split["train"], preprocess, RowReader(columns))
        files = {split: tuple(found) for split, found in by_split.items()}
        source = FilesSource(DataFiles(files, preprocess, held_out, seed, columns or {}))
        datasets.setdefault(kind, []).append(Dataset(dataset, kind, source))
    mixtures = [
        Mixture(
            name + (TEXT_KINDS[kind].mixture_suffix if len(datasets) > 1 else ""),
            dict.fromkeys(members, by_size),
        )
        for kind, members in datasets.items()
    ]
    remedy = f"use OTHER_NAME={path}"
    _check_free("mixture", [mixture.name for mixture in mixtures], mixture_names(), remedy)
    for members in datasets.values():
        _check_free("dataset", [member.name for member in members], dataset_names(), remedy)
    return mixtures


def _files_by_dataset(
    name: str, path: epath.Path, patterns: Sequence[str]
) -> dict[str, dict[str, list[DataFile]]]:
    """Returns the files of each dataset by split."""
    if path.is_file() or not path.exists():
        return {name: {"train": find_files(path)}}
    has_splits = (path / "train").is_dir() and not (path / "dataset_dict.json").exists()
    roots = {"train": path / "train" if has_splits else path}
    if has_splits and (path / "held_out").is_dir():
        roots["held_out"] = path / "held_out"
    datasets: dict[str, dict[str, list[DataFile]]] = {}
    for split, root in roots.items():
        find_files(root)  # Raises if there are none.
        found = find_datasets(root)
        _report_unread_files(root, found.unread)
        for own_name, files in found.datasets.items():
            if patterns and not is_of(str(files[0].path.relative_to(path)), patterns):
                continue
            dataset = ".".join(part for part in (name, _valid_name(own_name)) if part)
            if split in datasets.setdefault(dataset, {}):
                raise SourceError(
                    f"{datasets[dataset][split][0]}, {files[0]}: all would be the dataset "
                    f"{dataset!r}; rename one"
                )
            datasets[dataset][split] = files
    if not datasets:
        raise SourceError(f"{path} has no data file that matches {' or '.join(patterns)}")
    for files in datasets.values():
        if "train" not in files:
            raise SourceError(f"{files['held_out'][0]}: no such file in {path / 'train'}")
    return datasets


def _report_unread_files(path: epath.Path, unread: Sequence[epath.Path]) -> None:
    if unread:
        names = [str(file.relative_to(path)) for file in unread]
        shown = ", ".join(names[:MAX_NAMED_FILES])
        more = f" and {len(names) - MAX_NAMED_FILES} more" if len(names) > MAX_NAMED_FILES else ""
        print(f"{path}: not read (of another type, or not for training): {shown}{more}")


def _valid_name(path: str) -> str:
    """Returns a path restricted to the characters of a name."""
    return re.sub(r"[^\w.]+", "_", path)


def _add_sample() -> None:
    """Declares the embedded sample: WordNet senses, Jargon File entries, and chats about both."""
    for name, kind in {
        "wordnet_senses": "embedding",
        "jargon_entries": "embedding",
        "wordnet_chat": "generative",
        "jargon_chat": "generative",
    }.items():
        splits = ("train", "held_out")
        add_dataset(name, kind, {s: SAMPLE_FOLDER / s / f"{name}.jsonl.gz" for s in splits})
    add_mixture("sample_embedding", {"wordnet_senses": 0.8, "jargon_entries": 0.2})
    add_mixture("sample_chat", {"wordnet_chat": 0.75, "jargon_chat": 0.25})


_add_sample()
