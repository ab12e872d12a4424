"""One Task of a run: whether there is anything to do, what came of its pieces, its end."""

from collections import Counter, defaultdict
from collections.abc import Mapping
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etils import epath

from grit_jax.data.manifest import Manifest, PreparedDataError, read_manifest
from grit_jax.prepare.fingerprints import fingerprints
from grit_jax.prepare.worker import SplitResult, WorkItem
from grit_jax.prepare.writing import MANIFEST, Part, lines_by_reason, put_in_place, write_dataset
from grit_jax.text.examples import TextOptions
from grit_jax.text.kinds import TEXT_KINDS
from grit_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from grit_jax.prepare.sources import Source


@dataclasses.dataclass
class _Split:
    parts: list[Part] = dataclasses.field(default_factory=list)
    rejected: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    left_out: int = 0


class DatasetBuild:
    """A Task on its way from its source to its folder.

    Args:
      source: the Task.
      output: folder of the prepared datasets.
      tokenizer: text to ids.
      options: how texts become token ids.
    """

    def __init__(
        self, source: "Source", output: epath.Path, tokenizer: Tokenizer, options: TextOptions
    ):
        self.source = source
        self.name: str = source.task.name
        self.folder = output / self.name
        self.described = source.describe()
        self.fingerprints = fingerprints(tokenizer, options, self.described)
        self.error: str | None = None
        self.manifests: dict[str, Manifest] = {}
        self._tokenizer, self._options = tokenizer, options
        self._splits: dict[str, _Split] = defaultdict(_Split)

    def look_for_finished(self) -> str | None:
        """Returns why the Task has to be prepared, or None if it is there as it would be made."""
        paths = sorted(self.folder.glob(f"*/{MANIFEST}")) if self.folder.exists() else []
        if not paths:
            return "new"
        try:
            manifests = {path.parent.name: read_manifest(path) for path in paths}
        except PreparedDataError:
            return "damaged, or of another version"
        for manifest in manifests.values():
            changed = [
                n for n, own in self.fingerprints.items() if manifest.fingerprints.get(n) != own
            ]
            if changed:
                return f"changed {' and '.join(changed)}"
        missing = [
            name
            for path, manifest in zip(paths, manifests.values(), strict=True)
            for name in ("lengths.npz", *manifest.shards)
            if not (path.parent / name).exists()
        ]
        if missing or not set(self.source.splits_with_sources) <= manifests.keys():
            return "incomplete"
        self.manifests = manifests
        return None

    def add(self, unit: WorkItem, outcomes: Mapping[str, SplitResult]) -> None:
        """Takes what became of a piece; pieces come in their order."""
        for split, outcome in outcomes.items():
            own = self._splits[split]
            own.parts += [outcome.part] if outcome.part else []
            own.left_out += outcome.left_out
            own.rejected += [
                {"file": unit.file, "line": line, "reason": reason}
                for line, reason in outcome.rejected
            ]

    def finish(self, incomplete: Path, max_rejected: float) -> None:
        """Makes the dataset whole and puts it in its place; or notes as `error` why it cannot be.

        Args:
          incomplete: where the shards are.
          max_rejected: fraction of the lines that may be rejected.
        """
        for split in self.source.splits_with_sources:
            self.error = self.error or self._why_unfit(split, max_rejected)
        if self.error is None:
            for split, own in self._splits.items():
                if own.parts:
                    self.manifests[split] = self._write(incomplete / self.name / split, own)
            put_in_place(incomplete / self.name, self.folder)

    def _why_unfit(self, split: str, max_rejected: float) -> str | None:
        num_rejected = len(self._splits[split].rejected)
        num_lines = num_rejected + self._num_examples(split)
        if split == "train" and "held_out" not in self.source.splits_with_sources:
            num_lines += self._num_examples("held_out")  # Of the same files.
        where = f"{self.folder / split}"
        if not self._splits[split].parts:
            return f"{where}: not one of {num_rejected} examples can be used{self.reasons(split)}"
        if num_rejected > max_rejected * num_lines:
            return (
                f"{where}: {num_rejected} of {num_lines} examples cannot be used, and "
                f"--max-rejected is {max_rejected:g}{self.reasons(split)}"
            )
        return None

    def _num_examples(self, split: str) -> int:
        return sum(len(part.lengths.first) - 1 for part in self._splits[split].parts)

    def reasons(self, split: str) -> str:
        """Returns the reasons of the rejects of a split, with the first lines of each."""
        counts = Counter(line["reason"] for line in self._splits[split].rejected)
        named = lines_by_reason(self._splits[split].rejected, 3)
        parts = [
            f"{count} {reason} ({', '.join(named[reason])}{', ...' if count > 3 else ''})"
            for reason, count in counts.most_common()
        ]
        return f": {'; '.join(parts)}" if parts else ""

    def _write(self, folder: Path, own: _Split) -> Manifest:
        return write_dataset(
            folder,
            self.source.plan.kind,
            own.parts,
            own.rejected,
            features=list(TEXT_KINDS[self.source.plan.kind].features),
            options=dataclasses.asdict(self._options),
            tokenizer={
                "name": self._tokenizer.name,
                "sha256": self._tokenizer.fingerprint,
                "vocab_size": self._tokenizer.vocab_size,
                "bos_id": self._tokenizer.bos_id,
                "eos_id": self._tokenizer.eos_id,
                "files": sorted(self._tokenizer.files),
            },
            left_out=own.left_out,
            source=self.described,
            seed=self.source.plan.files.seed if self.source.plan.files else 0,
            fingerprints=self.fingerprints,
        )
