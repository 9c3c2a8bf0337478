"""mini-TBAGPR: a rendered data set for text-based aerial-ground pedestrian retrieval.

It replaces the real data in demonstrations and tests. `render` writes a complete data set,
`render_people` a few people for the test of a reader, `render_raw` a source from which such a data
set is built.
"""

from .build import Pair, render, render_people
from .raw import render_raw

__all__ = ["Pair", "render", "render_people", "render_raw"]
