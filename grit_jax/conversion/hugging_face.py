"""Models in Hugging Face folders."""

from pathlib import Path
import re
from typing import Any

from jaxtyping import Shaped
import ml_dtypes
import numpy as np

from grit_jax.conversion.hub import find_folder
from grit_jax.conversion.layout import Index, ParamSpec, parameters
from grit_jax.conversion.safetensors_folder import ADAPTER_CONFIG, SafetensorsFolder, read_json
from grit_jax.conversion.sentence_transformers_folder import (
    read_embedding_fields,
    read_projection_fields,
    standard_config,
)
from grit_jax.conversion.stored_model import ConversionError, StoredModel, hash_weights, warn
from grit_jax.models import causal_fields, config_from_hugging_face, unread_fields
from grit_jax.objectives.embedding import GRIT_FIELD

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
# Parts of a model for images and text that are not read.
IMAGE_PARTS = re.compile(r"(?:model\.)?(vision_tower|multi_modal_projector)\..*")
# NumPy's types by their names in safetensors.
DTYPES = {"F32": "float32", "BF16": ml_dtypes.bfloat16, "F16": "float16"}


class HuggingFaceModel(StoredModel):
    """A Mistral, Mixtral or Llama in a Hugging Face folder.

    The constructor reads the configuration and the headers of the weights. It checks that every
    tensor is there with its shape, and no other tensor. It warns (`ConversionWarning`) of fields of
    the configuration that have no effect.

    Args:
      folder: has `config.json` and safetensors.
      head: adds a language model head to a model that was saved without one: "tied" uses the token
        embeddings as the head; a path takes the head of the base model in that folder.

    Raises:
      ConversionError: a file or tensor is missing, damaged or not supported.
    """

    def __init__(self, folder: Path, head: str | Path | None = None):
        self.folder = folder
        config = read_json(folder / "config.json")
        self.fields = standard_config(config) | _end_tokens(folder)
        self.fields |= read_projection_fields(folder, config)
        if embedding := read_embedding_fields(folder, config):
            self.fields[GRIT_FIELD] = self.fields.get(GRIT_FIELD, {}) | embedding
        self._weights = SafetensorsFolder(folder)
        self._base: SafetensorsFolder | None = None
        try:
            self.fields = causal_fields(self.fields)
            self._choose_head(head)
            self.config = config_from_hugging_face(self.fields)
        except ValueError as error:
            raise ConversionError(f"{folder}/{error}") from None  # "config.json: ..."
        self._give_warnings()
        self.parameters = parameters(self.config)
        self._check_names()
        for parameter in self.parameters:
            self._check_tensors(parameter)

    def dtype(self, parameter: ParamSpec) -> np.dtype:
        """Returns the stored type, or float32 for a parameter whose tensors have several."""
        stored = {self._source(name).dtype(name) for _, name in parameter.tensors()}
        return np.dtype(DTYPES[stored.pop()] if len(stored) == 1 else np.float32)

    def read(self, parameter: ParamSpec, index: Index) -> Shaped[np.ndarray, "..."]:
        """Returns a slice of a parameter, see `StoredModel.read`."""
        part = parameter.read(index, lambda name, part: self._source(name).read(name, part))
        return part.astype(self.dtype(parameter), copy=False)

    def weights_fingerprint(self) -> str:
        """Returns a hash of the weights, see `StoredModel.weights_fingerprint`."""
        names = {name for parameter in self.parameters for _, name in parameter.tensors()}
        return hash_weights("safetensors", {self._source(name).path(name) for name in names})

    def _source(self, name: str) -> SafetensorsFolder:
        return self._base if self._base is not None and name == HEAD else self._weights

    def _choose_head(self, head: str | Path | None) -> None:
        """Sets the fields of the configuration that say whether there is a head, and which."""
        has_head, is_tied = HEAD in self._weights.names, self.fields.get("tie_word_embeddings")
        self.fields.pop("has_lm_head", None)
        if is_tied and has_head:
            self._check_tied_head()
        if has_head or is_tied:
            if head is not None:
                raise ConversionError(f"{self.folder} has a head of its own; leave out --head")
        elif head is None:
            self.fields["has_lm_head"] = False
        elif head == "tied":
            self.fields["tie_word_embeddings"] = True
        else:
            self._base = SafetensorsFolder(find_folder(head))
            if HEAD not in self._base.names:
                raise ConversionError(
                    f"--head {head} has no {HEAD}: name the folder of a base model"
                )

    def _check_tied_head(self) -> None:
        """Decides whether a head beside tied embeddings is a copy of them, as transformers does."""
        if EMBEDDINGS not in self._weights.names:
            self._weights.rename(HEAD, EMBEDDINGS)
        elif not self._weights.equal(HEAD, EMBEDDINGS):
            self.fields["tie_word_embeddings"] = False
            warn(
                f"{self.folder / 'config.json'} says tie_word_embeddings=true, but {HEAD} differs "
                f"from {EMBEDDINGS}: both are kept, as tie_word_embeddings=false"
            )

    def _give_warnings(self) -> None:
        """Warns of what is stored with the model but has no effect, and of a missing head."""
        if unread := unread_fields(self.fields):
            shown = ", ".join(f"{name}={value!r}" for name, value in sorted(unread.items()))
            warn(f"{self.folder / 'config.json'}: the model is computed without {shown}")
        matches = map(IMAGE_PARTS.fullmatch, self._weights.names)
        if parts := sorted({match[1] for match in matches if match}):
            warn(f"{self.folder}: only the text model is read, without {' and '.join(parts)}")
        if (self.folder / ADAPTER_CONFIG).exists():
            warn(f"{self.folder / ADAPTER_CONFIG}: the adapter beside the weights is not read")
        classes = self.fields.get("architectures") or []
        if not self.config.has_lm_head and any("ForCausalLM" in name for name in classes):
            warn(
                f"{self.folder} has no {HEAD}, although config.json names a {classes[0]}: the "
                "model embeds, but cannot generate"
            )

    def _check_names(self) -> None:
        expected = {name for parameter in self.parameters for _, name in parameter.tensors()}
        present = self._weights.names | ({HEAD} if self._base is not None else set())
        if self.config.tie_word_embeddings:
            present -= {HEAD}  # A copy of the embeddings, which transformers ignores as well.
        # Old checkpoints also store the rotary frequencies, which the configuration determines.
        present = {name for name in present if not name.endswith("rotary_emb.inv_freq")}
        present = {name for name in present if not IMAGE_PARTS.fullmatch(name)}
        self._check_tensor_names(expected, present)

    def _check_tensors(self, parameter: ParamSpec) -> None:
        for _, name in parameter.tensors():
            source = self._source(name)
            if source.shape(name) != parameter.tensor_shape:
                raise ConversionError(
                    f"{source.path(name)}: {name} has the shape {source.shape(name)}, but "
                    f"config.json asks for {parameter.tensor_shape}"
                )
            if source.dtype(name) not in DTYPES:
                raise ConversionError(
                    f"{source.path(name)}: {name} has the type {source.dtype(name)}, which must be "
                    f"one of {', '.join(DTYPES)}"
                )


def _end_tokens(folder: Path) -> dict[str, Any]:
    """Returns the `eos_token_id` of generation_config.json, if any.

    It may list more tokens than config.json.
    """
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    return {name: value for name, value in generation.items() if name == "eos_token_id"}
