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
import hashlib
import io
import json
from typing import Any
import zipfile

from etils import epath
from jaxtyping import Int, UInt64
import numpy as np

from grit_jax.data.storage import PreparedDataError, Records, read_file
from grit_jax.text.examples import Example, Text
from grit_jax.text.kinds import TEXT_KINDS

FORMAT_VERSION = 2
# Before `text_version`, manifests held a hash of the source code. This one made version 1.
CODE_OF_TEXT_VERSION_1 = "cec6b6be94e1017baa466e05c5a9409b35e035f0ecda1bd8fba053d4c2c603f5"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared dataset holds and what it was made from.

    Attributes:
      kind: "embedding" or "generative".
      count: number of examples.
      longest: tokens of its longest "query" and "passage", or "chat".
      options: how texts were made into token ids (`TextOptions`).
      tokenizer: name, SHA-256 and number of pieces of the tokenizer, what begins and ends a
        text, and the files of it that are kept.
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
      text_version: the `TEXT_VERSION` that made the token ids; 0 if unknown.
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
    text_version: int = 0
    format_version: int = FORMAT_VERSION


def read_manifest(path: epath.Path) -> Manifest:
    """Returns the manifest in a file.

    Raises:
      PreparedDataError: there is none, or it is damaged or of another version.
    """
    stored = _read_json(path)
    if stored.get("format_version") != FORMAT_VERSION:
        raise PreparedDataError(f"{path} is of another version: prepare it again")
    code = stored.pop("fingerprints", {}).get("templates")
    if code is not None:
        stored["text_version"] = 1 if code == CODE_OF_TEXT_VERSION_1 else 0
    return Manifest(**stored)


def _read_json(path: epath.Path) -> dict[str, Any]:
    content = read_file(path)
    try:
        return json.loads(content)
    except ValueError as error:  # Cut off, or zeros in the place of what was not yet on the disk.
        raise PreparedDataError(
            f"{path} is damaged: copy it again, or prepare it anew, with --redo ({error})"
        ) from error


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of every text of every example, and what tells one text from another.

    Attributes:
      tokens: lengths of all texts, example after example.
      first: index in `tokens` of each example's first text, and one past the last.
      num_positives: number of positives of each example (0 for a chat).
      fingerprints: of all texts, alike for two texts if and only if they are the same to the token.
    """

    tokens: Int[np.ndarray, " texts"]
    first: Int[np.ndarray, " offsets"]
    num_positives: Int[np.ndarray, " examples"]
    fingerprints: UInt64[np.ndarray, " texts"]

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Lengths":
        """Returns the lengths of these examples."""
        counts, tokens, num_positives, fingerprints = [0], [], [], []
        for example in examples:
            counts.append(len(example.texts))
            tokens += [len(text) for text in example.texts]
            fingerprints += [fingerprint(text) for text in example.texts]
            num_positives.append(example.num_positives)
        return cls(
            np.array(tokens, np.int32),
            np.cumsum(counts),
            np.array(num_positives, np.int32),
            np.array(fingerprints, np.uint64),
        )

    @classmethod
    def concatenate(cls, pieces: Sequence["Lengths"]) -> "Lengths":
        """Returns the lengths of the examples of all pieces, one piece after the other."""
        counts = [np.diff(piece.first) for piece in pieces]
        return cls(
            np.concatenate([piece.tokens for piece in pieces]),
            np.cumsum(np.concatenate([[0], *counts])),
            np.concatenate([piece.num_positives for piece in pieces]),
            np.concatenate([piece.fingerprints for piece in pieces]),
        )

    @property
    def fingerprint(self) -> str:
        """What tells the texts of one dataset, and their order, from those of another."""
        digest = hashlib.sha256(self.fingerprints.tobytes())
        digest.update(self.first.tobytes())
        return digest.hexdigest()[:16]

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
        self.manifest = read_manifest(self.folder / "manifest.json")
        self.lengths = self._read_lengths()
        shards = [self.folder / shard for shard in self.manifest.shards]
        self._records = Records(shards, self.manifest.count)

    def _read_lengths(self) -> Lengths:
        path = self.folder / "lengths.npz"
        content = read_file(path)
        try:
            with np.load(io.BytesIO(content)) as arrays:
                return Lengths(**arrays)
        except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise PreparedDataError(
                f"{path} is damaged: copy it again, or prepare it anew, with --redo ({error})"
            ) from error

    def __len__(self) -> int:
        return self.manifest.count

    def read(self, indices: Sequence[int]) -> list[Any]:
        """Returns the examples of these numbers: EmbeddingExamples or ChatExamples, by its kind.

        Raises:
          PreparedDataError: a shard is missing or damaged, or not of these lengths; the message
            names it.
        """
        from_bytes = TEXT_KINDS[self.manifest.kind].example.from_bytes
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
      PreparedDataError: it is missing, damaged or of the other kind, or none of its datasets has
        the split.
    """
    path = epath.Path(folder) / f"{mixture}.json"
    try:
        stored = _read_json(path)
    except PreparedDataError as error:
        remedy = f"prepare it with: grit-jax prepare {mixture} --output {folder}"
        if isinstance(error.__cause__, FileNotFoundError):
            others = sorted(p.stem for p in path.parent.glob("*.json") if p.name[0] != ".")
            remedy = f"there are {', '.join(others)}" if others else remedy
        raise PreparedDataError(f"config.data.{field}={mixture!r}: {error}; {remedy}") from error
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
