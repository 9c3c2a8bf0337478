"""What a sample is, how it is read from disk and how it becomes a batch. Does not import model."""
