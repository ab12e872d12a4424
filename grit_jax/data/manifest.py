"""Prepared datasets on disk: manifest, lengths, records, and the tokenizer they were made with.

    FOLDER/MIXTURE.json                      rates and splits of the datasets of a mixture
    FOLDER/DATASET/SPLIT/manifest.json       what the dataset holds and what it was made from
    FOLDER/DATASET/SPLIT/lengths.npz         number of tokens of every text of every example
    FOLDER/DATASET/SPLIT/rejected.jsonl      each rejected line, with the reason
    FOLDER/DATASET/SPLIT/*.arrayrecord       the examples
    FOLDER/tokenizers/HASH/*                 the files of the tokenizer

The lengths are stored in a separate file, so that a global batch can be planned without reading an
example.
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

from grit_jax.data.storage import PreparedDataError, RecordReader, read_file
from grit_jax.text.examples import Example, Text
from grit_jax.text.kinds import TEXT_KINDS
from grit_jax.text.tokenizer import Tokenizer
from grit_jax.text.tokenizer_files import with_saved_settings

FORMAT_VERSION = 2
# Folder of the saved tokenizers, within a folder of prepared data.
TOKENIZERS = "tokenizers"
# Number of different instructions of a dataset that are counted.
MAX_INSTRUCTIONS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared dataset holds, and what it was made from.

    Attributes:
      kind: a name in `text.kinds.TEXT_KINDS`.
      count: number of examples.
      longest: tokens of the longest text of each stream ("query" and "passage", or "chat").
      options: how texts were tokenized (`TextOptions`).
      tokenizer: name, SHA-256 and vocabulary size of the tokenizer, its BOS and EOS ids, and the
        names of its files if they are saved.
      rejected: number of rejected lines by reason.
      shards: names of the record files.
      features: fields of a line: "query", "pos" and "neg", or "text".
      token_lengths: for each stream the number of texts, and the mean and sum of their tokens.
      instruction_lengths: for each stream the number of texts, and the longest, mean and sum of
        their tokens that are attended to but neither pooled nor predicted (BOS, instructions, user
        turns).
      cut: for each stream the number of texts that were cut to the maximum length, the number of
        tokens they lost, and the length of the longest text before; empty if not recorded.
      instructions: for each stream of texts to embed the number of different instructions ("count",
        at most `MAX_INSTRUCTIONS`) and the first few ("first"); empty if not recorded.
      notes: number of lines by how they were read, where their author may not expect it.
      rejected_lines: for each reason the first few rejected lines; rejected.jsonl has all of them.
      left_out: number of lines that the dataset's `preprocess` dropped.
      source: what the dataset was read from.
      seed: seed of the held-out split.
      text_version: the `TEXT_VERSION` that made the token ids; 0 before there was one.
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
    token_lengths: dict[str, dict[str, int | float]] = dataclasses.field(default_factory=dict)
    instruction_lengths: dict[str, dict[str, int | float]] = dataclasses.field(default_factory=dict)
    cut: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    instructions: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    notes: dict[str, int] = dataclasses.field(default_factory=dict)
    rejected_lines: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    left_out: int = 0
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    text_version: int = 0
    format_version: int = FORMAT_VERSION


def read_manifest(path: epath.Path) -> Manifest:
    """Returns the manifest in a file.

    Raises:
      PreparedDataError: the file is missing, damaged or of another version.
    """
    stored = _read_json(path)
    if stored.get("format_version") != FORMAT_VERSION:
        raise PreparedDataError(f"{path} is of another version: prepare it again")
    stored.pop("fingerprints", None)  # Stored before there was `text_version`.
    return Manifest(**stored)


def _read_json(path: epath.Path) -> dict[str, Any]:
    content = read_file(path)
    try:
        return json.loads(content)
    except ValueError as error:  # Truncated, or zeros that were not yet flushed to disk.
        raise PreparedDataError(
            f"{path} is damaged: copy it again, or prepare it anew, with --redo ({error})"
        ) from error


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Number of tokens, and a fingerprint, of every text of every example.

    Attributes:
      tokens: number of tokens of each text, example after example.
      first: offset of each example's first text in `tokens`, and the total number of texts last.
      num_positives: number of positives of each example (0 for a chat).
      fingerprints: `text_fingerprint` of each text.
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
            fingerprints += [text_fingerprint(text) for text in example.texts]
            num_positives.append(example.num_positives)
        return cls(
            np.array(tokens, np.int32),
            np.cumsum(counts),
            np.array(num_positives, np.int32),
            np.array(fingerprints, np.uint64),
        )

    @classmethod
    def concatenate(cls, parts: Sequence["Lengths"]) -> "Lengths":
        """Returns the lengths of the examples of all parts, in order."""
        counts = [np.diff(part.first) for part in parts]
        return cls(
            np.concatenate([part.tokens for part in parts]),
            np.cumsum(np.concatenate([[0], *counts])),
            np.concatenate([part.num_positives for part in parts]),
            np.concatenate([part.fingerprints for part in parts]),
        )

    @property
    def dataset_fingerprint(self) -> str:
        """A hash of all texts of the dataset, in order."""
        digest = hashlib.sha256(self.fingerprints.tobytes())
        digest.update(self.first.tobytes())
        return digest.hexdigest()[:16]

    def __getitem__(self, example: int) -> Int[np.ndarray, " texts"]:
        """Returns the lengths of one example's texts, in the order of its `texts`."""
        return self.tokens[self.first[example] : self.first[example + 1]]


