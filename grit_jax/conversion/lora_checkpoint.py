"""LoRA checkpoints, whose updates are added to the base model's weights as they are read."""

import dataclasses
import functools

from grit_jax.conversion.adapted_model import AdaptedModel, LowRankUpdate
from grit_jax.conversion.layout import ParamSpec
from grit_jax.conversion.orbax_model import OrbaxModel, read_item
from grit_jax.conversion.stored_model import ConversionError, Folder, StoredModel, hash_weights
from grit_jax.models import LoraConfig, lora_layers

# The item of a checkpoint that names the base model's folder. Only LoRA checkpoints have it.
BASE_MODEL = "base_model"


class LoraCheckpoint(AdaptedModel):
    """A base model and a LoRA checkpoint.

    Args:
      folder: a checkpoint of a run that trained LoRA.
      base: the model that the run started from.

    Attributes:
      lora: the settings of LoRA in the run.

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
        self.base, self._updates = base, OrbaxModel(folder)
        self.lora = LoraConfig(**settings)
        self.folder = folder
        self.fields, self.config = self._updates.fields, self._updates.config
        self.parameters = self._updates.parameters
        layers = lora_layers(dataclasses.replace(self.config, lora=self.lora))
        self.adapted = frozenset(("layers", *layer.split(".")) for layer in layers)
        # LoRA does not adapt the embedding projection: it is trained in full.
        paths = (parameter.path for parameter in self.parameters)
        self.stored_whole = {p: self._updates for p in paths if p[0] == "embedding_projection"}

    @functools.cached_property
    def tokenizer_files(self) -> dict[str, bytes]:
        """The checkpoint's own tokenizer; old checkpoints have none and use the base model's."""
        return self._updates.tokenizer_files or self.base.tokenizer_files

    def update(self, parameter: ParamSpec) -> LowRankUpdate:
        """Returns the update of a parameter, see `AdaptedModel.update`."""
        *module, name = parameter.path
        a, b = (self._updates.read_whole((*module, f"{name}_lora", matrix)) for matrix in "ab")
        return LowRankUpdate(a, b, self.lora.alpha / self.lora.rank)

    def ranks(self, parameter: ParamSpec) -> set[int]:
        """Returns the rank of all updates, see `AdaptedModel.ranks`."""
        return {self.lora.rank}

    def weights_fingerprint(self) -> str:
        """Returns a hash of the base model's weights, the updates and LoRA's settings."""
        parts = (self.base.weights_fingerprint(), self._updates.weights_fingerprint())
        return hash_weights(" ".join((*parts, str(self.lora))), [])
