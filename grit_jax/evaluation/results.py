"""The folder of one model's scores, from both MTEB and lm-eval."""

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any

from grit_jax.consistency import describe_differences
from grit_jax.files import locked, write_json
from grit_jax.inference.gritlm import GritLM

SCORES = "scores.json"


class ResultsError(Exception):
    """A folder of results cannot be used; the message says what to do."""


class Results:
    """The scores of one model in a folder.

    Args:
      folder: the folder, which need not exist yet.
      weights: the fingerprint of the model's weights; None accepts the scores of any model.

    Raises:
      ResultsError: the folder holds the scores of another model, or a damaged file.
    """

    def __init__(self, folder: Path, weights: str | None = None):
        self.folder = folder
        self._path = folder / SCORES
        self._weights = weights
        self._settings: dict[str, dict[str, Any]] = {}
        self._content = self._read()

    @property
    def mteb(self) -> Mapping[str, float]:
        """The main score of each MTEB task, between 0 and 1."""
        return self._content["mteb"]

    @property
    def lm_eval(self) -> Mapping[str, Mapping[str, float]]:
        """The metrics of each lm-eval task or group; their names include lm-eval's filter."""
        return self._content["lm_eval"]

    def begin(self, harness: str, settings: Mapping[str, Any]) -> None:
        """Sets the settings of a harness, and checks that existing scores were made with the same.

        Creates the folder, so that an impossible path fails before the evaluation.

        Raises:
          ResultsError: the folder holds scores of this harness with other settings.
        """
        self._settings[harness] = dict(settings)
        self._content = self._read()
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, harness: str, scores: Mapping[str, Any]) -> None:
        """Adds the scores of a harness ("mteb" or "lm_eval") to the file, atomically.

        Raises:
          ResultsError: meanwhile, another process has added scores of another model or settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder):
            content = self._read()  # Another process may have added scores.
            content[harness] |= scores
            content["settings"] |= self._settings
            write_json(self._path, content)
        self._content = content

    def _read(self) -> dict[str, Any]:
        content = {"model": self._weights, "settings": {}, "mteb": {}, "lm_eval": {}}
        if not self._path.exists():
            return content
        try:
            content |= json.loads(self._path.read_text(encoding="utf-8"))
        except ValueError:
            raise ResultsError(f"{self._path} is not JSON: delete it and evaluate again") from None
        if self._weights is not None and content["model"] != self._weights:
            raise ResultsError(
                f"{self.folder} holds results of another model ({content['model']}; this is "
                f"{self._weights}): choose another --output"
            )
        for harness, settings in self._settings.items():
            before = content["settings"].get(harness, settings)
            if content[harness] and (
                differences := describe_differences(_as_options(before), _as_options(settings))
            ):
                raise ResultsError(
                    f"{self.folder} holds results with other settings: {'; '.join(differences)}. "
                    "Choose another --output"
                )
        return content


def _as_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings by the names of the options that set them."""
    return {f"--{name.replace('_', '-')}": value for name, value in settings.items()}


def model_settings(model: GritLM) -> dict[str, Any]:
    """Returns the settings, besides the weights, that change any score of a model."""
    config = model.model.config
    return {
        "dtype": str(config.dtype),
        "linear_dtype": config.linear_dtype,
        "tokenizer": model.tokenizer.fingerprint[:16],
    }
