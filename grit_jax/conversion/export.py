"""A model as a folder that transformers, sentence-transformers and vLLM load."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from grit_jax.conversion import Model
from grit_jax.conversion.atomic_folder import atomic_folder, check_space
from grit_jax.conversion.layout import DENSE, ParamSpec
from grit_jax.conversion.safetensors_folder import INDEX, SINGLE, ConversionError
from grit_jax.conversion.sidecar_files import (
    copy_tokenizer,
    write_chat_template,
    write_json,
    write_sentence_transformers,
    write_tokenizer,
)
from grit_jax.objectives.embedding import EmbeddingSpec
from grit_jax.text.tokenizer import MISTRAL, SENTENCEPIECE, Tokenizer, tokenizer_in

# Bytes of a file of weights: what has to fit in memory.
SHARD_BYTES = 2**30
TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def write_hugging_face(
    model: Model,
    folder: Path,
    *,
    tokenizer: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    pooling: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model as a folder for transformers and sentence-transformers.

    The folder is whole or not there.

    Args:
      model: the weights.
      folder: must not exist.
      tokenizer: name or path, see `data.tokenizer`; by default the tokenizer that lies with the
        model, else Mistral's.
      dtype: "float32", "bfloat16" or "float16"; by default each tensor's own.
      attention: pattern of the model, by which embeddings are read bidirectionally or causally; by
        default the one that the model says, else "bbcc".
      pooling: of the embeddings; by default the one that the model says, else "mean".
      shard_bytes: largest size of a file of weights, unless one tensor is larger.

    Raises:
      ConversionError: the folder exists, the disk is full, or the tokenizer is not the model's.
      FileNotFoundError, TokenizerError: there is no such tokenizer, or it is damaged.
    """
    spec = EmbeddingSpec.from_fields(model.fields, attention, pooling)
    if spec.attention == "cbcc":
        raise ConversionError(
            f"{model.folder} was trained in the pattern 'cbcc', which sentence-transformers does "
            "not have: say --attention bbcc or cccc"
        )
    with atomic_folder(folder) as unfinished:
        unfinished.mkdir()
        _write_tokenizer(model, unfinished, tokenizer)
        write_chat_template(unfinished)
        write_sentence_transformers(unfinished, model.config, spec)
        stored = write_weights(model, unfinished, dtype, shard_bytes)
        fields = model.fields | {"torch_dtype": stored, **spec.to_fields()}
        fields["architectures"] = [f"{model.fields['model_type'].capitalize()}ForCausalLM"]
        fields.pop("dtype", None)  # Its newer name, which would win, has the source's type.
        fields.pop("auto_map", None)  # Code that is not in the folder, nor needed.
        write_json(unfinished / "config.json", fields)
        ends = {name: model.fields.get(name) for name in ("bos_token_id", "eos_token_id")}
        write_json(unfinished / "generation_config.json", ends)


def write_weights(model: Model, folder: Path, dtype: str | None, shard_bytes: int) -> str:
    """Writes the weights in safetensors, a file at a time; returns the type of most of them."""
    tensors = [
        (name, place, parameter, np.dtype(TYPES[dtype] if dtype else model.dtype(parameter)))
        for parameter in model.parameters
        for place, name in parameter.tensors()
    ]
    check_space(folder.parent, sum(_bytes(tensor) for tensor in tensors))
    _write_dense(model, folder, [tensor for tensor in tensors if _is_dense(tensor)])
    # Layer by layer, as transformers writes them.
    tensors = [tensor for tensor in tensors if not _is_dense(tensor)]
    tensors.sort(key=lambda tensor: (len(tensor[1]) > 0, tensor[1][:1]))
    shards = _split(tensors, shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]
    for file_name, shard in zip(names, shards, strict=True):
        content = {name: _read(model, *tensor) for name, *tensor in shard}
        save_file(content, folder / file_name, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {
            tensor[0]: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        total = sum(_bytes(tensor) for tensor in tensors)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return max((kind.name for *_, kind in tensors), key=[k.name for *_, k in tensors].count)


def _write_dense(model: Model, folder: Path, tensors: list[Any]) -> None:
    """Writes the layer that makes embeddings of pooled hidden states, where there is one.

    In float32, which sentence-transformers computes it in.
    """
    if not tensors:
        return
    content = {
        name.removeprefix(f"{DENSE}/"): _read(model, place, parameter, np.dtype(np.float32))
        for name, place, parameter, _ in tensors
    }
    save_file(content, folder / DENSE / SINGLE, metadata={"format": "pt"})


def _is_dense(tensor: Any) -> bool:
    return tensor[0].startswith(f"{DENSE}/")


def _read(model: Model, place: tuple[int, ...], parameter: ParamSpec, kind: np.dtype) -> np.ndarray:
    index = tuple(slice(i, i + 1) for i in place) + tuple(slice(0, s) for s in parameter.shape)
    part = model.read(parameter, index).reshape(parameter.shape)
    return parameter.to_tensor(part).astype(kind, copy=False)


def _bytes(tensor: Any) -> int:
    _, _, parameter, kind = tensor
    return int(np.prod(parameter.shape)) * kind.itemsize


def _split(tensors: list[Any], shard_bytes: int) -> list[list[Any]]:
    """Returns the tensors in runs that are each as large as a file may be."""
    shards: list[list[Any]] = []
    filled = shard_bytes
    for tensor in tensors:
        if filled + _bytes(tensor) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += _bytes(tensor)
    return shards


def _write_tokenizer(model: Model, folder: Path, name: str | None) -> None:
    """Writes the tokenizer of that name, else the model's own, else Mistral's."""
    if name is None:
        copy_tokenizer(model.tokenizer_folder, folder)
        if (folder / SENTENCEPIECE).exists() and (folder / "tokenizer_config.json").exists():
            return  # What lies beside it is as its model needs it.
    own = tokenizer_in(folder)
    tokenizer = Tokenizer(name or (MISTRAL if own is None else str(own)))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConversionError(
            f"the tokenizer {name or MISTRAL!r} has {tokenizer.vocab_size} pieces, but the model "
            f"{model.folder} only {model.config.vocab_size}; name its own with --tokenizer"
        )
    for file in folder.iterdir():  # Of a copied tokenizer, what would contradict what is written.
        file.unlink()
    write_tokenizer(tokenizer, folder, model.config.max_position_embeddings)
