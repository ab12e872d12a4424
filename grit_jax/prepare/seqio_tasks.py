"""Datasets of seqio: Tasks and Mixtures of any seqio source, such as TFDS.

A Task yields text, not tokens: the features of its kind of text (`TextKind.features`), which are
`query`, `pos` and `neg`, or `text`. `prepare` tokenizes it with the code that tokenizes a user's
text at inference.

Importing this module loads TensorFlow. No other module of `prepare` does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import itertools
import re
from typing import Any

from etils import epath
import seqio
import tensorflow as tf

from grit_jax.prepare import datasets
from grit_jax.prepare.data_file import describe_file
from grit_jax.prepare.datasets import DATASETS, MIXTURES, Mixture, by_size
from grit_jax.prepare.files import DataFiles, Paths
from grit_jax.prepare.sources import (
    Dataset,
    FilesSource,
    Source,
    describe_functions,
)
from grit_jax.prepare.worker import ExamplesWorkItem, WorkItem
from grit_jax.text.columns import RowReader
from grit_jax.text.examples import RejectedExample
from grit_jax.text.formats import Preprocess
from grit_jax.text.jsonl import MEGABYTE, SourceError
from grit_jax.text.kinds import TEXT_KINDS

EXAMPLES_PER_ITEM = 4096


def text_features(kind: str) -> dict[str, seqio.Feature]:
    """Returns the output features of a Task whose examples are of this kind of text."""
    vocabulary = seqio.PassThroughVocabulary(size=1)
    return {
        name: seqio.Feature(vocabulary, add_eos=False, dtype=tf.string, rank=rank)
        for name, rank in TEXT_KINDS[kind].features.items()
    }


class JsonlSource(seqio.DataSource):
    """A seqio source of files.

    `prepare` reads the files without TensorFlow. Other users of seqio get the rows that are valid.
    """

    def __init__(self, kind: str, jsonl: DataFiles):
        super().__init__(splits=jsonl.splits, caching_permitted=False)
        self.kind = kind
        self.jsonl = jsonl

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """False: a split is read in one piece."""
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns one name, since a split is read in one piece."""
        return [split]

    def get_dataset(
        self, split: str = "train", shuffle: bool = False, seed: Any = None, **_: Any
    ) -> tf.data.Dataset:
        """Returns the examples of a split, in the order of the rows."""
        del shuffle, seed  # Training shuffles.
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
                for block in file.read(MEGABYTE):
                    for _, content, parse in block.rows():
                        raw = self._parse(parse)
                        if raw is not None and self.jsonl.split_of(file_split, content) == split:
                            yield self._tensors(raw)

    def _parse(self, parse: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        try:
            raw = parse()
            raw = raw if self.jsonl.preprocess is None else self.jsonl.preprocess(raw)
            if raw is None:
                return None
            line, _ = RowReader(self.jsonl.columns)(raw)
            return TEXT_KINDS[self.kind].to_canonical(line)
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
    """Returns a seqio source of files of any type that `prepare` reads.

    Args:
      kind: "embedding" or "generative".
      files: for each split a file or folder, or several; without splits, those of "train".
      preprocess: function from a row to one in an accepted format, or to None to skip it.
      held_out: fraction of the rows of "train" that forms the split "held_out".
      seed: seed for choosing these rows.

    Raises:
      SourceError: a file or folder does not exist, or `held_out` is not a valid fraction.
    """
    return JsonlSource(kind, DataFiles.find(files, preprocess, held_out, seed))


def add_task(
    name: str,
    kind: str,
    source: seqio.DataSource,
    preprocessors: Sequence[Callable[..., Any]] = (),
) -> str:
    """Declares a dataset as a seqio Task, and returns its name.

    Args:
      name: name of the Task.
      kind: "embedding" or "generative".
      source: any seqio source.
      preprocessors: functions that turn the source's examples into the features of the kind.
    """
    seqio.TaskRegistry.add(
        name,
        source=source,  # pyright: ignore[reportArgumentType]  (seqio's sources are not its protocol's)
        preprocessors=preprocessors,
        output_features=text_features(kind),
    )
    return name


def add_collection(
    name: str, path: epath.PathLike, held_out: float = 0.0, seed: int = 0
) -> list[str]:
    """Declares the mixtures of a folder, also as seqio Mixtures, and returns their names.

    See `grit_jax.prepare.datasets.mixtures_of_files`.
    """
    names = datasets.add_collection(name, path, held_out, seed)
    for mixture in names:
        for dataset in MIXTURES[mixture].rates:
            _add_dataset_to_seqio(dataset)
        _add_mixture_to_seqio(MIXTURES[mixture])
    return names


def _add_dataset_to_seqio(dataset: Dataset) -> None:
    assert dataset.source.files is not None
    add_task(dataset.name, dataset.kind, JsonlSource(dataset.kind, dataset.source.files))


def _add_mixture_to_seqio(mixture: Mixture) -> None:
    rates = [(dataset.name, rate) for dataset, rate in mixture.rates.items()]
    seqio.MixtureRegistry.add(mixture.name, rates)


class SeqioSource(Source):
    """A seqio Task that does not read files by `jsonl_source`."""

    # TFDS does not know the size of a dataset that it has not downloaded yet.
    size = None

    def __init__(self, task: seqio.Task):
        self._task = task

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of the Task."""
        return tuple(self._task.splits)

    def describe(self) -> dict[str, Any]:
        """Returns a description of the Task's source, functions and files."""
        source = self._task.source
        shown = repr(source)
        if isinstance(source, seqio.TfdsDataSource):  # Its repr omits slices such as train[:5].
            shown += repr(source.tfds_dataset)
        described: dict[str, Any] = {
            "source": re.sub(r" at 0x[0-9a-f]+", "", shown),
            "functions": describe_functions([v for v in vars(source).values() if callable(v)]),
            "preprocessors": describe_functions(self._task.preprocessors),
        }
        if isinstance(source, seqio.FileDataSource):
            described["files"] = {
                split: [describe_file(epath.Path(file)) for file in source.list_shards(split)]
                for split in source.splits
            }
        return described

    def work_items(self, dataset: str, num_processes: int) -> Iterator[tuple[WorkItem, int]]:
        """Yields groups of examples, each with the number of examples read up to its end."""
        del num_processes
        number = position = 0
        for split in self._task.splits:
            first = 1
            for examples in self._examples(split):
                position += len(examples)
                item = ExamplesWorkItem(dataset, split, number, split, first, examples)
                yield item, position
                number, first = number + 1, first + len(examples)

    def _examples(self, split: str) -> Iterator[list[dict[str, Any]]]:
        try:
            examples = self._task.get_dataset(split=split, shuffle=False).as_numpy_iterator()
            while batch := list(itertools.islice(examples, EXAMPLES_PER_ITEM)):
                yield [{name: _to_python(value) for name, value in raw.items()} for raw in batch]
        except OSError as error:  # A failed download, or a full disk.
            raise SourceError(f"the Task {self._task.name!r} cannot be read: {error}") from None


def _to_python(value: Any) -> Any:
    """Returns NumPy arrays as lists of bytes."""
    return value.tolist() if hasattr(value, "tolist") else value


def dataset_of_task(task: seqio.Task) -> Dataset:
    """Returns a seqio Task as a dataset to prepare.

    Raises:
      SourceError: the Task has the features of no kind of text, or seqio preprocessors on
        files.
    """
    kind = _kind_of_task(task)
    if not isinstance(task.source, JsonlSource):
        return Dataset(task.name, kind, SeqioSource(task))
    if task.preprocessors:
        raise SourceError(
            f"the Task {task.name!r} has seqio preprocessors, but reads JSONL files: change the "
            "lines by a plain function, jsonl_source(..., preprocess=function)"
        )
    return Dataset(task.name, kind, FilesSource(task.source.jsonl))


def _kind_of_task(task: seqio.Task) -> str:
    for kind in TEXT_KINDS.values():
        if task.output_features.keys() == kind.features.keys():
            return kind.name
    raise SourceError(
        f"the Task {task.name!r} has features {sorted(task.output_features)}, not "
        f"{' or '.join(str(sorted(kind.features)) for kind in TEXT_KINDS.values())}"
    )


def find_seqio_mixture(name: str) -> Mixture | None:
    """Returns a registered seqio Mixture as a mixture to prepare, or None.

    Raises:
      SourceError: see `dataset_of_task`.
    """
    if name not in seqio.MixtureRegistry.names():
        return None
    mixture = seqio.MixtureRegistry.get(name)
    rates = {}
    for task in mixture.tasks:
        # A rate `by_size` is not known before the Tasks are prepared.
        rates[dataset_of_task(task)] = lambda _, task=task: float(mixture.get_rate(task))
    return Mixture(name, rates)


@seqio.map_over_dataset
def squad_example(raw: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Returns the question of an example of SQuAD with the paragraph that answers it."""
    instruction = "Given a question, retrieve the Wikipedia paragraph that answers it"
    return {
        "query": tf.stack([instruction, raw["question"]]),
        "pos": tf.stack(["", raw["context"]])[None],
        "neg": tf.zeros([0, 2], tf.string),
    }


def _add_squad() -> None:
    """Declares SQuAD 1.1 from TFDS, which downloads it when it is prepared."""
    splits = {"train": "train", "held_out": "validation"}
    source = seqio.TfdsDataSource("squad/v1.1:3.0.0", splits=splits)
    add_task("squad", "embedding", source, (squad_example,))
    seqio.MixtureRegistry.add("squad_embedding", [("squad", by_size)])


# The datasets and mixtures that are declared already, for use in seqio Mixtures.
for _dataset in DATASETS.values():
    _add_dataset_to_seqio(_dataset)
for _mixture in MIXTURES.values():
    _add_mixture_to_seqio(_mixture)
_add_squad()
