"""Offline preparation: reads sources, tokenizes them, and writes ArrayRecord shards."""
