"""Training: sharding, optimizers, the loop, checkpoints."""
