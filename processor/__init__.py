"""The training loop, what survives a run that is cut off, and evaluation."""
