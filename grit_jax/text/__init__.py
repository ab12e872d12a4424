"""Text to token ids: templates, tokenizers, input formats, and tokenized examples."""

# Version of the token ids, masks and bytes that `grit-jax prepare` writes for a line. Raise it when
# they change; data of another version are then prepared again. tests/text/test_golden.py fails
# until it is raised.
TEXT_VERSION = 2
