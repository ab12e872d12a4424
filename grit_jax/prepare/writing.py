"""Writes a prepared dataset: the shards, then the manifest, and moves it to its final folder."""

from collections import Counter
from collections.abc import Mapping, Sequence
import dataclasses
import json
from pathlib import Path
import shutil
from typing import Any

from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from etils import epath
from jaxtyping import Int, Int32
import numpy as np

from grit_jax.data.manifest import Lengths, Manifest
from grit_jax.text.examples import Example
from grit_jax.text.kinds import TEXT_KINDS

SHARD_NAME = "examples-{:05d}.arrayrecord"
MANIFEST = "manifest.json"
# Number of rejected lines that a manifest names for each reason.
MAX_NAMED_LINES = 20


@dataclasses.dataclass(frozen=True)
class Shard:
    """A written shard.

    Attributes:
      file_name: name of the file.
      lengths: tokens of its texts.
      instruction_lengths: number of tokens of each text that the mask excludes.
      num_cut: number of tokens that each text lost.
    """

    file_name: str
    lengths: Lengths
    instruction_lengths: Int32[np.ndarray, " texts"]
    num_cut: Int32[np.ndarray, " texts"]


def write_shard(folder: Path, number: int, examples: Sequence[Example]) -> Shard:
    """Writes a shard.

    Raises:
      OSError: the file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file_name = SHARD_NAME.format(number)
    try:
        # With groups of one record, reading an example decompresses that example only.
        writer = array_record_module.ArrayRecordWriter(str(folder / file_name), "group_size:1")
        for example in examples:
            writer.write(example.to_bytes())
        writer.close()
    except RuntimeError as error:  # E.g. a full disk.
        raise OSError(str(error)) from None
    texts = [text for example in examples for text in example.texts]
    masked = np.array([len(text) - np.count_nonzero(text.mask) for text in texts], np.int32)
    num_cut = np.array([text.num_cut for text in texts], np.int32)
    return Shard(file_name, Lengths.of(examples), masked, num_cut)


def write_dataset(
    folder: Path,
    kind: str,
    shards: Sequence[Shard],
    rejected: Sequence[Mapping[str, Any]] = (),
    **fields: Any,
) -> Manifest:
    """Writes the files that complete a dataset next to its shards, the manifest last.

    Args:
      folder: the folder of the shards.
      kind: name of the kind of text.
      shards: the shards, in the order of their examples.
      rejected: the rejected lines, each with "file", "line", "reason" and details of the reason.
      **fields: further fields of the `Manifest`.
    """
    lengths = Lengths.concatenate([shard.lengths for shard in shards])
    instructions = np.concatenate([shard.instruction_lengths for shard in shards])
    num_cut = np.concatenate([shard.num_cut for shard in shards])
    tokens = _by_stream(kind, lengths, lengths.tokens)
    whole = _by_stream(kind, lengths, lengths.tokens + num_cut)
    manifest = Manifest(
        kind=kind,
        count=len(lengths.first) - 1,
        longest={stream: int(counts.max()) for stream, counts in tokens.items()},
        shards=[shard.file_name for shard in shards],
        token_lengths={stream: _summary(counts) for stream, counts in tokens.items()},
        instruction_lengths={
            stream: {"longest": int(counts.max()), **_summary(counts)}
            for stream, counts in _by_stream(kind, lengths, instructions).items()
        },
        cut={
            stream: {
                "texts": int(np.count_nonzero(cut)),
                "tokens": int(cut.sum()),
                "longest": int(whole[stream].max()),
            }
            for stream, cut in _by_stream(kind, lengths, num_cut).items()
        },
        rejected=dict(Counter(line["reason"] for line in rejected)),
        rejected_lines=lines_by_reason(rejected, MAX_NAMED_LINES),
        **fields,
    )
    arrays: dict[str, Any] = vars(lengths)
    np.savez(folder / "lengths.npz", **arrays)
    with (folder / "rejected.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in rejected)
    text = json.dumps(dataclasses.asdict(manifest), indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def lines_by_reason(rejected: Sequence[Mapping[str, Any]], max_lines: int) -> dict[str, list[str]]:
    """Returns the first `max_lines` rejected lines of each reason, as FILE:LINE."""
    named: dict[str, list[str]] = {}
    for line in rejected:
        lines = named.setdefault(line["reason"], [])
        if len(lines) < max_lines:
            lines.append(f"{line['file']}:{line['line']}")
    return named


def _by_stream(
    kind: str, lengths: Lengths, values: Int[np.ndarray, " texts"]
) -> dict[str, Int[np.ndarray, " stream_texts"]]:
    """Splits an array with one value per text into one array per stream."""
    first_of_each = np.repeat(lengths.first[:-1], np.diff(lengths.first))
    index_in_example = np.arange(len(values)) - first_of_each
    indices = np.arange(index_in_example.max() + 1)
    return {
        stream: values[np.isin(index_in_example, indices[texts])]
        for stream, texts in TEXT_KINDS[kind].streams.items()
    }


def _summary(values: Int[np.ndarray, " texts"]) -> dict[str, int | float]:
    return {"texts": len(values), "mean": round(float(values.mean()), 2), "sum": int(values.sum())}


def is_remote(path: epath.PathLike) -> bool:
    """Returns whether a path is in a bucket, where folders cannot be renamed."""
    return "://" in str(path)


def publish(incomplete: Path, folder: epath.Path) -> None:
    """Moves a complete dataset with its splits to `folder`, replacing what is there.

    In a bucket the files are copied. The manifests come last, because a dataset without a manifest
    is not read.
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
