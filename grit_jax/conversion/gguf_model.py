"""A model in a GGUF file, the format of llama.cpp: checked, then read by parts as it is needed."""

import functools
from pathlib import Path
import shutil
import tempfile
from typing import Any
import weakref

from jaxtyping import Shaped
import ml_dtypes
import numpy as np

from grit_jax.conversion.fingerprint import fingerprint
from grit_jax.conversion.gguf_tokenizer import gguf_tokenizer
from grit_jax.conversion.hugging_face import load_sharded
from grit_jax.conversion.layout import Index, ParamSpec, parameters
from grit_jax.conversion.safetensors_folder import ConversionError
from grit_jax.conversion.sidecar_files import write_tokenizer
from grit_jax.files import write_json
from grit_jax.models import ModelConfig, config_from_hugging_face
from grit_jax.text.tokenizer import Tokenizer

SUFFIX = ".gguf"
# What llama.cpp calls the models that are Mistrals here. It says nothing else of a Mistral.
ARCHITECTURE = "llama"
# Types that weights are read in as they are stored. All others are made float32 of.
TYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}
# Whose number of rows is that of the tokens.
EMBEDDINGS = "token_embd.weight"
# Sizes in config.json, by their names in a GGUF file.
SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}


class GgufModel:
    """The weights of a Llama or a Mistral as a GGUF file holds them, quantised or not.

    Opening reads the metadata, and checks that all tensors are there, each of its shape, and no
    other. Quantised weights become the numbers in float32 that they stand for.

    Args:
      path: the file.
      tokenizer: path of a tokenizer in the place of the file's own.

    Raises:
      ConversionError: the package `gguf` is not installed; or the file is damaged, or holds what
        these models do not do; the message names it.
    """

    def __init__(self, path: Path, tokenizer: str | None = None):
        self.folder = path
        self._given_tokenizer = tokenizer
        self._gguf = _import_gguf()
        try:
            reader = self._gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise ConversionError(f"{path} is no GGUF file, damaged or cut off: {error}") from None
        self._metadata = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._check_kind()
        self.fields = self._fields()
        try:
            self.config: ModelConfig = config_from_hugging_face(self.fields)
        except ValueError as error:
            raise ConversionError(f"{path}, as a {error}") from None
        self.parameters = parameters(self.config)
        self._names = self._gguf.get_tensor_name_map(
            self._gguf.MODEL_ARCH.LLAMA, self.config.num_hidden_layers
        )
        self._check_tensors()

    @functools.cached_property
    def tokenizer_folder(self) -> Path:
        """A folder with the tokenizer that the metadata describe, there as long as this object.

        Raises:
          ConversionError: it is of a kind that is not known.
          FileNotFoundError, TokenizerError: one was given that is not there, or is damaged.
        """
        folder = Path(tempfile.mkdtemp(prefix="gguf_tokenizer"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        path = self._given_tokenizer
        if path is None:
            name, content, special = gguf_tokenizer(self.folder, self._value)
            path = str(folder / name)
            Path(path).write_bytes(content)
            write_json(folder / "tokenizer_config.json", special)
        write_tokenizer(Tokenizer(path), folder, self.config.max_position_embeddings)
        return folder

    def dtype(self, parameter: ParamSpec) -> np.dtype:
        """Returns the type that the parameter is read in."""
        stored = {self._tensor(name).tensor_type.name for _, name in parameter.tensors()}
        return np.dtype(TYPES.get(stored.pop(), np.float32) if len(stored) == 1 else np.float32)

    def read(self, parameter: ParamSpec, index: Index) -> Shaped[np.ndarray, "..."]:
        """Returns a part of a parameter, of which no more than the rows it needs are read."""
        return parameter.read(index, self._read).astype(self.dtype(parameter), copy=False)

    def load(self, shapes: dict[str, Any]) -> dict[str, Any]:
        """Returns the parameters as global arrays, see `HuggingFaceModel.load`."""
        return load_sharded(self, shapes)

    def fingerprint(self) -> str:
        """Returns what tells these weights from others, see `fingerprint`."""
        return fingerprint("gguf", [self.folder])

    def _value(self, key: str, default: Any = None) -> Any:
        return self._metadata[key].contents() if key in self._metadata else default

    def _setting(self, name: str, default: Any = None) -> Any:
        return self._value(f"{ARCHITECTURE}.{name}", default)

    def _tensor(self, name: str) -> Any:
        """Returns the tensor that Hugging Face calls `name`."""
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
        """Returns where the rows of a query's or key's matrix lie.

        llama.cpp rotates neighbours (0, 1), (2, 3), ... of a head, where Hugging Face rotates
        (0, H/2), (1, H/2 + 1), ...: in the file, the two halves of a head take turns.
        """
        places = np.arange(num_rows).reshape(-1, self.config.head_dim // 2, 2)
        return places.swapaxes(1, 2).ravel()

    def _check_kind(self) -> None:
        architecture = self._value("general.architecture")
        if architecture != ARCHITECTURE:
            raise ConversionError(
                f"{self.folder} holds a model of the architecture {architecture!r}; only "
                f"{ARCHITECTURE!r} is read, which Llama and Mistral have"
            )
        if self._setting("expert_count", 0):
            raise ConversionError(f"{self.folder} has experts: a Mixtral is read from safetensors")
        if self._value("split.count", 1) > 1:
            raise ConversionError(
                f"{self.folder} is one of several parts: llama-gguf-split --merge makes one file"
            )
        if "rope_freqs.weight" in self._tensors:
            raise ConversionError(
                f"{self.folder} has scaled rotary frequencies, as Llama 3.1 and later have, which "
                "are not supported"
            )

    def _fields(self) -> dict[str, Any]:
        """Returns what a config.json would hold of this model."""
        sizes = {ours: self._setting(name) for ours, name in SIZES.items()}
        if missing := [SIZES[name] for name, size in sizes.items() if size is None]:
            raise ConversionError(f"{self.folder} does not say {ARCHITECTURE}.{missing[0]}")
        if EMBEDDINGS not in self._tensors:
            raise ConversionError(f"{self.folder} lacks 1 tensors: {EMBEDDINGS}")
        heads = sizes["num_attention_heads"]
        head_dim = self._setting("attention.key_length", sizes["hidden_size"] // heads)
        if self._setting("rope.dimension_count", head_dim) != head_dim:
            raise ConversionError(f"{self.folder} rotates a part of each head: not supported")
        # Old files have another name for the factor, and a factor alone means "linear".
        factor = self._setting("rope.scaling.factor", self._setting("rope.scale_linear", 1.0))
        kind = self._setting("rope.scaling.type", "none" if factor in (0, 1) else "linear")
        rope = {"rope_type": kind.replace("none", "default")}
        end, end_of_turn = (self._value(f"tokenizer.ggml.{n}_token_id") for n in ("eos", "eot"))
        ends = [token for token in dict.fromkeys((end, end_of_turn)) if token is not None]
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **sizes,
            "num_key_value_heads": self._setting("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "vocab_size": int(self._tensors[EMBEDDINGS].shape[-1]),
            "rms_norm_eps": _as_written(self._setting("attention.layer_norm_rms_epsilon", 1e-6)),
            "rope_parameters": rope | {"rope_theta": self._setting("rope.freq_base", 10000.0)},
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
        present = set(self._tensors)
        for verb, names in (
            ("lacks", expected.keys() - present),
            ("has unknown", present - expected.keys()),
        ):
            if names:
                shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
                raise ConversionError(f"{self.folder} {verb} {len(names)} tensors: {shown}")
        for name, parameter in expected.items():
            tensor = self._tensors[name]
            shape = tuple(int(size) for size in reversed(tensor.shape))
            if shape != parameter.tensor_shape:
                raise ConversionError(
                    f"{self.folder}: {name} has the shape {shape}, but its metadata ask for "
                    f"{parameter.tensor_shape}"
                )
        for tensor in {t.tensor_type: t for t in self._tensors.values()}.values():
            try:
                self._gguf.dequantize(tensor.data[:1], tensor.tensor_type)
            except NotImplementedError:
                raise ConversionError(
                    f"{self.folder}: {tensor.name} is quantised as {tensor.tensor_type.name}, "
                    "which the package gguf cannot undo"
                ) from None


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ConversionError(
            "GGUF files are read with the package gguf: pip install 'grit-jax[gguf]'"
        ) from None
    return gguf


def _as_written(number: float) -> float:
    """Returns the shortest number that is the same in float32: 1e-5, not 9.99999974e-6."""
    return float(str(np.float32(number)))
