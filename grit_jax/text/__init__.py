"""Text to token ids: templates, tokenizers, input formats, and tokenized examples."""

# Version of the token ids, masks and bytes that `grit-jax prepare` writes for a line. Raise it
# when they change (tests/text/test_golden.py checks). Training reads data of earlier versions;
# `grit-jax prepare` prepares them again.
TEXT_VERSION = 3
