"""A fingerprint of a model, which recognizes the model that built an index."""

from collections.abc import Mapping
import hashlib
from typing import Any

from flax import nnx
from flax.traverse_util import flatten_dict
import jax
from jaxtyping import Array, Float32, Int
import numpy as np

from grit_jax.inference.gritlm import GritLM
from grit_jax.models import Decoder

# The fingerprint has the embedding of these tokens, which depends on pooling, attention pattern and
# normalization too. Between float32 and bfloat16 its cosine similarity is above 0.999.
PROBE_TOKENS = list(range(3, 35))
MIN_COSINE, MIN_NORM_RATIO = 0.99, 0.9
# It also has this many values of each parameter, since finetuning may change an embedding less than
# rounding does. A text is embedded without the head.
NUM_VALUES = 32
HEAD = ("head",)
# Of an axis, only the first indices are sampled: frequent tokens, and so those that are trained,
# have low IDs.
MAX_INDEX = 4096
# Opened from float32 and from float16, a weight may have two neighboring values in bfloat16, which
# differ by up to 2^-7 of it. Each is assumed to have half of this error, and a margin; below the
# smallest normal float16, the error is absolute.
RELATIVE_ERROR, ABSOLUTE_ERROR = 1.01 * 2**-8, 1.01 * 2**-25
# Of an int8 weight, the error in units of its scale.
INT8_ERROR = 0.505


def fingerprint(model: GritLM) -> dict[str, Any]:
    """Returns the fingerprint of a model, as JSON values."""
    return {"probe": _probe(model).tolist(), "weights": _sample_weights(model.model)}


def is_same_model(stored: Mapping[str, Any], model: GritLM) -> bool:
    """Returns whether a fingerprint is a model's, opened in any dtype, on any devices.

    Args:
      stored: the result of `fingerprint`. Indexes of earlier versions have only its "probe".
      model: the model.
    """
    first, second = np.array(stored["probe"], np.float32), _probe(model)
    if first.shape != second.shape:
        return False
    norms = np.linalg.norm(first), np.linalg.norm(second)
    if first @ second < MIN_COSINE * np.prod(norms) or min(norms) < MIN_NORM_RATIO * max(norms):
        return False
    return "weights" not in stored or _have_same_weights(
        stored["weights"], _sample_weights(model.model)
    )


def _have_same_weights(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    if first.keys() != second.keys():
        return False
    for path in first:
        differences = np.abs(np.subtract(first[path]["values"], second[path]["values"]))
        if (differences > np.add(first[path]["errors"], second[path]["errors"])).any():
            return False
    return True


def _probe(model: GritLM) -> Float32[np.ndarray, " P"]:
    """Returns the model's embedding of `PROBE_TOKENS`."""
    return model.encode([token % model.model.config.vocab_size for token in PROBE_TOKENS])


def _sample_weights(model: Decoder) -> dict[str, Any]:
    """Returns some values of each parameter, and the largest rounding error of each value."""
    arrays: dict[Any, Any] = dict(flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    arrays.pop(HEAD, None)
    scale_paths = {path: (*path[:-1], f"{path[-1]}_scale") for path in arrays}
    scale_paths = {path: scale for path, scale in scale_paths.items() if scale in arrays}
    weights = {path: arrays[path] for path in arrays.keys() - scale_paths.values()}
    positions = {path: _positions(path, array.shape) for path, array in weights.items()}
    for path, scale in scale_paths.items():  # In a scale, the axes of the inputs have size 1.
        last = np.array(arrays[scale].shape, np.int32)[:, None] - 1
        positions[scale] = np.minimum(positions[path], last)
    sampled = {
        path: np.asarray(values, np.float32) for path, values in _take(arrays, positions).items()
    }
    result = {}
    for path in sorted(weights):
        values, scale = sampled[path], sampled.get(scale_paths.get(path))
        if scale is not None:
            values = values * scale
        errors = RELATIVE_ERROR * np.abs(values) + ABSOLUTE_ERROR
        if scale is not None:
            errors += INT8_ERROR * scale
        result[".".join(path)] = {"values": values.tolist(), "errors": errors.tolist()}
    return result


@jax.jit
def _take(arrays: dict[Any, Array], positions: dict[Any, Int[Array, "axes N"]]) -> dict[Any, Array]:
    """Returns N values of each array."""
    return {path: arrays[path][tuple(where)] for path, where in positions.items()}


def _positions(path: tuple[str, ...], shape: tuple[int, ...]) -> Int[np.ndarray, "axes N"]:
    """Returns positions in a parameter, which depend on its path and shape only."""
    positions = np.zeros((len(shape), NUM_VALUES), np.int32)
    for sample in range(NUM_VALUES):
        digest = hashlib.sha256(f"{'.'.join(path)} {sample}".encode()).digest()
        number = int.from_bytes(digest)
        for axis, size in enumerate(shape):
            number, positions[axis, sample] = divmod(number, min(size, MAX_INDEX))
    return positions
