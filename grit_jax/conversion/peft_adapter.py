"""LoRA adapters in PEFT's format, `adapter_config.json` and `adapter_model.safetensors`."""

from collections.abc import Callable
import dataclasses
import functools
from pathlib import Path
import re

from jaxtyping import Shaped
import numpy as np

from grit_jax.conversion.adapted_model import AdaptedModel, LowRankUpdate
from grit_jax.conversion.hugging_face import DTYPES
from grit_jax.conversion.layout import Index, ParamSpec
from grit_jax.conversion.peft_settings import PeftSettings
from grit_jax.conversion.safetensors_folder import ADAPTER, SafetensorsFolder, read_json
from grit_jax.conversion.sentence_transformers_folder import read_embedding_fields
from grit_jax.conversion.stored_model import ConversionError, StoredModel, hash_weights
from grit_jax.objectives.embedding import GRIT_FIELD
from grit_jax.text.tokenizer_files import read_tokenizer_files

# How the adapted model embeds. PEFT's own files have no place for it.
GRIT_SETTINGS = "grit_config.json"
MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")
# The module of a layer's experts in transformers 5, whose stacked matrices PEFT adapts. If both
# are adapted, one module is around the other.
EXPERTS = re.compile(r"(?P<layer>.+)\.mlp\.experts(\.base_layer)?")
# Paths of the experts' matrices that transformers 5 stacks, in the order of their outputs.
FEED_FORWARD = ("layers", "feed_forward")
STACKED = {
    "gate_up_proj": ((*FEED_FORWARD, "gate"), (*FEED_FORWARD, "up")),
    "down_proj": ((*FEED_FORWARD, "down"),),
}


@dataclasses.dataclass(frozen=True)
class _Update:
    """The update scale B A of one tensor [outputs, inputs].

    Attributes:
      shape: numbers of outputs and inputs.
      rank: its rank.
      scale: its factor.
      read_a: returns A [rank, inputs].
      read_b: returns B [outputs, rank].
    """

    shape: tuple[int, int]
    rank: int
    scale: float
    read_a: Callable[[], np.ndarray]
    read_b: Callable[[], np.ndarray]


