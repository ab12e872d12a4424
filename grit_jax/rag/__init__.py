"""Retrieval-augmented generation with one model: documents, indexes, caches and answers."""
