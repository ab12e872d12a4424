"""Models in Hugging Face folders."""

from pathlib import Path
from typing import Any

from jaxtyping import Shaped
import ml_dtypes
import numpy as np

from grit_jax.conversion.layout import Index, ParamSpec, parameters
from grit_jax.conversion.safetensors_folder import SafetensorsFolder, read_json
from grit_jax.conversion.sidecar_files import SENTENCE_TRANSFORMERS
from grit_jax.conversion.stored_model import ConversionError, StoredModel, hash_weights
from grit_jax.models import config_from_hugging_face
from grit_jax.objectives.embedding import GRIT_FIELD

HEAD = "lm_head.weight"
# NumPy's types by their names in safetensors.
DTYPES = {"F32": "float32", "BF16": ml_dtypes.bfloat16, "F16": "float16"}


class HuggingFaceModel(StoredModel):
    """A Mistral, Mixtral or Llama in a Hugging Face folder.

    The constructor reads the configuration and the headers of the weights. It checks that every
    tensor is there with its shape, and no other tensor.

    Args:
      folder: has `config.json` and safetensors.
      head: for a model that was saved without its language model head: "tied" uses the token
        embeddings as the head; a path takes the head of the base model in that folder.

    Raises:
      ConversionError: a file or tensor is missing, damaged or not supported.
    """

    def __init__(self, folder: Path, head: str | Path | None = None):
        self.folder = folder
        self.fields = read_json(folder / "config.json") | _end_tokens(folder)
        if prompts := _prompts(folder):
            self.fields[GRIT_FIELD] = self.fields.get(GRIT_FIELD, {}) | prompts
        self._weights = SafetensorsFolder(folder)
        self._base: SafetensorsFolder | None = None
        self._choose_head(head)
        try:
            self.config = config_from_hugging_face(self.fields)
        except ValueError as error:
            raise ConversionError(f"{folder / 'config.json'}: {error}") from None
        self.parameters = parameters(self.config)
        self._check_names()
        for parameter in self.parameters:
            self._check_tensors(parameter)

    def dtype(self, parameter: ParamSpec) -> np.dtype:
        """Returns the type that the parameter is stored in."""
        _, name = next(parameter.tensors())
        return np.dtype(DTYPES[self._source(name).dtype(name)])

    def read(self, parameter: ParamSpec, index: Index) -> Shaped[np.ndarray, "..."]:
        """Returns a slice of a parameter, see `StoredModel.read`."""
        return parameter.read(index, lambda name, part: self._source(name).read(name, part))

    def weights_fingerprint(self) -> str:
        """Returns a hash of the weights, see `StoredModel.weights_fingerprint`."""
        names = {name for parameter in self.parameters for _, name in parameter.tensors()}
        return hash_weights("safetensors", {self._source(name).path(name) for name in names})

    def _source(self, name: str) -> SafetensorsFolder:
        return self._base if self._base is not None and name == HEAD else self._weights

    def _choose_head(self, head: str | Path | None) -> None:
        if HEAD in self._weights.names or self.fields.get("tie_word_embeddings"):
            if head is not None:
                raise ConversionError(f"{self.folder} has a head of its own; leave out --head")
            return
        if head is None:
            raise ConversionError(
                f"{self.folder} has no {HEAD}, because it was saved as an embedding model. Use "
                "--head tied to compute logits with its token embeddings, or --head FOLDER to take "
                "the head of a base model"
            )
        if head == "tied":
            self.fields = self.fields | {"tie_word_embeddings": True}
            return
        self._base = SafetensorsFolder(Path(head))
        if HEAD not in self._base.names:
            raise ConversionError(f"--head {head} has no {HEAD}: name the folder of a base model")

    def _check_names(self) -> None:
        expected = {name for parameter in self.parameters for _, name in parameter.tensors()}
        present = self._weights.names | ({HEAD} if self._base is not None else set())
        if self.config.tie_word_embeddings:
            present -= {HEAD}  # A copy of the embeddings, which transformers ignores as well.
        # Old checkpoints also store the rotary frequencies, which the configuration determines.
        present = {name for name in present if not name.endswith("rotary_emb.inv_freq")}
        self._check_tensor_names(expected, present)

    def _check_tensors(self, parameter: ParamSpec) -> None:
        _, first = next(parameter.tensors())
        dtype = self._source(first).dtype(first)
        for _, name in parameter.tensors():
            source = self._source(name)
            if source.shape(name) != parameter.tensor_shape:
                raise ConversionError(
                    f"{source.path(name)}: {name} has the shape {source.shape(name)}, but "
                    f"config.json asks for {parameter.tensor_shape}"
                )
            if source.dtype(name) != dtype or dtype not in DTYPES:
                raise ConversionError(
                    f"{source.path(name)}: {name} has the type {source.dtype(name)}; the type must "
                    f"be one of {', '.join(DTYPES)} and the same in all layers"
                )


def _end_tokens(folder: Path) -> dict[str, Any]:
    """Returns the `eos_token_id` of generation_config.json, if any.

    It may list more tokens than config.json.
    """
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    return {name: value for name, value in generation.items() if name == "eos_token_id"}


def _prompts(folder: Path) -> dict[str, str]:
    """Returns the prompts of queries and documents that sentence-transformers would use."""
    path = folder / SENTENCE_TRANSFORMERS
    prompts = (read_json(path).get("prompts") or {}) if path.is_file() else {}
    kinds = [kind for kind in ("query", "document") if isinstance(prompts.get(kind), str)]
    return {f"{kind}_prompt": prompts[kind] for kind in kinds}
