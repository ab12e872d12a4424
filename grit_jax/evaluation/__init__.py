"""Evaluation: held-out data during training, and the MTEB and lm-eval benchmarks."""
