"""Datasets declared with seqio: where the text comes from, and how it becomes our two formats.

A Task yields text, not tokens: embedding examples as `query` [instruction, text], `pos` and `neg`
(any number of pairs); chats as `text` (user, assistant, ...). `prepare` makes tokens of it, with
the same code that reads a user's text at inference. Only this file and `prepare` need TensorFlow.
"""

from collections.abc import Callable, Iterator, Mapping
import gzip
import json
from pathlib import Path
from typing import Any

import seqio
import tensorflow as tf

from grit_jax.data.sample import SAMPLE_FOLDER

SPLITS = ("train", "held_out")

FEATURE_RANKS = {
    "embedding": {"query": 1, "pos": 2, "neg": 2},
    "generative": {"text": 1},
}


def text_features(kind: str) -> dict[str, seqio.Feature]:
    """Returns the features of a Task of "embedding" or "generative" examples."""
    vocabulary = seqio.PassThroughVocabulary(size=1)
    return {
        name: seqio.Feature(vocabulary, add_eos=False, dtype=tf.string, rank=rank)
        for name, rank in FEATURE_RANKS[kind].items()
    }


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a .jsonl or .jsonl.gz file.

    Raises:
      ValueError: a line is no JSON object; the message names file and line.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            if not isinstance(value, dict):
                raise ValueError(f"{path}, line {number}: not a JSON object")
            yield value


def jsonl_source(kind: str, files: Mapping[str, Path]) -> Any:
    """Returns a seqio source of the original's jsonl format, with one file for each split."""
    ranks = FEATURE_RANKS[kind]
    signature = {
        name: tf.TensorSpec([None] if rank == 1 else [None, 2], tf.string)
        for name, rank in ranks.items()
    }

    def examples(path: Path) -> Iterator[dict[str, tf.Tensor]]:
        for number, raw in enumerate(read_jsonl(path), 1):
            missing = ranks.keys() - raw.keys()
            if missing:
                raise ValueError(f"{path}, line {number}: no {', '.join(sorted(missing))!r}")
            yield {
                name: tf.reshape(tf.constant(raw[name], tf.string), [-1] if rank == 1 else [-1, 2])
                for name, rank in ranks.items()
            }

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # Order is the training schedule's affair.
        return tf.data.Dataset.from_generator(
            lambda: examples(files[split]), output_signature=signature
        )

    return seqio.FunctionDataSource(dataset, splits=tuple(files), caching_permitted=False)


def add_task(
    name: str,
    kind: str,
    source: seqio.DataSourceInterface,
    preprocessors: tuple[Callable[[tf.data.Dataset], tf.data.Dataset], ...] = (),
) -> str:
    """Declares a dataset of "embedding" or "generative" examples, and returns its name.

    Args:
      name: name of the seqio Task.
      kind: "embedding" or "generative".
      source: any seqio source.
      preprocessors: what turns the source's examples into our features.
    """
    seqio.TaskRegistry.add(
        name, source=source, preprocessors=preprocessors, output_features=text_features(kind)
    )
    return name


def kind_of(task: seqio.Task) -> str:
    """Returns "embedding" or "generative".

    Raises:
      ValueError: its features are neither's.
    """
    for kind, ranks in FEATURE_RANKS.items():
        if task.output_features.keys() == ranks.keys():
            return kind
    raise ValueError(
        f"the Task {task.name!r} has features {sorted(task.output_features)}: "
        f"neither {sorted(FEATURE_RANKS['embedding'])} nor {sorted(FEATURE_RANKS['generative'])}"
    )


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


_add_sample()
