"""Retrieval-augmented generation with one model: documents, indexes, KV caches and answers."""
