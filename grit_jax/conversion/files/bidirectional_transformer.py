"""Bidirectional attention for sentence-transformers: part of an exported grit-jax model.

The same weights also generate text, so config.json describes a causal model. When texts are
embedded, this module lets every token attend to every other token.
"""

import torch

try:
    from sentence_transformers.sentence_transformer.modules import Transformer
except ImportError:  # Before sentence-transformers 6.
    from sentence_transformers.models import Transformer


class BidirectionalTransformer(Transformer):
    """A Transformer module with bidirectional attention, which is checked when it is loaded."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        language_model = self.auto_model if hasattr(self, "auto_model") else self.model
        language_model.config.is_causal = False
        for layer in language_model.layers:
            layer.self_attn.is_causal = False
        check_is_bidirectional(language_model)


@torch.no_grad()
def check_is_bidirectional(language_model):
    """Raises a RuntimeError unless the first token attends to later tokens, padded or not."""
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
                "this version of transformers uses causal attention, which gives wrong embeddings: "
                "use transformers 5 or newer"
            )
