"""Parameter groups, optimizers and learning rates."""
