"""What the training loop calls after each step: metrics, progress, profiling, preemption."""
