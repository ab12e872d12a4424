"""Text to token ids: templates, tokenizers, and the examples made from them."""
