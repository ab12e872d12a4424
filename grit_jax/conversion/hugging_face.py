"""A model in a Hugging Face folder: checked before anything is read, then read by parts."""

from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
from jaxtyping import Shaped
import ml_dtypes
import numpy as np

from grit_jax.conversion.fingerprint import fingerprint
from grit_jax.conversion.layout import Index, ParamSpec, parameters
from grit_jax.conversion.safetensors_folder import ConversionError, SafetensorsFolder, read_json
from grit_jax.models import ModelConfig, config_from_hugging_face

HEAD = "lm_head.weight"
# By their names in safetensors.
TYPES = {"F32": "float32", "BF16": ml_dtypes.bfloat16, "F16": "float16"}


class HuggingFaceModel:
    """The weights of a Mistral, Mixtral or Llama as a Hugging Face folder holds them.

    Opening reads the configuration and the headers, and checks that all tensors are there, each of
    its shape, and no other.

    Args:
      folder: with `config.json` and safetensors.
      head: for a checkpoint that was saved as an embedding model, without the head that makes
        logits: "tied" to use the token embeddings, or the folder of a base model to take its head.

    Raises:
      ConversionError: something is missing, damaged or of another kind; the message names the file
        and the tensor.
    """

    def __init__(self, folder: Path, head: str | Path | None = None):
        self.folder = self.tokenizer_folder = folder
        self.fields: dict[str, Any] = read_json(folder / "config.json") | _end_tokens(folder)
        self._weights = SafetensorsFolder(folder)
        self._base: SafetensorsFolder | None = None
        self._choose_head(head)
        try:
            self.config: ModelConfig = config_from_hugging_face(self.fields)
        except ValueError as error:
            raise ConversionError(f"{folder / 'config.json'}: {error}") from None
        self.parameters = parameters(self.config)
        self._check_names()
        for parameter in self.parameters:
            self._check_tensors(parameter)

    def dtype(self, parameter: ParamSpec) -> np.dtype:
        """Returns the type that the parameter's tensors are stored in."""
        _, name = next(parameter.tensors())
        return np.dtype(TYPES[self._source(name).dtype(name)])

    def read(self, parameter: ParamSpec, index: Index) -> Shaped[np.ndarray, "..."]:
        """Returns a part of a parameter, in the type it is stored in."""
        return parameter.read(index, lambda name, part: self._source(name).read(name, part))

    def load(self, shapes: dict[str, Any]) -> dict[str, Any]:
        """Returns the parameters as global arrays; each process reads what its devices hold.

        Args:
          shapes: nested dictionaries with a `jax.ShapeDtypeStruct` that has a sharding for each
            parameter, as `nnx.to_pure_dict` gives of an abstract state. Those of parameters that
            this model does not have are left out.
        """
        return load_sharded(self, shapes)

    def fingerprint(self) -> str:
        """Returns what tells these weights from others, see `fingerprint`."""
        names = {name for parameter in self.parameters for _, name in parameter.tensors()}
        return fingerprint("safetensors", {self._source(name).path(name) for name in names})

    def _source(self, name: str) -> SafetensorsFolder:
        return self._base if self._base is not None and name == HEAD else self._weights

    def _choose_head(self, head: str | Path | None) -> None:
        if HEAD in self._weights.names or self.fields.get("tie_word_embeddings"):
            if head is not None:
                raise ConversionError(f"{self.folder} has a head of its own; leave out --head")
            return
        if head is None:
            raise ConversionError(
                f"{self.folder} has no {HEAD}: it was saved to embed only. Say --head tied to make "
                "logits with its token embeddings, or --head FOLDER to take a base model's head"
            )
        if head == "tied":
            self.fields = self.fields | {"tie_word_embeddings": True}
            return
        self._base = SafetensorsFolder(Path(head))
        if HEAD not in self._base.names:
            raise ConversionError(f"{head} has no {HEAD} to take")

    def _check_names(self) -> None:
        expected = {name for parameter in self.parameters for _, name in parameter.tensors()}
        present = self._weights.names | ({HEAD} if self._base is not None else set())
        if self.config.tie_word_embeddings:
            present -= {HEAD}  # A copy of the embeddings, which transformers ignores as well.
        # Old checkpoints store the rotary frequencies, which follow from the configuration.
        surplus = {n for n in present - expected if not n.endswith("rotary_emb.inv_freq")}
        for verb, names in (("lacks", expected - present), ("has unknown", surplus)):
            if names:
                shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
                raise ConversionError(f"{self.folder} {verb} {len(names)} tensors: {shown}")

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
            if source.dtype(name) != dtype or dtype not in TYPES:
                raise ConversionError(
                    f"{source.path(name)}: {name} is of type {source.dtype(name)}; a model's "
                    f"tensors must be of one of {', '.join(TYPES)}, the same in all layers"
                )


def _end_tokens(folder: Path) -> dict[str, Any]:
    """Returns the field that says what ends an answer where it has a file, which may say more."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    return {name: value for name, value in generation.items() if name == "eos_token_id"}


def load_sharded(model: Any, shapes: dict[str, Any]) -> dict[str, Any]:
    """Returns a model's parameters as global arrays, of which each device's part is read.

    Args:
      model: with `parameters` and `read`.
      shapes: see `HuggingFaceModel.load`.
    """

    def load(parameter: ParamSpec, shape: Any) -> jax.Array:
        def part(index: Index | None) -> np.ndarray:
            assert index is not None
            return model.read(parameter, index).astype(shape.dtype)

        return jax.make_array_from_callback(shape.shape, shape.sharding, part)

    by_path = flatten_dict(shapes)
    return unflatten_dict({p.path: load(p, by_path[p.path]) for p in model.parameters})
