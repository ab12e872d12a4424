"""Checks that the installed transformers makes attention bidirectional if config.json says so."""

from importlib import util
from typing import Any

from grit_jax.conversion.stored_model import warn

# Sizes of a model that is computed in no time.
SIZES = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Experts round differently in a batch of other tokens.
ROUNDING = 1e-4


def warn_if_causal(model_type: str) -> None:
    """Warns if the installed transformers ignores `is_causal` in a config.json of this type.

    Without transformers, it does nothing.
    """
    if not all(util.find_spec(package) for package in ("torch", "transformers")):
        return
    import transformers

    if not is_bidirectional(model_type, is_causal=False):
        warn(
            f"transformers {transformers.__version__} reads the export with causal attention, "
            "which gives wrong embeddings: pip install -U 'transformers>=5.2' where it is used"
        )


def is_bidirectional(model_type: str, **fields: Any) -> bool:
    """Returns whether the first token of a small random model attends to later tokens.

    Args:
      model_type: a type that transformers knows.
      **fields: fields of its config.json.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **SIZES, **fields)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config).eval()
        tokens = torch.tensor([[1, 2, 3, 4], [1, 5, 3, 4]])
        masks = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])  # Without padding, and with it.
        hidden = [model(tokens, attention_mask=mask.expand(2, -1))[0] for mask in masks]
    return all(float((a[0] - b[0]).abs().max()) > ROUNDING for a, b in hidden)
