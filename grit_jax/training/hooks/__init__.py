"""Hooks of the training loop: metrics, progress, profiling, signals that stop a run, a watchdog."""
