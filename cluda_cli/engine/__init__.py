"""What runs the networks: the training step and its state, checkpoints, inference, metrics."""
