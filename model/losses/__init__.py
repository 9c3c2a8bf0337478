"""The losses, one file a family, and the table of all."""
