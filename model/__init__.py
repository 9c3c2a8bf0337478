"""Tensors in, features and losses out. Of files it knows only weights, and no data set."""
