"""Datasets declared with seqio: where the text comes from, and how it becomes our two formats.

A Task yields text, not tokens: embedding examples as `query` [instruction, text], `pos` and `neg`
(any number of pairs); chats as `text` (user, assistant, ...). `prepare` makes tokens of it, with
the same code that reads a user's text at inference. Only this file and `sources` need TensorFlow.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import os
import re
from typing import Any

from etils import epath
import seqio
import tensorflow as tf

from grit_jax.sample import SAMPLE_FOLDER
from grit_jax.text.examples import RejectedExample
from grit_jax.text.formats import Preprocess, tulu2
from grit_jax.text.jsonl import (
    MEGABYTE,
    SUFFIXES,
    JsonlFiles,
    SourceError,
    find_files,
    kind_of_files,
    parse_line,
    read_blocks,
)
from grit_jax.text.kinds import TEXT_KINDS

SPLITS = ("train", "held_out")

# Collections that are known by name, and the function that each line of theirs goes through.
COLLECTIONS: dict[str, Preprocess | None] = {"medi2": None, "e5": None, "tulu2": tulu2}

Paths = epath.PathLike | Sequence[epath.PathLike]


def text_features(kind: str) -> dict[str, seqio.Feature]:
    """Returns the features of a Task of "embedding" or "generative" examples."""
    vocabulary = seqio.PassThroughVocabulary(size=1)
    return {
        name: seqio.Feature(vocabulary, add_eos=False, dtype=tf.string, rank=rank)
        for name, rank in TEXT_KINDS[kind].features.items()
    }


class JsonlSource(seqio.DataSource):
    """A seqio source of lines in the original's formats.

    `prepare` does not read it through TensorFlow: it hands the lines of `jsonl` to its processes.
    What seqio reads are the lines that can be used.
    """

    def __init__(self, kind: str, jsonl: JsonlFiles):
        super().__init__(splits=jsonl.splits, caching_permitted=False)
        self.kind = kind
        self.jsonl = jsonl

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Shards are made of examples, not of files."""
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns one name: the split is read in one piece."""
        return [split]

    def get_dataset(
        self, split: str = "train", shuffle: bool = False, seed: Any = None, **_: Any
    ) -> tf.data.Dataset:
        """Returns the examples of a split, in the order of the lines."""
        del shuffle, seed  # Order is the training schedule's affair.
        signature = {
            name: tf.TensorSpec([None] if rank == 1 else [None, 2], tf.string)
            for name, rank in TEXT_KINDS[self.kind].features.items()
        }
        return tf.data.Dataset.from_generator(
            lambda: self._examples(split), output_signature=signature
        )

    def _examples(self, split: str) -> Iterator[dict[str, tf.Tensor]]:
        for file_split, files in self.jsonl.files.items():
            for file in files:
                for block in read_blocks(file, MEGABYTE):
                    for _, line in block.lines():
                        raw = self._read(line)
                        if raw is not None and self.jsonl.split_of(file_split, line) == split:
                            yield self._tensors(raw)

    def _read(self, line: bytes) -> dict[str, Any] | None:
        try:
            raw = parse_line(line)
            raw = raw if self.jsonl.preprocess is None else self.jsonl.preprocess(raw)
            return None if raw is None else TEXT_KINDS[self.kind].to_canonical(raw)
        except RejectedExample:
            return None

    def _tensors(self, raw: dict[str, Any]) -> dict[str, tf.Tensor]:
        return {
            name: tf.reshape(tf.constant(raw[name], tf.string), [-1] if rank == 1 else [-1, 2])
            for name, rank in TEXT_KINDS[self.kind].features.items()
        }


def jsonl_source(
    kind: str,
    files: Paths | Mapping[str, Paths],
    preprocess: Preprocess | None = None,
    held_out: float = 0.0,
    seed: int = 0,
) -> JsonlSource:
    """Returns a seqio source of .jsonl or .jsonl.gz files.

    Args:
      kind: "embedding" or "generative".
      files: for each split a file, a folder, or several; without splits, those of "train".
      preprocess: a function from a line's object to one in our formats, or to None for a line that
        is to be left out.
      held_out: fraction of the lines of "train" that make the split "held_out".
      seed: of the choice of these lines.

    Raises:
      SourceError: a file or folder is not there.
    """
    by_split = files if isinstance(files, Mapping) else {"train": files}
    if held_out and "held_out" in by_split:
        raise SourceError("held_out: a fraction of 'train', or files of its own, but not both")
    if not 0 <= held_out < 1:
        raise SourceError(f"held_out={held_out}: a fraction of the lines, from 0 to below 1")
    found = {
        split: tuple(
            file
            for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)
            for file in find_files(path)
        )
        for split, paths in by_split.items()
    }
    return JsonlSource(kind, JsonlFiles(found, preprocess, held_out, seed))


def add_task(
    name: str,
    kind: str,
    source: seqio.DataSource,
    preprocessors: Sequence[Callable[..., Any]] = (),
) -> str:
    """Declares a dataset of "embedding" or "generative" examples, and returns its name.

    Args:
      name: name of the seqio Task.
      kind: "embedding" or "generative".
      source: any seqio source.
      preprocessors: what turns the source's examples into our features.
    """
    seqio.TaskRegistry.add(
        name,
        source=source,  # pyright: ignore[reportArgumentType]  (seqio's sources are not its protocol's)
        preprocessors=preprocessors,
        output_features=text_features(kind),
    )
    return name


# Training examples of the Tasks that are prepared; a source seldom knows them before.
_sizes: dict[str, int] = {}


def record_size(task: seqio.Task, count: int) -> None:
    """Notes the number of a Task's training examples, for `by_size`."""
    _sizes[task.name] = count


