"""Builds one dataset: checks whether it is up to date, collects worker results, publishes it."""

from collections import Counter, defaultdict
from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path
from typing import Any

from etils import epath

from grit_jax.data.manifest import (
    MAX_INSTRUCTIONS,
    Manifest,
    PreparedDataError,
    read_manifest,
)
from grit_jax.prepare.sources import Dataset
from grit_jax.prepare.worker import SplitResult, WorkItem
from grit_jax.prepare.writing import MANIFEST, Shard, lines_by_reason, publish, write_dataset
from grit_jax.text import TEXT_VERSION
from grit_jax.text.chat_template import chat_template
from grit_jax.text.examples import TextOptions
from grit_jax.text.kinds import TEXT_KINDS
from grit_jax.text.tokenizer import Tokenizer

# Number of instructions that a manifest names for each stream.
MAX_NAMED_INSTRUCTIONS = 5


@dataclasses.dataclass
class _Split:
    shards: list[Shard] = dataclasses.field(default_factory=list)
    rejected: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    left_out: int = 0
    forms: Counter[str] = dataclasses.field(default_factory=Counter)
    notes: Counter[str] = dataclasses.field(default_factory=Counter)
    unread_fields: Counter[str] = dataclasses.field(default_factory=Counter)
    instructions: dict[str, dict[str, None]] = dataclasses.field(default_factory=dict)

    @property
    def num_examples(self) -> int:
        return sum(len(shard.lengths.first) - 1 for shard in self.shards)


