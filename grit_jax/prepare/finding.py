"""Finds the data files of a folder, and groups them into datasets."""

from collections.abc import Iterable, Sequence
import dataclasses
import re

from etils import epath

from grit_jax.prepare.data_file import (
    FILE_TYPES,
    DataFile,
    is_data_file,
    read_json,
    stem_of_name,
)
from grit_jax.prepare.joined import (
    CORPUS_METADATA,
    find_joined,
    is_nemotron_file,
    nemotron_file,
)
from grit_jax.text.jsonl import SourceError

# Describe the data beside them.
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# One of several files of a dataset, as `datasets` and the Hub name them.
SHARD = re.compile(r"(?P<name>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]{16})?")
OTHER_SPLITS = ("test", "validation", "valid", "dev", "eval")


@dataclasses.dataclass(frozen=True)
class FoundFiles:
    """The data files of a folder.

    Attributes:
      datasets: the files of each dataset, in order, by its path in the folder without suffix; ""
        if the folder is the dataset.
      unread: the files that are not read.
    """

    datasets: dict[str, list[DataFile]]
    unread: list[epath.Path]


def find_datasets(folder: epath.PathLike) -> FoundFiles:
    """Finds the data files of a folder and its subfolders, without hidden ones.

    Every file is a dataset, except that the files NAME-00000-of-00002, NAME-00001-of-00002 are one,
    and so is a folder that `datasets` saved. If there are such files, or folders that `datasets`
    saved, called "train", those called "test" or "validation" beside them are not read.

    Raises:
      SourceError: a file of a dataset is missing, or two files have the same name but for their
        suffix.
    """
    found = FoundFiles({}, [])
    _find_in_folder(epath.Path(folder), epath.Path(folder), found)
    return found


def _find_in_folder(folder: epath.Path, root: epath.Path, found: FoundFiles) -> None:
    names = {path.name: path for path in sorted(folder.iterdir()) if path.name[0] != "."}
    if "dataset_dict.json" in names:
        _find_saved_splits(folder, root, found)
        return
    if {"state.json", "dataset_info.json"} <= names.keys():
        found.datasets[_name_in(folder, root)] = _saved_files(folder)
        return
    if CORPUS_METADATA in names:
        return  # The files of queries name it.
    if joined := find_joined(folder, names):
        found.datasets[_name_in(folder, root)] = [joined[0]]
        found.unread.extend(joined[1])
        return
    has_train = any(_is_split(path, ("train",)) for path in names.values())
    for path in names.values():
        if path.is_dir():
            _find_in_folder(path, root, found)
        elif path.name in METADATA:
            continue
        elif is_nemotron_file(path):
            found.datasets[_dataset_name(path, root)] = [nemotron_file(path)]
        elif not is_data_file(path) or (has_train and _is_split(path, OTHER_SPLITS)):
            found.unread.append(path)
        else:
            _add(found, _dataset_name(path, root), path)
    for files in found.datasets.values():
        _check_shards([file.path for file in files if file.path.parent == folder])


def _is_split(path: epath.Path, splits: Iterable[str]) -> bool:
    shard = SHARD.fullmatch(stem_of_name(path.name))
    return shard is not None and shard["name"] in splits


def _name_in(path: epath.Path, root: epath.Path) -> str:
    name = str(path.relative_to(root))
    return "" if name == "." else name


def _dataset_name(path: epath.Path, root: epath.Path) -> str:
    name = stem_of_name(path.name)
    shard = SHARD.fullmatch(name)
    return _name_in(path.parent / (shard["name"] if shard else name), root)


def _add(found: FoundFiles, name: str, path: epath.Path) -> None:
    files = found.datasets.setdefault(name, [])
    files.append(DataFile(path))
    if len(files) > 1 and not all(SHARD.fullmatch(stem_of_name(file.name)) for file in files):
        raise SourceError(
            f"{', '.join(map(str, files))}: all would be the dataset {name!r}; rename one"
        )


def _check_shards(paths: Sequence[epath.Path]) -> None:
    """Checks that all files NAME-00000-of-00002, ... of a dataset are there."""
    shards = [shard for path in paths if (shard := SHARD.fullmatch(stem_of_name(path.name)))]
    indices = [int(shard["index"]) for shard in shards]
    if shards and indices != list(range(int(shards[0]["count"]))):
        raise SourceError(
            f"{paths[0].parent}: {shards[0]['name']!r} has the files "
            f"{', '.join(path.name for path in paths)}, not {int(shards[0]['count'])} files from "
            "00000 on: copy the missing ones, or remove those of another version"
        )


def _find_saved_splits(folder: epath.Path, root: epath.Path, found: FoundFiles) -> None:
    """Finds the training split of a DatasetDict that was saved by `save_to_disk`."""
    splits = read_json(folder / "dataset_dict.json").get("splits", [])
    if "train" not in splits:
        raise SourceError(
            f"{folder} has the splits {', '.join(splits)}, and not 'train': use "
            f"{folder / splits[0] if splits else folder}"
        )
    found.datasets[_name_in(folder, root)] = _saved_files(folder / "train")
    found.unread.extend(folder / split for split in splits if split != "train")


def _saved_files(folder: epath.Path) -> list[DataFile]:
    """Returns the files of a Dataset that was saved by `save_to_disk`, in order."""
    state = read_json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise SourceError(
            f"{folder} was saved with an index of its rows by an old version of datasets: load it "
            "and save it again with flatten_indices().save_to_disk(...)"
        )
    paths = [folder / file["filename"] for file in state["_data_files"]]
    for path in paths:
        if not path.exists():
            raise SourceError(f"{path} is missing: copy the whole folder again")
    return [DataFile(path) for path in paths]


def find_files(path: epath.PathLike) -> list[DataFile]:
    """Returns the data files of a folder and its subfolders, or `path` itself if it is a file.

    Raises:
      SourceError: there are none.
    """
    path = epath.Path(path)
    if path.is_file():
        return [nemotron_file(path) if is_nemotron_file(path) else DataFile(path)]
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    found = find_datasets(path)
    if not found.datasets:
        other = f", only {found.unread[0].relative_to(path)}" if found.unread else ""
        raise SourceError(
            f"{path} has no file of a known type{other}: these are read: {FILE_TYPES}"
        )
    return [file for files in found.datasets.values() for file in files]
