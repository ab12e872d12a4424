"""Exports a model as a folder for transformers, sentence-transformers and vLLM."""

import dataclasses
import os
from pathlib import Path
import shutil

import ml_dtypes
import numpy as np

from grit_jax.conversion.atomic_folder import atomic_folder, check_space
from grit_jax.conversion.layout import ParamSpec
from grit_jax.conversion.model_card import write_card
from grit_jax.conversion.safetensors_folder import INDEX, SINGLE, write_tensors
from grit_jax.conversion.sidecar_files import (
    needs_code,
    write_chat_template,
    write_json,
    write_sentence_transformers,
    write_tokenizer,
)
from grit_jax.conversion.stored_model import ConversionError, StoredModel
from grit_jax.conversion.stored_tokenizer import find_tokenizer
from grit_jax.models import ARCHITECTURES
from grit_jax.models.weights import DENSE
from grit_jax.objectives.embedding import GRIT_FIELD, PATTERNS, EmbeddingSpec
from grit_jax.text.tokenizer import Tokenizer

# Default size of a file of weights. It bounds the memory of an export.
SHARD_BYTES = 2**30
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# Patterns that the exported model can follow: sentence-transformers cannot mix the two kinds of
# attention in one text, as cbcc does.
EXPORTED_PATTERNS = tuple(pattern for pattern in PATTERNS if pattern[0] == pattern[1])
# Fields of config.json that are not copied: they are written anew, name code that the export
# neither has nor needs, or say with which attention the source is read. `dtype` is the new name of
# `torch_dtype`, and has precedence.
NOT_EXPORTED = ("auto_map", "dtype", "is_causal", "use_bidirectional_attention")
GENERATION, EMBEDDING, BOTH = PURPOSES = ("generation", "embedding", "both")


