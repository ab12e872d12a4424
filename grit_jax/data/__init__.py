"""What every training step needs on the host: mixing, sampling, packing, batches and storage."""
