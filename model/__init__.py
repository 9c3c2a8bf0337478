"""Tensors in, features and losses out. It reads files of weights and no data set."""

from __future__ import annotations

import sys

# open_clip imports these for models that this project refuses (model/weights.py), and finds them
# missing: they take a quarter of the time of all imports. Whoever imports them later gets them.
_unused = [name for name in ("timm", "transformers") if name not in sys.modules]
sys.modules.update(dict.fromkeys(_unused))  # type: ignore[arg-type]  # None: raises ImportError

import open_clip  # noqa: E402, F401

for _name in _unused:
    del sys.modules[_name]
