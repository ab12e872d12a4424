"""Useful work of a step: what its texts need, whatever the program does.

The rule, so that numbers can be compared: a product of [m, k] and [k, n] is 2mkn operations; the
backward pass is twice the forward pass; padding does not count, nor does what is computed a second
time (rematerialisation, GradCache); a token attends to its own text only, causal attention to half
of it; logits count where a token is to be learned; an expert counts for the tokens that chose it.
Weights that are not trained have no gradient, so that their backward pass is one forward pass; the
products of low-rank updates, a hundredth of the others, are left out.
"""

from collections.abc import Collection, Sequence

import jax
import numpy as np

from grit_jax.data.batch import Batch, PackedTexts
from grit_jax.data.kinds import BATCH_KINDS
from grit_jax.models import ARCHITECTURES, ModelConfig

# Dense bfloat16 operations a second and device, from the makers' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Returns the operations a second of all devices together, None if their kind is unknown."""
    kind = devices[0].device_kind
    matching = [name for name in PEAK_FLOPS if kind.startswith(name)]
    if not matching:
        return None
    return PEAK_FLOPS[max(matching, key=len)] * len(devices)


def useful_flops(config: ModelConfig, batch: Batch, causal_streams: Collection[str]) -> float:
    """Returns the operations that a training step on this batch needs.

    Args:
      config: configuration of the model.
      batch: the batch, on the host. With several hosts it has this host's rows; the rows of the
        other hosts are assumed to be similar.
      causal_streams: names of the streams with causal attention.
    """
    num_targets = sum(
        int(np.count_nonzero(texts.mask) * _hosts(texts))
        for kind, part in batch.parts.items()
        if BATCH_KINDS[kind].predicts_tokens
        for texts in part.streams.values()
    )
    flops_per_token = ARCHITECTURES[config.architecture].matmul_flops_per_token(config)
    of_weights = 2.0 * num_targets * config.hidden_size * config.vocab_size
    of_attention = 0.0
    for name, texts in batch.streams.items():
        lengths = np.bincount(texts.segment_ids.ravel())[1:].astype(np.float64)
        visible = np.sum(lengths**2) / (2 if name in causal_streams else 1)
        hosts = _hosts(texts)
        width = config.num_attention_heads * config.head_dim
        of_weights += hosts * np.sum(lengths) * flops_per_token
        of_attention += hosts * 2.0 * 2.0 * visible * width * config.num_hidden_layers
    passes = 3.0 if config.lora is None else 2.0
    return float(passes * of_weights + 3.0 * of_attention)


def _hosts(texts: PackedTexts) -> float:
    """Returns how many times this host's rows all rows are."""
    return (texts.num_rows or len(texts.tokens)) / len(texts.tokens)
