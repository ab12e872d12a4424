"""The first module of a grit-jax model in sentence-transformers: part of an exported model.

It computes what `GritLM.encode` computes with the pooling "weightedmean", which counts tokens from
the end of the prompt. Attention is bidirectional if config.json says so in its field "grit"; the
rest of that file describes a causal model, since the same weights also generate text.
"""

import copy

from packaging.version import Version
import sentence_transformers
import torch

if Version(sentence_transformers.__version__) < Version("5.4"):
    raise ImportError(
        "this model needs sentence-transformers 5.4 or newer, not "
        f"{sentence_transformers.__version__}: pip install -U sentence-transformers"
    )

from sentence_transformers.sentence_transformer.modules import Transformer


class GritTransformer(Transformer):
    """A Transformer module with the attention and the prompts of GritLM."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        settings = self.model.config.grit
        self.unpad_inputs = False  # Rows without padding have one prompt length for all texts.
        # "</s>" in a text is four characters, not a special token.
        self.tokenizer.split_special_tokens = True
        if settings["attention"][1] == "b":
            make_bidirectional(self.model)

    def preprocess(self, inputs, prompt=None, **kwargs):
        """Returns the features of texts, with a mask of the tokens to pool if there is a prompt."""
        features = super().preprocess(inputs, prompt=prompt, **kwargs)
        features.pop("prompt_length", None)
        if prompt:
            features["pooling_mask"] = self.mask_prompt(prompt, **features)
        return features

    def mask_prompt(self, prompt, input_ids, attention_mask, **_):
        """Returns the attention mask without the prompt.

        A token with characters of both the prompt and the text belongs to the text.
        """
        prompt_ids = torch.tensor(self.tokenizer(prompt)["input_ids"])
        if len(prompt_ids) >= self.max_seq_length:
            raise ValueError(
                f"the prompt {prompt!r} has {len(prompt_ids)} tokens, which leaves no room for a "
                f"text: raise max_seq_length={self.max_seq_length}, or shorten the prompt"
            )
        start = attention_mask.argmax(dim=1, keepdim=True)  # Rows may be padded on the left.
        indices = (start + torch.arange(len(prompt_ids))).clamp(max=input_ids.shape[1] - 1)
        is_prompt = (input_ids.gather(1, indices) == prompt_ids).cumprod(dim=1)
        end = start + is_prompt.sum(dim=1, keepdim=True)
        return attention_mask * (torch.arange(input_ids.shape[1]) >= end)

    def forward(self, features, **kwargs):
        """Returns the features with the embeddings of tokens, and the mask of those to pool."""
        features = dict(features)
        mask = features.pop("pooling_mask", None)
        features = super().forward(features, **kwargs)
        if mask is None:
            return features
        # Pooling weights tokens by their index in the row, so the text comes first.
        order = torch.argsort(1 - mask, dim=1, stable=True)
        embeddings = features["token_embeddings"]
        features["token_embeddings"] = embeddings.take_along_dim(order.unsqueeze(-1), dim=1)
        features["attention_mask"] = mask.gather(1, order)
        return features


def make_bidirectional(language_model):
    """Makes attention bidirectional, and checks that it is.

    Raises:
      RuntimeError: this version of transformers does not support it.
    """
    config = language_model.config
    config.is_causal = False
    attention_config = config
    if "flash" in config._attn_implementation and getattr(config, "sliding_window", None):
        # A bidirectional window reaches `sliding_window` positions in each direction, but
        # transformers passes one less to FlashAttention.
        attention_config = copy.copy(config)
        attention_config.sliding_window += 1
    for layer in language_model.layers:
        layer.self_attn.is_causal = False
        layer.self_attn.config = attention_config
    check_is_bidirectional(language_model)


@torch.no_grad()
def check_is_bidirectional(language_model):
    """Raises a RuntimeError unless the first token attends to later tokens, padded or not."""
    device = language_model.get_input_embeddings().weight.device
    tokens = torch.tensor([[1, 2, 3, 4]], device=device).repeat(2, 1)
    tokens[1, 1] = 5
    without_padding = torch.ones_like(tokens)
    with_padding = without_padding.clone()
    with_padding[:, -1] = 0
    for mask in (without_padding, with_padding):
        first, second = language_model(tokens, attention_mask=mask).last_hidden_state[:, 0].float()
        # Experts round differently in a batch of other tokens.
        if torch.allclose(first, second, rtol=1e-4, atol=1e-4):
            raise RuntimeError(
                "this version of transformers uses causal attention, which gives wrong embeddings: "
                "use transformers 5 or newer"
            )
