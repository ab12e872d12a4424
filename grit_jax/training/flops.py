"""Useful operations of a training step: those that its texts need, however they are computed.

The rule, so that numbers can be compared:

- A product of [m, k] and [k, n] is 2mkn operations. The backward pass is two forward passes.
- Padding and recomputation (rematerialization, GradCache) do not count.
- A token attends to its own text, and causally to half of it, within the layer's sliding window.
- Logits count for targets only, and an expert for the tokens that chose it.
- Frozen weights have no gradient: their backward pass is one forward pass. Low-rank updates, about
  a hundredth of the total, do not count.
"""

from collections.abc import Collection, Sequence

import jax
import numpy as np

from grit_jax.data.batch import Batch, PackedTexts
from grit_jax.data.kinds import BATCH_KINDS
from grit_jax.models import ARCHITECTURES, ModelConfig

# Dense bfloat16 operations per second of a device, from the vendors' data sheets.
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
    """Returns the peak operations per second of all devices, or None if their kind is unknown."""
    kind = devices[0].device_kind
    matching = [name for name in PEAK_FLOPS if kind.startswith(name)]
    if not matching:
        return None
    return PEAK_FLOPS[max(matching, key=len)] * len(devices)


def useful_flops(config: ModelConfig, batch: Batch, causal_streams: Collection[str]) -> float:
    """Returns the useful operations of a training step on this batch.

    Args:
      config: configuration of the model.
      batch: this host's rows of the batch. Other hosts are assumed to have similar rows.
      causal_streams: names of the streams with causal attention.
    """
    num_targets = sum(
        int(np.count_nonzero(texts.mask) * _num_hosts(texts))
        for kind, part in batch.parts.items()
        if BATCH_KINDS[kind].predicts_tokens
        for texts in part.streams.values()
    )
    flops_per_token = ARCHITECTURES[config.architecture].matmul_flops_per_token(config)
    weight_flops = 2.0 * num_targets * config.hidden_size * config.vocab_size
    attention_flops = 0.0
    num_sliding = np.count_nonzero(config.sliding_layers()) if config.sliding_window else 0
    for name, texts in batch.streams.items():
        lengths = np.bincount(texts.segment_ids.ravel())[1:].astype(np.float64)
        is_causal = name in causal_streams
        beyond = np.maximum(lengths - (config.sliding_window or 0), 0)
        # See `attention.window_size`.
        out_of_window = beyond * (beyond + 1 if is_causal else beyond - 1)
        attended = config.num_hidden_layers * np.sum(lengths**2)
        attended -= num_sliding * np.sum(out_of_window)
        attended /= 2 if is_causal else 1
        hosts = _num_hosts(texts)
        width = config.num_attention_heads * config.head_dim
        weight_flops += hosts * np.sum(lengths) * flops_per_token
        attention_flops += hosts * 2.0 * 2.0 * attended * width
    passes = 3.0 if config.lora is None else 2.0
    return float(passes * weight_flops + 3.0 * attention_flops)


def _num_hosts(texts: PackedTexts) -> float:
    """Returns the number of rows of the batch divided by that of this host."""
    return (texts.num_rows or len(texts.tokens)) / len(texts.tokens)
