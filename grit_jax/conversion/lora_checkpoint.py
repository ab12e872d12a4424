"""LoRA checkpoints, whose updates are added to the base model's weights as they are read."""

import dataclasses
import functools

from jaxtyping import Shaped
import numpy as np

from grit_jax.conversion.layout import Index, ParamSpec
from grit_jax.conversion.orbax_model import OrbaxModel, read_item
from grit_jax.conversion.stored_model import ConversionError, Folder, StoredModel, hash_weights
from grit_jax.models import LoraConfig, lora_layers

# The item of a checkpoint that names the base model's folder. Only LoRA checkpoints have it.
BASE_MODEL = "base_model"


class LoraCheckpoint(StoredModel):
    """The merged weights W + (alpha / rank) A B of a base model and a LoRA checkpoint.

    Only the slice that is read is merged, so that the merged model never has to fit in memory.

    Args:
      folder: a checkpoint of a run that trained LoRA.
      base: the model that the run started from.

    Raises:
      ConversionError: `base` holds other weights than the run started from.
    """

    def __init__(self, folder: Folder, base: StoredModel):
        settings = read_item(folder, "description")["lora"]
        if base.weights_fingerprint() != settings.pop("base"):
            raise ConversionError(
                f"{base.folder} does not hold the weights that {folder} was trained on: give its "
                "base model's folder with --base"
            )
        self._base, self._updates = base, OrbaxModel(folder)
        self._lora = LoraConfig(**settings)
        self.folder = folder
        self.fields, self.config = self._updates.fields, self._updates.config
        self.parameters = self._updates.parameters
        self._adapted = {
            ("layers", *layer.split("."))
            for layer in lora_layers(dataclasses.replace(self.config, lora=self._lora))
        }

    @functools.cached_property
    def tokenizer_files(self) -> dict[str, bytes]:
        """The checkpoint's own tokenizer; old checkpoints have none and use the base model's."""
        return self._updates.tokenizer_files or self._base.tokenizer_files

    def dtype(self, parameter: ParamSpec) -> np.dtype:
        """Returns the type that W is stored in; `read` returns adapted weights in float32."""
        return self._owner(parameter).dtype(parameter)

    def read(self, parameter: ParamSpec, index: Index) -> Shaped[np.ndarray, "..."]:
        """Returns a slice of a parameter, in float32 if LoRA adapts it."""
        weight = self._owner(parameter).read(parameter, index)
        if parameter.path not in self._adapted:
            return weight
        return weight + self._update(parameter, index).reshape(weight.shape)

    def weights_fingerprint(self) -> str:
        """Returns a hash of the base model's weights, the updates and LoRA's settings."""
        parts = (self._base.weights_fingerprint(), self._updates.weights_fingerprint())
        return hash_weights(" ".join((*parts, str(self._lora))), [])

    def _owner(self, parameter: ParamSpec) -> StoredModel:
        """Returns the model that stores the parameter's W."""
        # LoRA does not adapt the embedding projection: it is trained in full and saved whole.
        return self._updates if parameter.path[0] == "embedding_projection" else self._base

    def _update(self, parameter: ParamSpec, index: Index) -> Shaped[np.ndarray, "..."]:
        """Returns a slice of (alpha / rank) A B, in float32."""
        *module, name = parameter.path
        a, b = (self._updates.read_whole((*module, f"{name}_lora", matrix)) for matrix in "ab")
        num_stacked = len(parameter.stack_shape)
        middle = num_stacked + parameter.num_inputs
        stack, inputs, outputs = index[:num_stacked], index[num_stacked:middle], index[middle:]
        a, b = a[(*stack, *inputs)], b[(*stack, slice(None), *outputs)]
        a = a.reshape(*a.shape[:num_stacked], -1, a.shape[-1])
        b = b.reshape(*b.shape[: num_stacked + 1], -1)
        return self._lora.alpha / self._lora.rank * (a @ b)