class DatasetBuild:
    """The preparation of one dataset.

    Args:
      dataset: the dataset.
      output: folder of the prepared datasets.
      tokenizer: text to ids.
      options: how texts are tokenized.

    Attributes:
      folder: the dataset's folder in `output`.
      error: why the dataset could not be prepared, or None.
      manifests: the manifest of each split, once it is prepared.
    """

    def __init__(
        self, dataset: Dataset, output: epath.Path, tokenizer: Tokenizer, options: TextOptions
    ):
        self.dataset = dataset
        self.name: str = dataset.name
        self.folder = output / self.name
        self.error: str | None = None
        self.manifests: dict[str, Manifest] = {}
        self._tokenizer, self._options = tokenizer, dataclasses.asdict(options)
        # With the types that JSON restores from a manifest, such as lists for tuples.
        self._source: dict[str, Any] = json.loads(json.dumps(dataset.source.describe()))
        self._splits: dict[str, _Split] = defaultdict(_Split)

    def reason_to_build(self) -> str | None:
        """Returns why the dataset must be prepared, or None if it is up to date."""
        paths = sorted(self.folder.glob(f"*/{MANIFEST}")) if self.folder.exists() else []
        if not paths:
            return "new"
        try:
            manifests = {path.parent.name: read_manifest(path) for path in paths}
        except PreparedDataError:
            return "damaged, or of another version"
        for manifest in manifests.values():
            if changed := self._changes(manifest):
                return f"changed {' and '.join(changed)}"
        missing = [
            name
            for path, manifest in zip(paths, manifests.values(), strict=True)
            for name in ("lengths.npz", *manifest.shards)
            if not (path.parent / name).exists()
        ]
        if missing or not set(self.dataset.source.splits) <= manifests.keys():
            return "incomplete"
        self.manifests = manifests
        return None

    def _changes(self, manifest: Manifest) -> list[str]:
        """Returns what has changed since the data were prepared."""
        options = TEXT_KINDS[self.dataset.kind].options
        # Earlier versions have fewer options, which were at their defaults.
        made_with = dataclasses.asdict(TextOptions()) | manifest.options
        is_same = {
            "tokenizer": manifest.tokenizer["sha256"] == self._tokenizer.fingerprint,
            "options": all(made_with[option] == self._options[option] for option in options),
            "version of the text code": manifest.text_version == TEXT_VERSION,
            "source": manifest.source == self._source,
        }
        return [name for name, same in is_same.items() if not same]

    def add(self, item: WorkItem, results: Mapping[str, SplitResult]) -> None:
        """Adds the results of a work item; items must be added in order."""
        for name, result in results.items():
            split = self._splits[name]
            split.shards += [result.shard] if result.shard else []
            split.left_out += result.left_out
            split.forms += result.forms
            split.notes += result.notes
            split.unread_fields += result.unread_fields
            for stream, instructions in result.instructions.items():
                known = split.instructions.setdefault(stream, {})
                room = MAX_INSTRUCTIONS - len(known)
                known |= dict.fromkeys([i for i in instructions if i not in known][:room])
            split.rejected += [{"file": item.file, **line} for line in result.rejected]

    def finish(self, incomplete: Path, max_rejected: float) -> None:
        """Completes the dataset and moves it to its folder, or sets `error`.

        Args:
          incomplete: folder of the shards.
          max_rejected: fraction of the lines that may be rejected.
        """
        for split in self.dataset.source.splits:
            self.error = self.error or self._check_rejects(split, max_rejected)
        if self.error is None:
            for name, split in self._splits.items():
                if split.shards:
                    self.manifests[name] = self._write(incomplete / self.name / name, split)
            publish(incomplete / self.name, self.folder)

    def _check_rejects(self, split: str, max_rejected: float) -> str | None:
        num_rejected = len(self._splits[split].rejected)
        num_lines = num_rejected + self._splits[split].num_examples
        if split == "train" and "held_out" not in self.dataset.source.splits:
            num_lines += self._splits["held_out"].num_examples  # From the same files.
        folder, reasons = self.folder / split, self.reasons(split)
        if not self._splits[split].shards:
            return f"{folder}: not one of {num_rejected} examples can be used{reasons}"
        if num_rejected > max_rejected * num_lines:
            return (
                f"{folder}: {num_rejected} of {num_lines} examples cannot be used, and "
                f"--max-rejected is {max_rejected:g}{reasons}"
            )
        return None

    def report(self, name: str) -> str:
        """Returns what is said about a split that has been prepared: one line, and its notes."""
        split, manifest = self._splits[name], self.manifests[name]
        forms = " and ".join(f"{count} {form}" for form, count in split.forms.most_common())
        left_out = f", {manifest.left_out} left out" if manifest.left_out else ""
        rejected = f"{len(split.rejected)} rejected{self.reasons(name)}"
        lines = [f"{self.folder / name}: {forms}{left_out}, {rejected}"]
        for stream, cut in manifest.cut.items():
            if cut["texts"]:
                tokens = manifest.token_lengths[stream]
                texts = _share(cut["texts"], tokens["texts"])
                lost = _share(cut["tokens"], tokens["sum"] + cut["tokens"])
                lines.append(
                    f"cut: {texts} {stream} texts, losing {lost} tokens; "
                    f"--{stream}-length {cut['longest']} keeps all"
                )
        lines += [
            f"{count} of {manifest.count} lines: {note}"
            for note, count in split.notes.most_common()
        ]
        if unread := [name for name, _ in split.unread_fields.most_common()]:
            lines.append(f"fields that are not read: {', '.join(_first_few(unread, 10))}")
        return "\n  ".join(lines)

    def reasons(self, split: str) -> str:
        """Returns the reasons for the rejects of a split, with the first lines of each."""
        rejected = self._splits[split].rejected
        named = lines_by_reason(rejected, 3)
        parts = []
        for reason, count in Counter(line["reason"] for line in rejected).most_common():
            details = [*named[reason], *(["..."] if count > 3 else [])]
            too_long = [line for line in rejected if line["reason"] == reason and "tokens" in line]
            if too_long:
                longest = max(too_long, key=lambda line: line["tokens"] - line["limit"])
                details.append(f"up to {longest['tokens']} of {longest['limit']} tokens")
            parts.append(f"{count} {reason} ({', '.join(details)})")
        return f": {'; '.join(parts)}" if parts else ""

    def _vocab_size(self) -> int:
        template = self._options["chat_template"]
        if not template or "chat_template" not in TEXT_KINDS[self.dataset.kind].options:
            return self._tokenizer.vocab_size
        return chat_template(template, self._tokenizer).vocab_size

    def _write(self, folder: Path, split: _Split) -> Manifest:
        files = self.dataset.source.files
        return write_dataset(
            folder,
            self.dataset.kind,
            split.shards,
            split.rejected,
            features=list(TEXT_KINDS[self.dataset.kind].features),
            options=self._options,
            tokenizer={
                "name": self._tokenizer.name,
                "sha256": self._tokenizer.fingerprint,
                "vocab_size": self._vocab_size(),
                "bos_id": self._tokenizer.bos_id,
                "eos_id": self._tokenizer.eos_id,
                "files": sorted(self._tokenizer.files),
            },
            left_out=split.left_out,
            notes=dict(split.notes),
            instructions={
                stream: {"count": len(known), "first": list(known)[:MAX_NAMED_INSTRUCTIONS]}
                for stream, known in split.instructions.items()
            },
            source=self._source,
            seed=files.seed if files else 0,
            text_version=TEXT_VERSION,
        )


def _share(part: float, whole: float) -> str:
    return f"{part:,} of {whole:,} ({part / whole:.0%})"


def _first_few(names: list[str], count: int) -> list[str]:
    return names if len(names) <= count else [*names[:count], "..."]
