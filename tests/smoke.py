"""Embeds and generates with a trained run: python tests/smoke.py RUN."""

import sys

from grit_jax import GritLM

model = GritLM.from_pretrained(sys.argv[1], dtype="float32")
queries = model.encode_query(["bank", "river"], instruction="Given a word, retrieve its meaning")
documents = model.encode_document(["Land next to water.", "A stream."])
print(f"embeddings: {queries.shape} and {documents.shape}")
print(f"answer: {model.chat([{'role': 'user', 'content': 'Who are you?'}], max_new_tokens=8)!r}")
