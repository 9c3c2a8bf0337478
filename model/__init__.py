"""Tensors in, features and losses out. It reads files of weights and no data set."""
