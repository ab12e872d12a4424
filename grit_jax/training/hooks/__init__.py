"""Hooks of the training loop: metrics, progress, profiling, preemption, a watchdog."""
