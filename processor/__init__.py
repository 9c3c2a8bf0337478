"""The training loop, the state that resuming needs, evaluation and inference."""
