"""Models in GGUF files, the format of llama.cpp."""

from collections.abc import Mapping
import functools
from pathlib import Path
from typing import Any

from jaxtyping import Shaped
import ml_dtypes
import numpy as np

from grit_jax.conversion.gguf_tokenizer import gguf_tokenizer_files
from grit_jax.conversion.layout import Index, ParamSpec, parameters
from grit_jax.conversion.stored_model import ConversionError, StoredModel, hash_weights, warn
from grit_jax.models import config_from_hugging_face
from grit_jax.text.tokenizer import Tokenizer

SUFFIX = ".gguf"
# llama.cpp's name for both Llama and Mistral.
ARCHITECTURE = "llama"
# Types that are read as they are stored. All other types are converted to float32.
DTYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}
# The tensor that has a row for each token of the vocabulary.
EMBEDDINGS = "token_embd.weight"
# The names in GGUF's metadata of the sizes in config.json.
SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}


# The other settings that are read or follow from the tensors; those of "rope." are as well.
READ_SETTINGS = {
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "expert_count",
    "expert_used_count",
    "tensor_data_layout",
    "vocab_size",
}


class GgufModel(StoredModel):
    """A Llama or Mistral in a GGUF file, quantized or not.

    The constructor reads the metadata. It checks that every tensor is there with its shape, and no
    other tensor. Quantized weights are dequantized to float32 as they are read.

    Args:
      path: the file.
      tokenizer: a tokenizer to use instead of the one in the file.

    Raises:
      ConversionError: the package `gguf` is not installed, or the file is damaged or not supported.
    """

    folder: Path

    def __init__(self, path: Path, tokenizer: Tokenizer | None = None):
        self.folder = path
        self._given_tokenizer = tokenizer
        self._gguf = _import_gguf()
        reader = _open_gguf(path)
        self._metadata = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._check_supported()
        self._check_settings()
        self.fields = self._fields()
        try:
            self.config = config_from_hugging_face(self.fields)
        except ValueError as error:
            raise ConversionError(f"{path}: {error}") from None
        self.parameters = parameters(self.config)
        self._names = self._gguf.get_tensor_name_map(
            self._gguf.MODEL_ARCH.LLAMA, self.config.num_hidden_layers
        )
        self._check_tensors()

    @functools.cached_property
    def tokenizer_files(self) -> dict[str, bytes]:
        """Names and contents of the files of the given tokenizer, or of the file's own.

        Raises:
          ConversionError: the file's tokenizer is of an unknown kind.
        """
        if self._given_tokenizer is not None:
            return self._given_tokenizer.files
        return gguf_tokenizer_files(self.folder, self._value)

    def dtype(self, parameter: ParamSpec) -> np.dtype:
        """Returns the stored type, or float32 for quantized weights and layers of several types."""
        stored = {self._tensor(name).tensor_type.name for _, name in parameter.tensors()}
        return np.dtype(DTYPES.get(stored.pop(), np.float32) if len(stored) == 1 else np.float32)

    def read(self, parameter: ParamSpec, index: Index) -> Shaped[np.ndarray, "..."]:
        """Returns a slice of a parameter; only the rows of the tensors that it needs are read."""
        return parameter.read(index, self._read).astype(self.dtype(parameter), copy=False)

    def weights_fingerprint(self) -> str:
        """Returns a hash of the file, see `StoredModel.weights_fingerprint`."""
        return hash_weights("gguf", [self.folder])

    def _value(self, key: str, default: Any = None) -> Any:
        return _value(self._metadata, key, default)

    def _setting(self, name: str, default: Any = None) -> Any:
        return self._value(f"{ARCHITECTURE}.{name}", default)

    def _tensor(self, name: str) -> Any:
        """Returns the tensor with this name in Hugging Face's checkpoints."""
        return self._tensors[self._gguf_name(name)]

    def _gguf_name(self, name: str) -> str:
        return f"{self._names.get_name(name.removesuffix('.weight'))}.weight"

    def _read(self, name: str, part: Index) -> np.ndarray:
        tensor, (rows, *columns) = self._tensor(name), part
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            data = tensor.data[self._stored_rows(len(tensor.data))[rows]]
        else:
            data = tensor.data[rows]
        return np.asarray(self._gguf.dequantize(data, tensor.tensor_type))[:, *columns]

    def _stored_rows(self, num_rows: int) -> np.ndarray:
        """Returns the index in the file of each row of a query or key matrix.

        Rotary embeddings rotate pairs of a head's dimensions: (0, 1), (2, 3), ... in llama.cpp, and
        (0, H/2), (1, H/2 + 1), ... in Hugging Face. So the file interleaves the halves of a head.
        """
        rows = np.arange(num_rows).reshape(-1, self.config.head_dim // 2, 2)
        return rows.swapaxes(1, 2).ravel()

    def _check_supported(self) -> None:
        architecture = self._value("general.architecture")
        if architecture != ARCHITECTURE:
            raise ConversionError(
                f"{self.folder} has the architecture {architecture!r}; only {ARCHITECTURE!r} "
                "(Llama and Mistral) is supported"
            )
        if self._setting("expert_count", 0):
            raise ConversionError(
                f"{self.folder} has experts: convert a Mixtral from safetensors instead"
            )
        if self._value("split.count", 1) > 1:
            raise ConversionError(
                f"{self.folder} is one of several files: merge them (llama-gguf-split --merge)"
            )
        if "rope_freqs.weight" in self._tensors:
            raise ConversionError(
                f"{self.folder} has scaled rotary frequencies (Llama 3.1 and later), which are not "
                "supported"
            )

    def _check_settings(self) -> None:
        """Raises an error for a setting that differs between layers, and warns of unread ones."""
        prefix, unread = f"{ARCHITECTURE}.", {}
        for key in self._metadata:
            value = self._value(key) if key.startswith(prefix) else None
            if isinstance(value, list):
                raise ConversionError(
                    f"{self.folder}: {key} differs between layers, which is not supported"
                )
            name = key.removeprefix(prefix)
            is_read = name in READ_SETTINGS or name in SIZES.values() or name.startswith("rope.")
            if value is not None and not is_read:
                unread[key] = value
        if unread:
            shown = ", ".join(f"{key}={value!r}" for key, value in unread.items())
            warn(f"{self.folder}: the model is computed without {shown}")

    def _fields(self) -> dict[str, Any]:
        """Returns the content of a Hugging Face config.json for this model."""
        sizes = {ours: self._setting(name) for ours, name in SIZES.items()}
        if missing := [SIZES[name] for name, size in sizes.items() if size is None]:
            raise ConversionError(f"{self.folder} has no metadata {ARCHITECTURE}.{missing[0]}")
        if EMBEDDINGS not in self._tensors:
            raise ConversionError(f"{self.folder} lacks 1 tensors: {EMBEDDINGS}")
        heads = sizes["num_attention_heads"]
        head_dim = self._setting("attention.key_length", sizes["hidden_size"] // heads)
        if self._setting("rope.dimension_count", head_dim) != head_dim:
            raise ConversionError(
                f"{self.folder} rotates only a part of each head, which is not supported"
            )
        # Old files have another name for the factor, and name no type for "linear".
        factor = self._setting("rope.scaling.factor", self._setting("rope.scale_linear", 1.0))
        kind = self._setting("rope.scaling.type", "none" if factor in (0, 1) else "linear")
        if kind != "none":
            raise ConversionError(
                f"{self.folder}: rotary embeddings of type {kind!r} are not supported in GGUF "
                "files: use the model's Hugging Face folder"
            )
        end, end_of_turn = (self._value(f"tokenizer.ggml.{n}_token_id") for n in ("eos", "eot"))
        ends = [token for token in dict.fromkeys((end, end_of_turn)) if token is not None]
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **sizes,
            "num_key_value_heads": self._setting("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "vocab_size": int(self._tensors[EMBEDDINGS].shape[-1]),
            "rms_norm_eps": _shortest(self._setting("attention.layer_norm_rms_epsilon", 1e-6)),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self._setting("rope.freq_base", 10000.0),
            },
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": self._value("tokenizer.ggml.bos_token_id"),
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        }

    def _check_tensors(self) -> None:
        expected = {
            self._gguf_name(name): parameter
            for parameter in self.parameters
            for _, name in parameter.tensors()
        }
        self._check_tensor_names(expected.keys(), self._tensors.keys())
        for name, parameter in expected.items():
            tensor = self._tensors[name]
            shape = tuple(int(size) for size in reversed(tensor.shape))
            if shape != parameter.tensor_shape:
                raise ConversionError(
                    f"{self.folder}: {name} has the shape {shape}, but its metadata asks for "
                    f"{parameter.tensor_shape}"
                )
        for tensor in {t.tensor_type: t for t in self._tensors.values()}.values():
            try:
                self._gguf.dequantize(tensor.data[:1], tensor.tensor_type)
            except NotImplementedError:
                raise ConversionError(
                    f"{self.folder}: {tensor.name} is quantized as {tensor.tensor_type.name}, "
                    "which the package gguf cannot dequantize"
                ) from None


def read_tokenizer_of_gguf(path: Path) -> dict[str, bytes]:
    """Returns the tokenizer of a GGUF file of any model, as files of transformers.

    Raises:
      ConversionError: the file is damaged, or its tokenizer is of an unknown kind.
    """
    metadata = _open_gguf(path).fields
    return gguf_tokenizer_files(path, functools.partial(_value, metadata))


def _open_gguf(path: Path) -> Any:
    try:
        return _import_gguf().GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ConversionError(
            f"{path} is not a GGUF file, or is damaged or cut off: {error}"
        ) from None


def _value(metadata: Mapping[str, Any], key: str, default: Any = None) -> Any:
    return metadata[key].contents() if key in metadata else default


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ConversionError(
            "GGUF files need the package gguf: pip install 'grit-jax[gguf]'"
        ) from None
    return gguf


def _shortest(number: float) -> float:
    """Returns the shortest decimal that equals a number in float32: 1e-5, not 9.99999974e-6."""
    return float(str(np.float32(number)))
