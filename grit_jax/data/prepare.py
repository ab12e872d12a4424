"""Each Task once from text to token ids, into ArrayRecord shards that training reads at random."""

from collections import Counter
from collections.abc import Sequence
import dataclasses
import functools
import importlib
import json
import multiprocessing.pool
from pathlib import Path
import shutil
import tempfile
from typing import Any

from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
import numpy as np
from rich.progress import track

from grit_jax.data.examples import (
    EXAMPLE_MAKERS,
    ChatExample,
    EmbeddingExample,
    RejectedExample,
    TextOptions,
    to_bytes,
)
from grit_jax.data.manifest import KINDS, Lengths, Manifest, PreparedDataError
from grit_jax.data.tokenizer import Tokenizer

Example = EmbeddingExample | ChatExample
SHARD_NAME = "examples-{:05d}.arrayrecord"
EXAMPLES_A_SHARD = 100_000


def prepare_mixtures(
    names: Sequence[str],
    modules: Sequence[str],
    output: Path,
    tokenizer: Tokenizer,
    options: TextOptions,
    processes: int | None = None,
) -> None:
    """Prepares every Task of these seqio Mixtures, all splits, below `output`.

    A dataset that is already there is replaced once its successor is whole.

    Args:
      names: names of registered Mixtures.
      modules: Python modules to import first, for the Mixtures that they declare.
      output: folder for the prepared datasets (see `grit_jax.data.manifest`).
      tokenizer: text to ids.
      options: how texts become token ids.
      processes: number of processes that tokenise, by default one a core.

    Raises:
      PreparedDataError: a Mixture is unknown, or a dataset has no example left.
    """
    import seqio  # TensorFlow, which nothing but preparing needs.

    for module in ("grit_jax.data.tasks", *modules):
        importlib.import_module(module)
    for name in names:
        if name not in seqio.MixtureRegistry.names():
            known = ", ".join(sorted(seqio.MixtureRegistry.names()))
            raise PreparedDataError(f"unknown mixture {name!r}; there are: {known}")
    # TensorFlow is loaded in this process and not safe to fork; the workers never load it.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for name in names:
            mixture = seqio.MixtureRegistry.get(name)
            for task in mixture.tasks:
                for split in task.splits:
                    _prepare_task(task, split, output, tokenizer, options, pool)
            rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
            _write_atomically(output / f"{name}.json", json.dumps({"rates": rates}) + "\n")


def _prepare_task(
    task: Any,
    split: str,
    output: Path,
    tokenizer: Tokenizer,
    options: TextOptions,
    pool: multiprocessing.pool.Pool,
) -> None:
    from grit_jax.data.tasks import kind_of

    folder = output / task.name / split
    kind = kind_of(task)
    raw_examples = [_to_python(raw) for raw in task.get_dataset(split=split, shuffle=False)]
    make = functools.partial(_make_example, kind, tokenizer.name, options)
    tokenized = pool.imap(make, raw_examples, chunksize=256)
    outcomes = list(track(tokenized, str(folder), total=len(raw_examples), transient=True))
    examples = [outcome for outcome in outcomes if not isinstance(outcome, str)]
    if not examples:
        raise PreparedDataError(f"{folder}: not one of {len(outcomes)} examples can be used")
    manifest = Manifest(
        kind=kind,
        count=len(examples),
        longest=_longest(kind, examples),
        rejected=dict(Counter(outcome for outcome in outcomes if isinstance(outcome, str))),
        shards=[SHARD_NAME.format(n) for n in range(-(-len(examples) // EXAMPLES_A_SHARD))],
        options=dataclasses.asdict(options),
        tokenizer={
            "name": tokenizer.name,
            "sha256": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        },
    )
    _write_dataset(folder, manifest, examples)
    rejected = sum(manifest.rejected.values())
    print(f"{folder}: {manifest.count} examples, {rejected} rejected {manifest.rejected}")


def _to_python(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns a Task's example with plain strings in the place of TensorFlow's."""

    def decode(value: Any) -> Any:
        if isinstance(value, bytes):
            return value.decode("utf-8")
        return [decode(item) for item in value]

    return {name: decode(tensor.numpy().tolist()) for name, tensor in raw.items()}


def _make_example(
    kind: str, tokenizer_name: str, options: TextOptions, raw: dict[str, Any]
) -> Example | str:
    """Returns the example, or the reason for which it is rejected."""
    try:
        return EXAMPLE_MAKERS[kind](_tokenizer(tokenizer_name), raw, options)
    except RejectedExample as reason:
        return str(reason)


_tokenizer = functools.cache(Tokenizer)


def _longest(kind: str, examples: Sequence[Any]) -> dict[str, int]:
    if kind == KINDS[1]:
        return {"chat": max(len(example.chat) for example in examples)}
    return {
        "query": max(len(example.query) for example in examples),
        "passage": max(len(text) for example in examples for text in example.texts[1:]),
    }


def _write_dataset(folder: Path, manifest: Manifest, examples: Sequence[Example]) -> None:
    """Writes a dataset beside its place and moves it there: it is whole, or not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".incomplete-") as temporary:
        incomplete = Path(temporary) / folder.name
        incomplete.mkdir()
        for number, shard in enumerate(manifest.shards):
            # Groups of one record: each read decompresses what it asked for and no more.
            writer = array_record_module.ArrayRecordWriter(str(incomplete / shard), "group_size:1")
            for example in examples[number * EXAMPLES_A_SHARD : (number + 1) * EXAMPLES_A_SHARD]:
                writer.write(to_bytes(example))
            writer.close()
        lengths: dict[str, Any] = vars(Lengths.of(examples))
        np.savez(incomplete / "lengths.npz", **lengths)
        text = json.dumps(dataclasses.asdict(manifest), indent=1)
        (incomplete / "manifest.json").write_text(text + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        incomplete.rename(folder)


def _write_atomically(path: Path, text: str) -> None:
    incomplete = path.with_name(f".incomplete-{path.name}")
    incomplete.write_text(text)
    incomplete.replace(path)