def write_hugging_face(
    model: StoredModel,
    folder: Path,
    *,
    purpose: str | None = None,
    tokenizer: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    pooling: str | None = None,
    query_instruction: str | None = None,
    document_instruction: str | None = None,
    license_name: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> EmbeddingSpec:
    """Exports a model as a Hugging Face folder.

    If writing fails, nothing is left behind.

    Args:
      model: the model to export.
      folder: the folder to create.
      purpose: "generation" leaves out the files of sentence-transformers; "embedding" makes
        attention bidirectional in config.json, for servers that read nothing else; "both" makes
        these two folders, called so, with shared files of weights. By default one folder generates
        with transformers and embeds with sentence-transformers.
      tokenizer: see `open_tokenizer`; by default see `find_tokenizer`.
      dtype: "float32", "bfloat16" or "float16"; by default the stored type of each tensor.
      attention: the attention pattern of the model, "bbcc" or "cccc"; by default the one stored
        with the model, or "bbcc".
      pooling: the pooling of its embeddings; by default the one stored with the model, or "mean".
      query_instruction: what precedes a query by default, in plain words; by default the one stored
        with the model, or none.
      document_instruction: what precedes a document by default, as for queries.
      license_name: the license in the model card, an identifier of the Hub; by default the one in
        the base model's card, if there is one.
      shard_bytes: the maximum size of a file of weights. A larger tensor has a file to itself.

    Returns:
      How the exported model embeds.

    Raises:
      ConversionError: the folder exists, the disk is full, the pattern cannot be exported, the
        model has no tokenizer that fits, cannot generate, or needs code of its own to embed
        (pooling "weightedmean"), or a weight is not finite in the type to write.
      ValueError: the purpose, the attention pattern or the pooling is unknown, or an instruction
        has the model's markers.
      FileNotFoundError, TokenizerError: the tokenizer is missing or damaged.
    """
    spec = EmbeddingSpec.from_fields(
        model.fields,
        attention,
        pooling,
        query_instruction=query_instruction,
        document_instruction=document_instruction,
    )
    if spec.attention not in EXPORTED_PATTERNS:
        raise ConversionError(
            f"{model.folder} was trained with the pattern {spec.attention!r}, which "
            f"sentence-transformers does not support: use --attention "
            f"{' or '.join(EXPORTED_PATTERNS)}"
        )
    _check_purpose(model, purpose, spec)
    found = find_tokenizer(model, tokenizer)
    if found is None:
        raise ConversionError(
            f"{model.folder} has no tokenizer: name the one it was trained with (--tokenizer PATH)"
        )
    with atomic_folder(folder) as unfinished:
        unfinished.mkdir()
        parts: dict[str | None, Path] = {purpose: unfinished}
        if purpose == BOTH:
            parts = {name: unfinished / name for name in (GENERATION, EMBEDDING)}
        for name, part in parts.items():
            part.mkdir(exist_ok=True)
            _write_small_files(model, part, found, spec, name)
        first, *others = parts.values()
        stored_dtype = write_weights(model, first, dtype, shard_bytes)
        for other in others:
            _share_weights(first, other)
        for name, part in parts.items():
            _write_config(model, part, spec, name, stored_dtype)
            title = part.relative_to(unfinished.parent).as_posix()
            write_card(part, title, model, spec, license_name)
    return spec


def _check_purpose(model: StoredModel, purpose: str | None, spec: EmbeddingSpec) -> None:
    if purpose not in (None, *PURPOSES):
        raise ValueError(f"purpose={purpose!r} must be one of {', '.join(PURPOSES)}, or None")
    if purpose in (GENERATION, BOTH) and not model.config.has_lm_head:
        raise ConversionError(
            f"{model.folder} cannot generate, as it has no head: use --for embedding"
        )
    if purpose in (EMBEDDING, BOTH) and needs_code(spec):
        raise ConversionError(
            "sentence-transformers needs code of the export's own for pooling='weightedmean': "
            "leave out --for, and load the export with trust_remote_code=True"
        )


def _write_small_files(
    model: StoredModel,
    folder: Path,
    tokenizer: Tokenizer,
    spec: EmbeddingSpec,
    purpose: str | None,
) -> None:
    """Writes everything but the weights and what depends on their type."""
    model_type = model.fields["model_type"]
    write_tokenizer(tokenizer, folder, model_type, model.config.max_position_embeddings)
    write_chat_template(folder, tokenizer)
    if purpose != GENERATION:
        write_sentence_transformers(folder, model.config, spec)
    ends = {name: model.fields.get(name) for name in ("bos_token_id", "eos_token_id")}
    write_json(folder / "generation_config.json", ends)


def _write_config(
    model: StoredModel, folder: Path, spec: EmbeddingSpec, purpose: str | None, dtype: str
) -> None:
    fields = {name: value for name, value in model.fields.items() if name not in NOT_EXPORTED}
    fields |= {"torch_dtype": dtype, "architectures": [_class_name(model)], **spec.to_fields()}
    if purpose != GENERATION:  # Then we read the prompts, too, from sentence-transformers' file.
        for kind in ("query", "document"):
            del fields[GRIT_FIELD][f"{kind}_prompt"]
    if spec.attention[1] == "b" and purpose is None:
        fields["is_causal"] = True  # sentence-transformers only changes fields that it finds.
    elif spec.attention[1] == "b" and purpose != GENERATION:
        fields = ARCHITECTURES[model.config.architecture].bidirectional_fields(fields)
    write_json(folder / "config.json", fields)


def _share_weights(source: Path, folder: Path) -> None:
    """Makes the files of weights of a folder appear in another; copies where links cannot be."""
    for path in [*source.rglob("*.safetensors"), *source.glob(INDEX)]:
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)
        except OSError:
            check_space(target.parent, path.stat().st_size)
            shutil.copyfile(path, target)
            shutil.copymode(path, target)


