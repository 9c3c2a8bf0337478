"""mini-TBAGPR: a rendered stand-in for a text-based aerial-ground pedestrian retrieval data set.

`render` writes a whole data set, `render_people` a few people for the test of a reader.
"""

from .build import Pair, render, render_people

__all__ = ["Pair", "render", "render_people"]
