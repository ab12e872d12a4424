"""One folder of results of one model, by whichever harness they were measured."""

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any

from grit_jax.consistency import describe_differences
from grit_jax.files import locked, write_json
from grit_jax.inference.gritlm import GritLM

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
        self._model = model
        self._settings: dict[str, dict[str, Any]] = {}
        self._content = self._read()

    @property
    def mteb(self) -> Mapping[str, float]:
        """The main score of each of MTEB's tasks, between 0 and 1."""
        return self._content["mteb"]

    @property
    def lm_eval(self) -> Mapping[str, Mapping[str, float]]:
        """What lm-eval measured of each task or group, by metric and filter."""
        return self._content["lm_eval"]

    def measure_with(self, harness: str, settings: Mapping[str, Any]) -> None:
        """Takes note of what the scores of a harness depend on, beside the model's weights.

        The folder is there from then on: one that cannot be made is known before it is measured.

        Raises:
          ResultsError: those in the folder were measured with other settings.
        """
        self._settings[harness] = dict(settings)
        self._content = self._read()
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, harness: str, scores: Mapping[str, Any]) -> None:
        """Adds what a harness ("mteb" or "lm_eval") measured; the file is whole at any time.

        Raises:
          ResultsError: by now the folder holds what cannot stand beside it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder):
            content = self._read()  # The other harness may have added to it.
            content[harness] |= scores
            content["settings"] |= self._settings
            write_json(self._path, content)
        self._content = content

    def _read(self) -> dict[str, Any]:
        content = {"model": self._model, "settings": {}, "mteb": {}, "lm_eval": {}}
        if not self._path.exists():
            return content
        try:
            content |= json.loads(self._path.read_text(encoding="utf-8"))
        except ValueError:
            raise ResultsError(f"{self._path} is no JSON: delete it, and evaluate again") from None
        if self._model is not None and content["model"] != self._model:
            raise ResultsError(
                f"{self.folder} holds results of another model ({content['model']}, and this is "
                f"{self._model}): say another --output"
            )
        for harness, settings in self._settings.items():
            before = content["settings"].get(harness, settings)
            if content[harness] and (differences := describe_differences(before, settings)):
                raise ResultsError(
                    f"{self.folder} holds results that were measured otherwise: "
                    f"{'; '.join(differences)}. Say another --output"
                )
        return content


def settings_of(model: GritLM) -> dict[str, Any]:
    """Returns what all scores of a model depend on, beside its weights."""
    config = model.model.config
    return {
        "dtype": str(config.dtype),
        "linear_dtype": config.linear_dtype,
        "tokenizer": model.tokenizer.fingerprint[:16],
    }
