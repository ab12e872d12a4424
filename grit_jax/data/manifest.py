"""A prepared dataset on disk: its folder, its manifest, its lengths, its records.

    FOLDER/MIXTURE.json                      names, rates and splits of the datasets mixed
    FOLDER/DATASET/SPLIT/manifest.json       what is in it and what it was made from
    FOLDER/DATASET/SPLIT/lengths.npz         tokens of every text of every example
    FOLDER/DATASET/SPLIT/rejected.jsonl      each line left out, with the reason
    FOLDER/DATASET/SPLIT/*.arrayrecord       the examples

The lengths stand apart, so that a whole global batch can be planned without reading an example.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import json
from typing import Any

from etils import epath
import numpy as np

from grit_jax.data.examples import ChatExample, EmbeddingExample, from_bytes

FORMAT_VERSION = 2
KINDS = ("embedding", "generative")


class PreparedDataError(ValueError):
    """Prepared data is missing or unfit; the message says which and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared dataset holds and what it was made from.

    Attributes:
      kind: "embedding" or "generative".
      count: number of examples.
      longest: tokens of its longest "query" and "passage", or "chat".
      options: how texts were made into token ids (`TextOptions`).
      tokenizer: name, SHA-256 and number of pieces of the tokenizer.
      rejected: number of lines that could not be used, by reason.
      shards: names of the record files.
      features: what a line has: "query", "pos" and "neg", or "text".
      token_lengths: by "query" and "passage", or "chat": the number of texts, and of their tokens
        the mean and the sum.
      instruction_lengths: alike, with the longest: tokens that are read but neither pooled nor
        learned (`<s>`, instructions, users' turns).
      rejected_lines: by reason the first few lines rejected; rejected.jsonl has all of them.
      left_out: number of lines that the dataset's `preprocess` left out.
      source: what it was read from.
      seed: of the choice of held-out lines.
      fingerprints: SHA-256 of all that the content depends on, by name.
      format_version: version of this format.
    """

    kind: str
    count: int
    longest: dict[str, int]
    options: dict[str, Any]
    tokenizer: dict[str, Any]
    rejected: dict[str, int]
    shards: list[str]
    features: list[str] = dataclasses.field(default_factory=list)
    token_lengths: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    instruction_lengths: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    rejected_lines: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    left_out: int = 0
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def read_manifest(path: epath.Path) -> Manifest:
    """Returns the manifest in a file.

    Raises:
      PreparedDataError: there is none, or it is of another version.
    """
    if not path.exists():
        raise PreparedDataError(
            f"{path} does not exist: prepare the dataset first (grit-jax prepare)"
        )
    stored = json.loads(path.read_text())
    if stored.get("format_version") != FORMAT_VERSION:
        raise PreparedDataError(f"{path} is of another version: prepare it again")
    return Manifest(**stored)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of every text of every example.

    Attributes:
      tokens: lengths of all texts, example after example.
      first: index in `tokens` of each example's first text, and one past the last.
      num_positives: number of positives of each example (0 for a chat).
    """

    tokens: np.ndarray
    first: np.ndarray
    num_positives: np.ndarray

    @classmethod
    def of(cls, examples: Iterable[EmbeddingExample | ChatExample]) -> "Lengths":
        """Returns the lengths of these examples."""
        counts, tokens, num_positives = [0], [], []
        for example in examples:
            counts.append(len(example.texts))
            tokens += [len(text) for text in example.texts]
            is_pair = isinstance(example, EmbeddingExample)
            num_positives.append(len(example.positives) if is_pair else 0)
        return cls(np.array(tokens, np.int32), np.cumsum(counts), np.array(num_positives, np.int32))

    @classmethod
    def concatenate(cls, pieces: Sequence["Lengths"]) -> "Lengths":
        """Returns the lengths of the examples of all pieces, one piece after the other."""
        counts = [np.diff(piece.first) for piece in pieces]
        return cls(
            np.concatenate([piece.tokens for piece in pieces]),
            np.cumsum(np.concatenate([[0], *counts])),
            np.concatenate([piece.num_positives for piece in pieces]),
        )

    def __getitem__(self, example: int) -> np.ndarray:
        """Returns the lengths of one example's texts, in the order of its `texts`."""
        return self.tokens[self.first[example] : self.first[example + 1]]


class PreparedDataset:
    """One prepared dataset, read at random.

    Raises:
      PreparedDataError: a part of it is missing or was made by another version.
    """

    def __init__(self, folder: epath.PathLike, name: str, split: str):
        self.name = name
        self.folder = epath.Path(folder) / name / split
        self.manifest = read_manifest(self.folder / "manifest.json")
        for file in ("lengths.npz", *self.manifest.shards):
            if not (self.folder / file).exists():
                raise PreparedDataError(f"{self.folder / file} is missing: prepare it again")
        with (self.folder / "lengths.npz").open("rb") as file:
            self.lengths = Lengths(**np.load(file))
        import grain  # Preparing does without it, in every one of its processes.

        shards = [str(self.folder / shard) for shard in self.manifest.shards]
        self._records: Any = grain.sources.ArrayRecordDataSource(shards)

    def __len__(self) -> int:
        return self.manifest.count

    def read(self, indices: Sequence[int]) -> list[Any]:
        """Returns the examples of these numbers: EmbeddingExamples or ChatExamples, by its kind."""
        return [from_bytes(record) for record in self._records.__getitems__(list(indices))]


def load_mixture(folder: epath.PathLike, mixture: str, split: str, kind: str, field: str) -> dict:
    """Returns the datasets of a prepared mixture with their rates, as {PreparedDataset: rate}.

    Args:
      folder: the folder given to `grit-jax prepare`.
      mixture: name of the mixture.
      split: "train" or "held_out".
      kind: "embedding" or "generative".
      field: name of the configuration's field that asks for it, for messages.

    Raises:
      PreparedDataError: it is missing, of the other kind, or none of its datasets has the split.
    """
    path = epath.Path(folder) / f"{mixture}.json"
    if not path.exists():
        raise PreparedDataError(
            f"config.data.{field}={mixture!r}: {path} does not exist; prepare it first: "
            f"grit-jax prepare {mixture} --output {folder}"
        )
    stored = json.loads(path.read_text())
    splits = stored.get("splits", {})
    # A dataset may be without held-out examples; that it has some is not to be guessed from files.
    rates = {n: rate for n, rate in stored["rates"].items() if split in splits.get(n, [split])}
    if not rates:
        raise PreparedDataError(
            f"config.data.{field}={mixture!r}: no dataset of {path} has a split {split!r}: "
            "prepare it with --held-out FRACTION, or train with --config.evaluation.enabled=False"
        )
    datasets = {PreparedDataset(folder, name, split): rate for name, rate in rates.items()}
    for dataset in datasets:
        if dataset.manifest.kind != kind:
            raise PreparedDataError(
                f"config.data.{field}={mixture!r}: {dataset.name} holds "
                f"{dataset.manifest.kind} examples, not {kind} ones"
            )
    return datasets
