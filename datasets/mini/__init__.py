"""mini-TBAGPR: a rendered stand-in for a text-based aerial-ground pedestrian retrieval data set."""

from .build import render

__all__ = ["render"]
