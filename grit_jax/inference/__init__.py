"""Inference: `GritLM`, which embeds texts, generates text and scores continuations."""
