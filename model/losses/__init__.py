"""The losses, one file for each family, and the table of all losses."""