def text_fingerprint(text: Text) -> int:
    """Returns a 64-bit hash of a text's tokens, the same on every machine."""
    digest = hashlib.blake2b(text.tokens.astype("<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


class PreparedDataset:
    """One split of a prepared dataset, with random access to its examples.

    Raises:
      PreparedDataError: a file is missing, damaged or of another version.
    """

    def __init__(self, folder: epath.PathLike, name: str, split: str):
        self.name = name
        self.folder = epath.Path(folder) / name / split
        self.manifest = read_manifest(self.folder / "manifest.json")
        self.lengths = self._read_lengths()
        shards = [self.folder / shard for shard in self.manifest.shards]
        self._records = RecordReader(shards, self.manifest.count)

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
        """Returns the examples at these indices, of the example class of the dataset's kind.

        Raises:
          PreparedDataError: a shard is missing or damaged, or does not match lengths.npz; the
            message names it.
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


def load_mixture(
    folder: epath.PathLike, mixture: str, split: str, kind: str, field: str
) -> dict[PreparedDataset, int | float]:
    """Returns the datasets of a prepared mixture, with their rates.

    Args:
      folder: the output folder of `grit-jax prepare`.
      mixture: name of the mixture.
      split: "train" or "held_out".
      kind: the kind of text that the mixture must hold, a name in `text.kinds.TEXT_KINDS`.
      field: the field of `config.data` that names the mixture, for error messages.

    Raises:
      PreparedDataError: the mixture is missing, damaged or of another kind, or none of its datasets
        has the split.
    """
    path = epath.Path(folder) / f"{mixture}.json"
    stored = _read_mixture(path, field)
    splits = stored.get("splits", {})
    # The mixture says which splits a dataset has, so that a missing file is an error.
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


def _read_mixture(path: epath.Path, field: str) -> dict[str, Any]:
    try:
        return _read_json(path)
    except PreparedDataError as error:
        remedy = f"prepare it with: grit-jax prepare {path.stem} --output {path.parent}"
        if isinstance(error.__cause__, FileNotFoundError):
            others = _mixture_names(path.parent)
            remedy = f"there are {', '.join(others)}" if others else remedy
        raise PreparedDataError(f"config.data.{field}={path.stem!r}: {error}; {remedy}") from error


def _mixture_names(folder: epath.Path) -> list[str]:
    if not folder.exists():
        return []
    return sorted(path.stem for path in folder.glob("*.json") if path.name[0] != ".")


def mixture_manifests(
    folder: epath.PathLike, mixture: str, field: str
) -> dict[str, list[Manifest]]:
    """Returns the manifests of the datasets of a prepared mixture, by split.

    Args:
      folder: the output folder of `grit-jax prepare`.
      mixture: name of the mixture.
      field: the field of `config.data` that names the mixture, for error messages.

    Raises:
      PreparedDataError: the mixture is missing or damaged.
    """
    folder = epath.Path(folder)
    stored = _read_mixture(folder / f"{mixture}.json", field)
    manifests: dict[str, list[Manifest]] = {}
    for name in stored["rates"]:
        for split in stored.get("splits", {}).get(name, ["train"]):
            manifest = read_manifest(folder / name / split / "manifest.json")
            manifests.setdefault(split, []).append(manifest)
    return manifests


def mixture_average_tokens(folder: epath.PathLike, mixture: str, field: str) -> dict[str, float]:
    """Returns the average tokens of a text of each stream, for datasets sampled at their rates.

    The result is empty if a dataset does not record its average.

    Args:
      folder: the output folder of `grit-jax prepare`.
      mixture: name of the mixture.
      field: the field of `config.data` that names the mixture, for error messages.

    Raises:
      PreparedDataError: the mixture is missing or damaged.
    """
    folder = epath.Path(folder)
    stored = _read_mixture(folder / f"{mixture}.json", field)
    sums: dict[str, float] = {}
    total = 0.0
    for name, rate in stored["rates"].items():
        if "train" not in stored.get("splits", {}).get(name, ["train"]):
            continue
        manifest = read_manifest(folder / name / "train" / "manifest.json")
        if not manifest.token_lengths:
            return {}
        total += rate
        for stream, summary in manifest.token_lengths.items():
            sums[stream] = sums.get(stream, 0.0) + rate * summary["mean"]
    return {stream: value / total for stream, value in sums.items()}


def mixtures_by_kind(folder: epath.PathLike) -> dict[str, list[str]]:
    """Returns the names of the prepared mixtures in a folder, by their kind of text.

    Raises:
      PreparedDataError: a mixture is damaged.
    """
    found: dict[str, list[str]] = {}
    for mixture in _mixture_names(epath.Path(folder)):
        for manifest in next(iter(mixture_manifests(folder, mixture, "folder").values()), [])[:1]:
            found.setdefault(manifest.kind, []).append(mixture)
    return found


def save_tokenizer(tokenizer: Tokenizer, output: epath.Path) -> None:
    """Writes a tokenizer's files into a folder of prepared data, unless they are already there."""
    folder = _tokenizer_folder(output, tokenizer.fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != content:  # It may be truncated.
            path.write_bytes(content)


def saved_tokenizer_files(dataset: PreparedDataset) -> dict[str, bytes]:
    """Returns the files of the tokenizer that a dataset was prepared with.

    The result is empty for data that were prepared before tokenizers were saved.

    Raises:
      PreparedDataError: a file is missing.
    """
    described = dataset.manifest.tokenizer
    folder = _tokenizer_folder(dataset.folder.parent.parent, described["sha256"])
    files = {name: read_file(folder / name) for name in described.get("files", ())}
    return with_saved_settings(files)


def load_saved_tokenizer(dataset: PreparedDataset) -> Tokenizer:
    """Returns the tokenizer that a dataset was prepared with.

    For data that were prepared before tokenizers were saved, it is loaded by its name.

    Raises:
      FileNotFoundError: the tokenizer is not saved, and there is none with its name.
      PreparedDataError: a saved file of the tokenizer is missing.
    """
    files = saved_tokenizer_files(dataset)
    name = dataset.manifest.tokenizer["name"]
    return Tokenizer.of_files(files, name) if files else Tokenizer(name)


def _tokenizer_folder(output: epath.Path, fingerprint: str) -> epath.Path:
    return output / TOKENIZERS / fingerprint[:16]
