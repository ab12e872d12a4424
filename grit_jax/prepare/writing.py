"""A prepared dataset, written in parts by many processes and put in its place when it is whole."""

from collections import Counter
from collections.abc import Mapping, Sequence
import dataclasses
import json
from pathlib import Path
import shutil
from typing import Any

from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from etils import epath
import numpy as np

from grit_jax.data.manifest import Lengths, Manifest
from grit_jax.text.examples import Example
from grit_jax.text.kinds import TEXT_KINDS

SHARD_NAME = "examples-{:05d}.arrayrecord"
MANIFEST = "manifest.json"
# Lines that a manifest names for each reason.
LINES_NAMED = 20


@dataclasses.dataclass(frozen=True)
class Part:
    """A shard that is written, and what the manifest is to say of it.

    Attributes:
      shard: name of the file.
      lengths: tokens of its texts.
      instruction_lengths: how many tokens of each text are neither pooled nor learned.
    """

    shard: str
    lengths: Lengths
    instruction_lengths: np.ndarray


def write_part(folder: Path, number: int, examples: Sequence[Example]) -> Part:
    """Writes one shard and returns what to remember of it.

    Raises:
      OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shard = SHARD_NAME.format(number)
    try:
        # Groups of one record: each read decompresses what it asked for and no more.
        writer = array_record_module.ArrayRecordWriter(str(folder / shard), "group_size:1")
        for example in examples:
            writer.write(example.to_bytes())
        writer.close()
    except RuntimeError as error:  # Its word for a disk that is full, among others.
        raise OSError(str(error)) from None
    unread = [len(text) - np.count_nonzero(text.mask) for e in examples for text in e.texts]
    return Part(shard, Lengths.of(examples), np.array(unread, np.int32))


def write_dataset(
    folder: Path,
    kind: str,
    parts: Sequence[Part],
    rejected: Sequence[Mapping[str, Any]] = (),
    **described: Any,
) -> Manifest:
    """Writes beside the shards of a dataset what makes it whole, its manifest last.

    Args:
      folder: where the shards are.
      kind: "embedding" or "generative".
      parts: the shards, in the order of their examples.
      rejected: the lines left out, each with "file", "line" and "reason".
      **described: further fields of the `Manifest`.
    """
    lengths = Lengths.concatenate([part.lengths for part in parts])
    instructions = np.concatenate([part.instruction_lengths for part in parts])
    tokens = _by_stream(kind, lengths, lengths.tokens)
    manifest = Manifest(
        kind=kind,
        count=len(lengths.first) - 1,
        longest={stream: int(own.max()) for stream, own in tokens.items()},
        shards=[part.shard for part in parts],
        token_lengths={stream: _summary(own) for stream, own in tokens.items()},
        instruction_lengths={
            stream: {"longest": int(own.max()), **_summary(own)}
            for stream, own in _by_stream(kind, lengths, instructions).items()
        },
        rejected=dict(Counter(line["reason"] for line in rejected)),
        rejected_lines=lines_by_reason(rejected, LINES_NAMED),
        **described,
    )
    arrays: dict[str, Any] = vars(lengths)
    np.savez(folder / "lengths.npz", **arrays)
    with (folder / "rejected.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in rejected)
    text = json.dumps(dataclasses.asdict(manifest), indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def lines_by_reason(rejected: Sequence[Mapping[str, Any]], at_most: int) -> dict[str, list[str]]:
    """Returns for each reason the first lines rejected, as FILE:LINE."""
    named: dict[str, list[str]] = {}
    for line in rejected:
        lines = named.setdefault(line["reason"], [])
        if len(lines) < at_most:
            lines.append(f"{line['file']}:{line['line']}")
    return named


def _by_stream(kind: str, lengths: Lengths, values: np.ndarray) -> dict[str, np.ndarray]:
    """Splits an array with a value per text into one array per stream."""
    index_in_example = np.arange(len(values)) - np.repeat(
        lengths.first[:-1], np.diff(lengths.first)
    )
    indices = np.arange(index_in_example.max() + 1)
    return {
        stream: values[np.isin(index_in_example, indices[texts])]
        for stream, texts in TEXT_KINDS[kind].streams.items()
    }


def _summary(values: np.ndarray) -> dict[str, float]:
    return {"texts": len(values), "mean": round(float(values.mean()), 2), "sum": int(values.sum())}


def is_remote(path: epath.PathLike) -> bool:
    """Says whether a path is on a bucket, where a folder cannot be renamed."""
    return "://" in str(path)


def put_in_place(incomplete: Path, folder: epath.Path) -> None:
    """Moves a whole dataset with its splits to `folder`, in the place of what is there.

    On a bucket it is copied, and the manifests, without which nothing is read, come last.
    """
    if not is_remote(folder):
        if folder.exists():
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        incomplete.rename(folder)
        return
    if folder.exists():
        for manifest in folder.glob(f"*/{MANIFEST}"):
            manifest.unlink()
        folder.rmtree()
    files = [file for file in sorted(incomplete.rglob("*")) if file.is_file()]
    for file in sorted(files, key=lambda file: file.name == MANIFEST):
        target = folder / str(file.relative_to(incomplete))
        target.parent.mkdir(parents=True, exist_ok=True)
        epath.Path(file).copy(target)
    shutil.rmtree(incomplete)


def write_atomically(path: epath.Path, text: str) -> None:
    """Writes a file that is whole or not there."""
    if is_remote(path):  # A file appears on a bucket when it is closed.
        path.write_text(text)
        return
    incomplete = path.with_name(f".incomplete-{path.name}")
    incomplete.write_text(text)
    incomplete.replace(path)
