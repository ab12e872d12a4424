"""A prepared dataset on disk: its folder, its manifest, its lengths, its records.

    FOLDER/MIXTURE.json                      names and rates of the datasets mixed
    FOLDER/DATASET/SPLIT/manifest.json       what is in it and what it was made from
    FOLDER/DATASET/SPLIT/lengths.npz         tokens of every text of every example
    FOLDER/DATASET/SPLIT/*.arrayrecord       the examples

The lengths stand apart, so that a whole global batch can be planned without reading an example.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import hashlib
import io
import json
from typing import Any
import zipfile

from etils import epath
from jaxtyping import Int, UInt64
import numpy as np

from grit_jax.data.examples import ChatExample, EmbeddingExample, Text, from_bytes
from grit_jax.data.storage import PreparedDataError, Records, read_file

FORMAT_VERSION = 2
KINDS = ("embedding", "generative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared dataset holds and what it was made from.

    Attributes:
      kind: "embedding" or "generative".
      count: number of examples.
      longest: tokens of its longest "query" and "passage", or "chat".
      options: how texts were made into token ids (`TextOptions`).
      tokenizer: name, SHA-256 and number of pieces of the tokenizer.
      rejected: number of examples left out, by reason.
      shards: names of the record files.
      format_version: version of this format.
    """

    kind: str
    count: int
    longest: dict[str, int]
    options: dict[str, Any]
    tokenizer: dict[str, Any]
    rejected: dict[str, int]
    shards: list[str]
    format_version: int = FORMAT_VERSION


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of every text of every example, and what tells one text from another.

    Attributes:
      tokens: lengths of all texts, example after example.
      first: index in `tokens` of each example's first text, and one past the last.
      num_positives: number of positives of each example (0 for a chat).
      fingerprints: of all texts, alike for two texts if and only if they are the same to the token.
    """

    tokens: Int[np.ndarray, "texts"]
    first: Int[np.ndarray, "examples+1"]
    num_positives: Int[np.ndarray, "examples"]
    fingerprints: UInt64[np.ndarray, "texts"]

    @classmethod
    def of(cls, examples: Iterable[EmbeddingExample | ChatExample]) -> "Lengths":
        """Returns the lengths of these examples."""
        counts, tokens, num_positives, fingerprints = [0], [], [], []
        for example in examples:
            counts.append(len(example.texts))
            tokens += [len(text) for text in example.texts]
            fingerprints += [fingerprint(text) for text in example.texts]
            is_pair = isinstance(example, EmbeddingExample)
            num_positives.append(len(example.positives) if is_pair else 0)
        return cls(
            np.array(tokens, np.int32),
            np.cumsum(counts),
            np.array(num_positives, np.int32),
            np.array(fingerprints, np.uint64),
        )

    def __getitem__(self, example: int) -> np.ndarray:
        """Returns the lengths of one example's texts, in the order of its `texts`."""
        return self.tokens[self.first[example] : self.first[example + 1]]


def fingerprint(text: Text) -> int:
    """Returns 64 bits that depend on the tokens of a text alone, alike on every machine."""
    digest = hashlib.blake2b(text.tokens.astype("<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


class PreparedDataset:
    """One prepared dataset, read at random.

    Raises:
      PreparedDataError: a part of it is missing or was made by another version.
    """

    def __init__(self, folder: epath.PathLike, name: str, split: str):
        self.name = name
        self.folder = epath.Path(folder) / name / split
        manifest_path = self.folder / "manifest.json"
        stored = json.loads(read_file(manifest_path))
        if stored.get("format_version") != FORMAT_VERSION:
            raise PreparedDataError(f"{manifest_path} is of another version: prepare it again")
        self.manifest = Manifest(**stored)
        self.lengths = self._read_lengths()
        shards = [self.folder / shard for shard in self.manifest.shards]
        self._records = Records(shards, self.manifest.count)

    def _read_lengths(self) -> Lengths:
        path = self.folder / "lengths.npz"
        content = read_file(path)
        try:
            with np.load(io.BytesIO(content)) as arrays:
                return Lengths(**arrays)
        except (ValueError, TypeError, OSError, zipfile.BadZipFile) as error:
            raise PreparedDataError(
                f"{path} is damaged: copy it again, or prepare the dataset again ({error})"
            ) from error

    def __len__(self) -> int:
        return self.manifest.count

    def read(self, indices: Sequence[int]) -> list[Any]:
        """Returns the examples of these numbers: EmbeddingExamples or ChatExamples, by its kind.

        Raises:
          PreparedDataError: a shard is missing or damaged, or not of these lengths; the message
            names it.
        """
        examples = [from_bytes(record) for record in self._records.read(indices)]
        for index, example in zip(indices, examples, strict=True):
            if [len(text) for text in example.texts] != self.lengths[index].tolist():
                raise PreparedDataError(
                    f"{self.folder}: example {index} is not as long as lengths.npz says: files of "
                    "several preparations are mixed; copy the whole folder again"
                )
        return examples


def load_mixture(folder: epath.PathLike, mixture: str, split: str, kind: str, field: str) -> dict:
    """Returns the datasets of a prepared mixture with their rates, as {PreparedDataset: rate}.

    Args:
      folder: the folder given to `grit-jax prepare`.
      mixture: name of the mixture.
      split: "train" or "held_out".
      kind: "embedding" or "generative".
      field: name of the configuration's field that asks for it, for messages.

    Raises:
      PreparedDataError: it is missing, or of the other kind.
    """
    path = epath.Path(folder) / f"{mixture}.json"
    try:
        rates = json.loads(read_file(path))["rates"]
    except PreparedDataError as error:
        raise PreparedDataError(
            f"config.data.{field}={mixture!r}: {error}; prepare it with: "
            f"grit-jax prepare {mixture} --output {folder}"
        ) from error
    datasets = {PreparedDataset(folder, name, split): rate for name, rate in rates.items()}
    for dataset in datasets:
        if dataset.manifest.kind != kind:
            raise PreparedDataError(
                f"config.data.{field}={mixture!r}: {dataset.name} holds "
                f"{dataset.manifest.kind} examples, not {kind} ones"
            )
    return datasets