def by_size(task: seqio.Task) -> float:
    """Returns a rate for a Mixture: the number of the Task's training examples.

    It is known once the Task is prepared.
    """
    count = _sizes.get(task.name) or task.source.num_input_examples("train")
    if not count:
        raise SourceError(f"the Task {task.name!r} does not know its size yet: give it a rate")
    return float(count)


def kind_of(task: seqio.Task) -> str:
    """Returns "embedding" or "generative".

    Raises:
      SourceError: its features are neither's.
    """
    for kind in TEXT_KINDS.values():
        if task.output_features.keys() == kind.features.keys():
            return kind.name
    raise SourceError(
        f"the Task {task.name!r} has features {sorted(task.output_features)}: "
        f"expected {' or '.join(str(sorted(kind.features)) for kind in TEXT_KINDS.values())}"
    )


def add_collection(
    name: str, path: epath.PathLike, held_out: float = 0.0, seed: int = 0
) -> list[str]:
    """Declares a Mixture of the files in a folder, each a dataset, and returns its name.

    A file's examples are of one kind. If the files are of both, there are two Mixtures,
    `NAME_embedding` and `NAME_chat`. The rate of a dataset is its number of examples. Files in a
    subfolder `held_out` are the held-out examples of those of the same name in `train`.

    Args:
      name: of the Mixture; one of `COLLECTIONS` has its lines reformatted as that needs.
      path: folder, or a single file.
      held_out: fraction of each dataset to be held out.
      seed: of the choice of held-out lines.

    Raises:
      SourceError: there is no file, or one without an example; or a name is taken.
    """
    if not re.fullmatch(r"[\w.:#]+", name):
        raise SourceError(f"{name!r} is no name: NAME={path} has letters, digits, '_' and '.'")
    preprocess = COLLECTIONS.get(name)
    tasks: dict[str, dict[str, seqio.DataSource]] = {}
    for task, files in _files_by_task(name, epath.Path(path)).items():
        kind = kind_of_files(files["train"], preprocess)
        source = jsonl_source(kind, files, preprocess, held_out, seed)
        tasks.setdefault(kind, {})[task] = source
    suffixes = {"embedding": "_embedding", "generative": "_chat"} if len(tasks) == 2 else {}
    mixtures = {name + suffixes.get(kind, ""): kind for kind in tasks}
    _check_free("mixture", mixtures, seqio.MixtureRegistry, path)
    for own in tasks.values():
        _check_free("dataset", own, seqio.TaskRegistry, path)
    for mixture, kind in mixtures.items():
        own = [add_task(task, kind, source) for task, source in tasks[kind].items()]
        seqio.MixtureRegistry.add(mixture, [(task, by_size) for task in own])
    return list(mixtures)


