"""One folder of results of one model, by whichever harness they were measured."""

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any

from grit_jax.conversion.companion_files import write_json

SCORES = "scores.json"


class ResultsError(Exception):
    """A folder of results that cannot be used; the message says what to do."""


class Results:
    """The scores in a folder, and who they are of.

    Args:
      folder: there, or to be made.
      model: what tells the model's weights from others'; None to read whatever is there.

    Raises:
      ResultsError: the folder holds the results of another model, or cannot be read.
    """

    def __init__(self, folder: Path, model: str | None = None):
        self.folder = folder
        self._path = folder / SCORES
        self._content: dict[str, Any] = {"model": model, "mteb": {}, "lm_eval": {}}
        if not self._path.exists():
            return
        try:
            self._content |= json.loads(self._path.read_text(encoding="utf-8"))
        except ValueError:
            raise ResultsError(f"{self._path} is no JSON: delete it, and evaluate again") from None
        if model is not None and self._content["model"] != model:
            raise ResultsError(
                f"{folder} holds results of another model ({self._content['model']}, and this is "
                f"{model}): say another --output"
            )

    @property
    def mteb(self) -> Mapping[str, float]:
        """The main score of each of MTEB's tasks, between 0 and 1."""
        return self._content["mteb"]

    @property
    def lm_eval(self) -> Mapping[str, Mapping[str, float]]:
        """What lm-eval measured of each task or group, by metric and filter."""
        return self._content["lm_eval"]

    def add(self, harness: str, scores: Mapping[str, Any]) -> None:
        """Adds what a harness ("mteb" or "lm_eval") measured; the file is whole at any time."""
        self._content[harness] = {**self._content[harness], **scores}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path, self._content)