def _class_name(model: StoredModel) -> str:
    """Returns the class of transformers for a model."""
    formats = [form for architecture in ARCHITECTURES.values() for form in architecture.formats]
    model_type = model.fields["model_type"]
    return next(f.class_for(model.config) for f in formats if f.model_type == model_type)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor to write.

    Attributes:
      name: its name in Hugging Face's checkpoints.
      stack_index: index of its layer (and expert) in the stacked parameter; () if the parameter is
        not stacked.
      parameter: the parameter that it is a part of.
      dtype: the type to write.
    """

    name: str
    stack_index: tuple[int, ...]
    parameter: ParamSpec
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.parameter.shape)) * self.dtype.itemsize

    def read(self, model: StoredModel) -> np.ndarray:
        shape = self.parameter.shape
        index = tuple(slice(i, i + 1) for i in self.stack_index)
        index += tuple(slice(0, size) for size in shape)
        array = model.read(self.parameter, index).reshape(shape)
        self._check_finite(array, f"in {model.folder}: choose another checkpoint")
        with np.errstate(over="ignore"):
            array = self.parameter.to_tensor(array).astype(self.dtype, copy=False)
        self._check_finite(array, f"as {self.dtype.name}: use --dtype bfloat16 or float32")
        return array

    def _check_finite(self, array: np.ndarray, where: str) -> None:
        count = array.size - np.count_nonzero(np.isfinite(array))
        if count:
            raise ConversionError(
                f"{self.name} has {count:,} values that are NaN or infinite {where}"
            )


def write_weights(model: StoredModel, folder: Path, dtype: str | None, shard_bytes: int) -> str:
    """Writes the weights as safetensors, file by file; returns the most common type."""
    tensors = [
        _Tensor(name, index, parameter, _dtype(model, parameter, name, dtype))
        for parameter in model.parameters
        for index, name in parameter.tensors()
    ]
    check_space(folder.parent, sum(tensor.num_bytes for tensor in tensors))
    _write_dense(model, folder, [tensor for tensor in tensors if _is_dense(tensor.name)])
    tensors = [tensor for tensor in tensors if not _is_dense(tensor.name)]
    # Layer by layer, as transformers writes them.
    tensors.sort(key=lambda tensor: (len(tensor.stack_index) > 0, tensor.stack_index[:1]))
    shards = _split(tensors, shard_bytes)
    file_names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        file_names = [SINGLE]
    for file_name, shard in zip(file_names, shards, strict=True):
        content = {tensor.name: tensor.read(model) for tensor in shard}
        write_tensors(folder / file_name, content)
    if len(shards) > 1:
        files = zip(file_names, shards, strict=True)
        weight_map = {tensor.name: file_name for file_name, shard in files for tensor in shard}
        total = sum(tensor.num_bytes for tensor in tensors)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    dtypes = [tensor.dtype.name for tensor in tensors]
    return max(dtypes, key=dtypes.count)


def _dtype(model: StoredModel, parameter: ParamSpec, name: str, dtype: str | None) -> np.dtype:
    """Returns the type to write a tensor in: the given one, or the stored one."""
    if _is_dense(name):
        return np.dtype(np.float32)  # sentence-transformers computes this layer in float32.
    return model.dtype(parameter) if dtype is None else np.dtype(DTYPES[dtype])


def _is_dense(name: str) -> bool:
    """Returns whether a tensor belongs to the embedding projection, which has its own folder."""
    return name.partition("/")[0] in DENSE


def _write_dense(model: StoredModel, folder: Path, tensors: list[_Tensor]) -> None:
    """Writes the embedding projection, if there is one, for sentence-transformers."""
    for name in DENSE:
        own = [tensor for tensor in tensors if tensor.name.startswith(f"{name}/")]
        if own:
            content = {tensor.name.removeprefix(f"{name}/"): tensor.read(model) for tensor in own}
            write_tensors(folder / name / SINGLE, content)


def _split(tensors: list[_Tensor], shard_bytes: int) -> list[list[_Tensor]]:
    """Splits the tensors, in order, into shards of at most `shard_bytes`."""
    shards: list[list[_Tensor]] = []
    filled = shard_bytes
    for tensor in tensors:
        if filled + tensor.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    return shards
