"""Reads texts bidirectionally for sentence-transformers: part of an exported grit-jax model.

The model's weights serve generation as well, so its config.json describes a causal model. This
module makes every token see every other one when texts are embedded.
"""

import torch

try:
    from sentence_transformers.sentence_transformer.modules import Transformer
except ImportError:  # Before sentence-transformers 6.
    from sentence_transformers.models import Transformer


class BidirectionalTransformer(Transformer):
    """The transformer module with bidirectional attention, checked when it is loaded."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        language_model = self.auto_model if hasattr(self, "auto_model") else self.model
        language_model.config.is_causal = False
        for layer in language_model.layers:
            layer.self_attn.is_causal = False
        check_is_bidirectional(language_model)


@torch.no_grad()
def check_is_bidirectional(language_model):
    """Raises a RuntimeError unless the first token sees the last, with padding and without."""
    device = language_model.get_input_embeddings().weight.device
    tokens = torch.tensor([[1, 2, 3, 4]], device=device).repeat(2, 1)
    tokens[1, 2] = 5
    without_padding = torch.ones_like(tokens)
    with_padding = without_padding.clone()
    with_padding[:, -1] = 0
    for mask in (without_padding, with_padding):
        first, second = language_model(tokens, attention_mask=mask).last_hidden_state[:, 0]
        if torch.equal(first, second):
            raise RuntimeError(
                "this version of transformers reads the texts causally, which would give wrong "
                "embeddings; use transformers 5 or newer"
            )