class PeftAdapter(AdaptedModel):
    """A base model and an adapter of PEFT.

    Parameters that were saved whole (`modules_to_save`, `bias`) replace those of the base.

    Args:
      folder: the adapter's folder.
      base: the model that it was trained on.

    Raises:
      ConversionError: a file is damaged, a setting is not supported, or the adapter does not fit
        the base.
    """

    folder: Path

    def __init__(self, folder: Path, base: StoredModel):
        self.folder, self.base = folder, base
        self.settings = PeftSettings.read(folder)
        self.config, self.parameters = base.config, base.parameters
        self.fields = {**base.fields, GRIT_FIELD: self._embedding_fields()}
        self._file = SafetensorsFolder(folder, is_adapter=True)
        self._by_tensor = {name: p for p in self.parameters for _, name in p.tensors()}
        self._updates: dict[str, _Update] = {}
        self._whole: dict[str, str] = {}
        self._find_tensors()
        self.adapted = frozenset(self._by_tensor[name].path for name in self._updates)
        self.stored_whole = dict.fromkeys(
            (self._by_tensor[name].path for name in self._whole), _WholeTensors(self)
        )
        self._check_whole()

    @functools.cached_property
    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer beside the adapter, else the base model's."""
        return read_tokenizer_files(self.folder) or self.base.tokenizer_files

    def update(self, parameter: ParamSpec) -> LowRankUpdate:
        """Returns the update of a parameter, see `AdaptedModel.update`.

        The updates of layers that have none are zeros, and smaller ranks are filled up with zeros.
        """
        updates = [self._updates.get(name) for _, name in parameter.tensors()]
        present = [update for update in updates if update is not None]
        rank, scale = max(update.rank for update in present), present[0].scale
        outputs, inputs = parameter.tensor_shape
        a = np.zeros((len(updates), inputs, rank), np.float32)
        b = np.zeros((len(updates), rank, outputs), np.float32)
        for i, update in enumerate(updates):
            if update is not None:
                a[i, :, : update.rank] = update.read_a().T
                b[i, : update.rank] = update.read_b().T * np.float32(update.scale / scale)
        stack, middle = parameter.stack_shape, parameter.num_inputs
        return LowRankUpdate(
            a.reshape(*stack, *parameter.shape[:middle], rank),
            b.reshape(*stack, rank, *parameter.shape[middle:]),
            scale,
        )

    def ranks(self, parameter: ParamSpec) -> set[int]:
        """Returns the ranks of a parameter's update, see `AdaptedModel.ranks`."""
        updates = [self._updates.get(name) for _, name in parameter.tensors()]
        return {0 if update is None else update.rank for update in updates}

    def weights_fingerprint(self) -> str:
        """Returns a hash of the base model's weights, and of the adapter."""
        prefix = f"{self.base.weights_fingerprint()} {self.settings}"
        return hash_weights(prefix, [self.folder / ADAPTER])

    def _embedding_fields(self) -> dict[str, str]:
        """Returns how the model embeds: as the adapter's folder says, else as the base."""
        others = {name: value for name, value in self.base.fields.items() if name != GRIT_FIELD}
        fields = self.base.fields.get(GRIT_FIELD, {}) | read_embedding_fields(self.folder, others)
        own = self.folder / GRIT_SETTINGS
        return fields | (read_json(own) if own.is_file() else {})

    def _find_tensors(self) -> None:
        """Assigns the adapter's tensors to tensors of the base."""
        pairs: dict[str, dict[str, str]] = {}
        for name in sorted(self._file.names):
            if found := MATRIX.fullmatch(name):
                pairs.setdefault(found["module"], {})[found["matrix"]] = name
            elif ".lora_" in name:
                raise ConversionError(
                    f"{self.folder / ADAPTER}: {name} is not supported: merge the adapter with "
                    "merge_and_unload(), and save the model with save_pretrained()"
                )
            else:
                self._whole[self._known(name.replace(".base_layer.", "."), name)] = name
        for module, names in pairs.items():
            if len(names) < 2:
                raise ConversionError(f"{self.folder / ADAPTER} lacks A or B of {module}")
            if found := EXPERTS.fullmatch(module):
                self._add_experts(found["layer"], names["A"], names["B"])
            else:
                self._add_module(module, names["A"], names["B"])

    def _known(self, name: str, stored: str) -> str:
        """Returns the base's name of a tensor.

        Raises:
          ConversionError: the base does not have it.
        """
        old = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")  # Before transformers 5.
        for known in (name, old):
            if known in self._by_tensor:
                return known
        raise ConversionError(
            f"{self.folder / ADAPTER}: {stored} has no counterpart in {self.base.folder}: name the "
            "base model that the adapter was trained on (base=, --base)"
        )

    def _add_module(self, module: str, name_a: str, name_b: str) -> None:
        name = self._known(f"{module}.weight", name_a)
        (outputs, rank), (_, inputs) = self._shape(name_b), self._shape(name_a)
        update = _Update(
            (outputs, inputs),
            rank,
            self.settings.scale(self._stored_module(name_a)),
            functools.partial(self._read, name_a),
            functools.partial(self._read, name_b),
        )
        self._add(name, update, name_a)

    def _add_experts(self, layer: str, name_a: str, name_b: str) -> None:
        """Adds the updates of matrices that are stacked over experts, and of gate and up."""
        num_experts = self.config.num_local_experts
        (outputs, ranks), (_, inputs) = self._shape(name_b), self._shape(name_a)
        D, F = self.config.hidden_size, self.config.intermediate_size
        names = {(2 * F, D): "gate_up_proj", (D, F): "down_proj"}
        stacked = names.get((outputs, inputs))
        if stacked is None or not num_experts or ranks % num_experts:
            raise ConversionError(
                f"{self.folder / ADAPTER}: {name_a} does not fit {self.base.folder}: name the base "
                "model that the adapter was trained on (base=, --base)"
            )
        rank, parts = ranks // num_experts, STACKED[stacked]
        module = self._stored_module(name_a).replace(".base_layer", "")
        scale, size = self.settings.scale(f"{module}.{stacked}"), outputs // len(parts)

        def read_a(expert: int) -> np.ndarray:
            return self._read(name_a).reshape(num_experts, rank, inputs)[expert]

        def read_b(expert: int, part: int) -> np.ndarray:
            b = self._read(name_b).reshape(outputs, rank, num_experts)
            return b[part * size : (part + 1) * size, :, expert]

        by_path = {parameter.path: parameter for parameter in self.parameters}
        for part, path in enumerate(parts):
            own = (n for _, n in by_path[path].tensors() if n.startswith(f"{layer}."))
            for expert, name in enumerate(own):
                a = functools.partial(read_a, expert)
                b = functools.partial(read_b, expert, part)
                self._add(name, _Update((size, inputs), rank, scale, a, b), name_a)

    def _add(self, name: str, update: _Update, stored: str) -> None:
        expected = self._by_tensor[name].tensor_shape
        if not self._by_tensor[name].num_inputs or update.shape != expected:
            raise ConversionError(
                f"{self.folder / ADAPTER}: {stored} is for a layer of the shape {update.shape}, "
                f"which {self.base.folder} does not have: name the base model that the adapter was "
                "trained on (base=, --base)"
            )
        self._updates[name] = update

    def _check_whole(self) -> None:
        """Checks the shapes of tensors that replace the base's, and that all layers have them."""
        for name, stored in self._whole.items():
            parameter = self._by_tensor[name]
            if self._file.shape(stored) != parameter.tensor_shape:
                raise ConversionError(
                    f"{self.folder / ADAPTER}: {stored} has the shape {self._file.shape(stored)}, "
                    f"but {self.base.folder} has {parameter.tensor_shape}"
                )
            if missing := [n for _, n in parameter.tensors() if n not in self._whole]:
                raise ConversionError(
                    f"{self.folder / ADAPTER} has {stored}, but not {missing[0]}: only whole "
                    "parameters of all layers are supported in modules_to_save"
                )

    def _shape(self, name: str) -> tuple[int, int]:
        shape = self._file.shape(name)
        if len(shape) != 2 or self._file.dtype(name) not in DTYPES:
            raise ConversionError(
                f"{self.folder / ADAPTER}: {name} has the shape {shape} and the type "
                f"{self._file.dtype(name)}: it must be a matrix of {', '.join(DTYPES)}"
            )
        return shape[0], shape[1]

    def _stored_module(self, name: str) -> str:
        """Returns PEFT's name of a matrix's module, which the patterns of the settings match."""
        stored = self._file.stored_name(name).removeprefix("base_model.model.")
        return stored.rpartition(".lora_")[0]

    @functools.lru_cache(maxsize=4)  # noqa: B019  Experts read their parts of a tensor in turn.
    def _read(self, name: str) -> np.ndarray:
        whole = tuple(slice(0, size) for size in self._file.shape(name))
        return np.asarray(self._file.read(name, whole), np.float32)


class _WholeTensors:
    """The parameters of an adapter that replace the base's."""

    def __init__(self, adapter: PeftAdapter):
        self._names, self._file = adapter._whole, adapter._file

    def dtype(self, parameter: ParamSpec) -> np.dtype:
        """Returns the stored type, or float32 for a parameter whose tensors have several."""
        types = {self._file.dtype(self._names[name]) for _, name in parameter.tensors()}
        return np.dtype(DTYPES[types.pop()] if len(types) == 1 else np.float32)

    def read(self, parameter: ParamSpec, index: Index) -> Shaped[np.ndarray, "..."]:
        """Returns a slice of a parameter."""
        part = parameter.read(index, lambda name, i: self._file.read(self._names[name], i))
        return part.astype(self.dtype(parameter), copy=False)