def _check_free(what: str, names: Iterable[str], registry: Any, path: epath.PathLike) -> None:
    taken = set(registry.names())
    for name in names:
        if name in taken:
            raise SourceError(f"there is a {what} {name!r} already: say OTHER_NAME={path}")


def _files_by_task(name: str, path: epath.Path) -> dict[str, dict[str, list[epath.Path]]]:
    """Returns names of Tasks, and the files of each by split."""
    if path.is_file():
        return {name: {"train": find_files(path)}}
    has_splits = (path / "train").is_dir()
    roots = {"train": path / "train" if has_splits else path}
    if has_splits and (path / "held_out").is_dir():
        roots["held_out"] = path / "held_out"
    tasks: dict[str, dict[str, list[epath.Path]]] = {}
    for split, root in roots.items():
        for file in find_files(root):
            task = f"{name}.{_name_of(file, root)}"
            tasks.setdefault(task, {}).setdefault(split, []).append(file)
    for task, files in tasks.items():
        if "train" not in files:
            raise SourceError(f"{files['held_out'][0]}: no such file in {path / 'train'}")
        if len(files["train"]) > 1:
            raise SourceError(
                f"{', '.join(map(str, files['train']))}: these would all be {task!r}; rename one"
            )
    return tasks


def _name_of(file: epath.Path, root: epath.Path) -> str:
    """Returns a file's path without its suffix, in the characters that seqio allows in a name."""
    path = str(file.relative_to(root))
    suffix = next(suffix for suffix in sorted(SUFFIXES, key=len) if path.endswith(suffix))
    return re.sub(r"[^\w.]+", "_", path.removesuffix(suffix))


def _add_sample() -> None:
    """Declares the embedded sample: WordNet senses and Jargon File entries, and chats of both."""

    def add(name: str, kind: str) -> str:
        files = {split: SAMPLE_FOLDER / split / f"{name}.jsonl.gz" for split in SPLITS}
        return add_task(name, kind, jsonl_source(kind, files))

    seqio.MixtureRegistry.add(
        "sample_embedding",
        [
            (add("wordnet_senses", "embedding"), 0.8),
            (add("jargon_entries", "embedding"), 0.2),
        ],
    )
    seqio.MixtureRegistry.add(
        "sample_chat",
        [(add("wordnet_chat", "generative"), 0.75), (add("jargon_chat", "generative"), 0.25)],
    )


@seqio.map_over_dataset
def squad_example(raw: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Returns the question of an example of SQuAD, and the paragraph that answers it."""
    instruction = "Given a question, retrieve the Wikipedia paragraph that answers it"
    return {
        "query": tf.stack([instruction, raw["question"]]),
        "pos": tf.stack(["", raw["context"]])[None],
        "neg": tf.zeros([0, 2], tf.string),
    }


def _add_squad() -> None:
    """Declares SQuAD 1.1 from TFDS, which `prepare` downloads."""
    splits = {"train": "train", "held_out": "validation"}
    source = seqio.TfdsDataSource("squad/v1.1:3.0.0", splits=splits)
    add_task("squad", "embedding", source, (squad_example,))
    seqio.MixtureRegistry.add("squad_embedding", [("squad", by_size)])


_add_sample()
_add_squad()
