"""Training: the joint loss, GradCache, the train step, the optimizer, checkpoints, the loop."""
