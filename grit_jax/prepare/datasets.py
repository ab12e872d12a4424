"""Declares datasets of JSONL files, and mixtures of datasets with their rates.

A Python module declares them with `add_dataset` and `add_mixture`, and `grit-jax prepare --module`
imports it. The embedded sample is declared here. For datasets of seqio, see `seqio_tasks`.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import re
import sys
from typing import Any

from etils import epath

from grit_jax.prepare.sources import Dataset, LinesSource
from grit_jax.sample import SAMPLE_FOLDER
from grit_jax.text.formats import Preprocess, tulu2
from grit_jax.text.jsonl import (
    SUFFIXES,
    JsonlFiles,
    Paths,
    SourceError,
    files_below,
    find_files,
    kind_of_files,
)
from grit_jax.text.kinds import TEXT_KINDS

# Number of files of a folder that are named because they are not read.
MAX_NAMED_FILES = 5

# How often a dataset is drawn from: a number, or a function of the dataset, called once all
# datasets are prepared.
Rate = int | float | Callable[[Any], float]

# Published collections by name, with the function that changes each of their lines.
COLLECTIONS: dict[str, Preprocess | None] = {"medi2": None, "e5": None, "tulu2": tulu2}

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
    """Declares a dataset of .jsonl or .jsonl.gz files.

    Args:
      name: name of the dataset: letters, digits, "_", ".", ":" and "#".
      kind: "embedding" or "generative".
      files: for each split a file or folder, or several; without splits, those of "train".
      preprocess: function from a line's object to one in an accepted format, or to None to skip
        the line.
      held_out: fraction of the lines of "train" that forms the split "held_out".
      seed: seed for choosing these lines.

    Returns:
      The name.

    Raises:
      SourceError: the name is taken or invalid, the kind unknown, or a file does not exist.
    """
    if kind not in TEXT_KINDS:
        raise SourceError(f"dataset {name!r}: kind {kind!r} is not one of {', '.join(TEXT_KINDS)}")
    _check_name(name)
    _check_free("dataset", [name], dataset_names(), "choose another name")
    source = LinesSource(JsonlFiles.find(files, preprocess, held_out, seed))
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
    name: str, path: epath.PathLike, held_out: float = 0.0, seed: int = 0
) -> list[Mixture]:
    """Returns mixtures of the files in a folder: each file is a dataset, with a rate by its size.

    All examples of a file are of one kind. If the folder has files of both kinds, each kind has a
    mixture, `NAME_embedding` and `NAME_chat`. Files in a subfolder `held_out` are the
    held-out split of the files of the same name in the subfolder `train`.

    Args:
      name: name of the mixture; a name in `COLLECTIONS` selects the function for its lines.
      path: a folder, or a single file.
      held_out: fraction of each dataset to hold out.
      seed: seed for choosing held-out lines.

    Raises:
      SourceError: there is no file, a file has no example, or a name is taken or invalid.
    """
    if not re.fullmatch(r"[\w.:#]+", name):
        raise SourceError(f"{name!r} is no name: NAME={path} has letters, digits, '_' and '.'")
    preprocess = COLLECTIONS.get(name)
    datasets: dict[str, list[Dataset]] = {}
    by_dataset = _files_by_dataset(name, epath.Path(path))
    _report_unread_files(epath.Path(path), by_dataset)
    for dataset, files in by_dataset.items():
        kind = kind_of_files(files["train"], preprocess)
        source = LinesSource(JsonlFiles.find(files, preprocess, held_out, seed))
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


def _files_by_dataset(name: str, path: epath.Path) -> dict[str, dict[str, list[epath.Path]]]:
    """Returns the files of each dataset by split."""
    if path.is_file():
        return {name: {"train": find_files(path)}}
    has_splits = (path / "train").is_dir()
    roots = {"train": path / "train" if has_splits else path}
    if has_splits and (path / "held_out").is_dir():
        roots["held_out"] = path / "held_out"
    datasets: dict[str, dict[str, list[epath.Path]]] = {}
    for split, root in roots.items():
        files = find_files(root)
        _check_is_not_beir(files)
        for file in files:
            dataset = f"{name}.{_name_of(file, root)}"
            datasets.setdefault(dataset, {}).setdefault(split, []).append(file)
    for dataset, files in datasets.items():
        if "train" not in files:
            raise SourceError(f"{files['held_out'][0]}: no such file in {path / 'train'}")
        if len(files["train"]) > 1:
            raise SourceError(
                f"{', '.join(map(str, files['train']))}: all would be the dataset {dataset!r}; "
                "rename one"
            )
    return datasets


def _check_is_not_beir(files: Iterable[epath.Path]) -> None:
    """Raises a SourceError for the folder of a BEIR dataset: its lines are not examples."""
    found: dict[epath.Path, set[str]] = {}
    for file in files:
        found.setdefault(file.parent, set()).add(file.name.partition(".")[0])
    for folder, names in found.items():
        if {"corpus", "queries"} <= names:
            raise SourceError(
                f"{folder} is a BEIR dataset (corpus, queries, qrels), which is not read: write "
                'lines {"query": text, "pos": [text]} with the texts of each pair in its qrels'
            )


def _report_unread_files(
    path: epath.Path, datasets: Mapping[str, Mapping[str, Iterable[epath.Path]]]
) -> None:
    if path.is_file():
        return
    read = {file for splits in datasets.values() for files in splits.values() for file in files}
    names = [str(file.relative_to(path)) for file in files_below(path) if file not in read]
    if names:
        shown = ", ".join(names[:MAX_NAMED_FILES])
        more = f" and {len(names) - MAX_NAMED_FILES} more" if len(names) > MAX_NAMED_FILES else ""
        print(f"{path}: not read, as they are not {' or '.join(SUFFIXES)} files: {shown}{more}")


def _name_of(file: epath.Path, root: epath.Path) -> str:
    """Returns a file's path without suffix, restricted to the characters of a name."""
    path = str(file.relative_to(root))
    suffix = next(suffix for suffix in sorted(SUFFIXES, key=len) if path.endswith(suffix))
    return re.sub(r"[^\w.]+", "_", path.removesuffix(suffix))


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
