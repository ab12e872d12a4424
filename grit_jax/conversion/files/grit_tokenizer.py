"""The tokenizer of a grit-jax model in transformers: part of an exported model."""

from transformers import PreTrainedTokenizerFast


class GritTokenizer(PreTrainedTokenizerFast):
    """A tokenizer that follows tokenizer.json."""
