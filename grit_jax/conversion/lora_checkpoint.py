"""A model with low-rank updates (LoRA): a base's weights, and what is added as they are read."""

import dataclasses
from typing import Any

from jaxtyping import Shaped
import numpy as np

from grit_jax.conversion.fingerprint import fingerprint
from grit_jax.conversion.gguf_model import GgufModel
from grit_jax.conversion.hugging_face import HuggingFaceModel, load_sharded
from grit_jax.conversion.layout import Index, ParamSpec
from grit_jax.conversion.orbax_model import Folder, OrbaxModel, read_item
from grit_jax.conversion.safetensors_folder import ConversionError
from grit_jax.models import LoraConfig, lora_layers
from grit_jax.text.tokenizer import tokenizer_in

# The item of a checkpoint that says where the base lies: the mark of low-rank updates.
BASE_MODEL = "base_model"


class LoraCheckpoint:
    """The weights W + (alpha / rank) A B; no more of them is in memory than is being read.

    Args:
      folder: a checkpoint of a run that trained low-rank updates.
      base: the model that they were trained on.

    Raises:
      ConversionError: the base is another model.
    """

    def __init__(
        self, folder: Folder, base: "HuggingFaceModel | GgufModel | OrbaxModel | LoraCheckpoint"
    ):
        settings = read_item(folder, "description")["lora"]
        if base.fingerprint() != settings.pop("base"):
            raise ConversionError(
                f"{base.folder} does not hold the weights that {folder} was trained on"
            )
        self._base, self._updates = base, OrbaxModel(folder)
        self._lora = LoraConfig(**settings)
        self.folder, self.tokenizer_folder = folder, self._updates.tokenizer_folder
        if tokenizer_in(self.tokenizer_folder) is None:  # A checkpoint of older versions.
            self.tokenizer_folder = base.tokenizer_folder
        self.fields, self.config = self._updates.fields, self._updates.config
        self.parameters = self._updates.parameters
        self._adapted = {
            ("layers", *layer.split("."))
            for layer in lora_layers(dataclasses.replace(self.config, lora=self._lora))
        }

    def dtype(self, parameter: ParamSpec) -> np.dtype:
        """Returns the type that W is stored in."""
        return self._holder(parameter).dtype(parameter)

    def read(self, parameter: ParamSpec, index: Index) -> Shaped[np.ndarray, "..."]:
        """Returns a part of a parameter, in float32 where there is an update."""
        part = self._holder(parameter).read(parameter, index)
        if parameter.path not in self._adapted:
            return part
        return part + self._update(parameter, index).reshape(part.shape)  # A and B are float32.

    def load(self, shapes: dict[str, Any]) -> dict[str, Any]:
        """Returns the parameters as global arrays, see `HuggingFaceModel.load`."""
        return load_sharded(self, shapes)

    def fingerprint(self) -> str:
        """Returns what tells these weights from others, see `fingerprint`."""
        parts = (self._base.fingerprint(), self._updates.fingerprint(), str(self._lora))
        return fingerprint(" ".join(parts), [])

    def _holder(
        self, parameter: ParamSpec
    ) -> "HuggingFaceModel | GgufModel | OrbaxModel | LoraCheckpoint":
        """Returns the model that has the parameter's W."""
        # The layer that makes embeddings is trained whole, beside the updates.
        return self._updates if parameter.path[0] == "embedding_projection" else self._base

    def _update(self, parameter: ParamSpec, index: Index) -> Shaped[np.ndarray, "..."]:
        """Returns a part of (alpha / rank) A B."""
        *module, name = parameter.path
        a, b = (self._updates.whole((*module, f"{name}_lora", matrix)) for matrix in "ab")
        num_stacked = len(parameter.stack_shape)
        middle = num_stacked + parameter.num_inputs
        stack, inputs, outputs = index[:num_stacked], index[num_stacked:middle], index[middle:]
        a, b = a[(*stack, *inputs)], b[(*stack, slice(None), *outputs)]
        a = a.reshape(*a.shape[:num_stacked], -1, a.shape[-1])
        b = b.reshape(*b.shape[: num_stacked + 1], -1)
        return self._lora.alpha / self._lora.rank * (a @ b)
