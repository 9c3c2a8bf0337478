"""Paths of files as a gallery keeps them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def stored_path(path: str, root: str) -> str:
    """How the gallery keeps a path: relative to its root if it is below."""
    return os.path.relpath(path, root) if path.startswith(f"{root.rstrip('/')}/") else path


def below(paths: pa.ChunkedArray, roots: Sequence[str]) -> np.ndarray:
    """Which paths are one of the roots, or below one: a mask [N]. The root "" has all relative
    paths below it."""
    mask = np.zeros(len(paths), bool)
    for root in roots:
        if not is_unicode(root):  # Arrow's text, like all Unicode, has no lone surrogates
            continue
        if root == "":
            mask |= ~pc.starts_with(paths, "/").to_numpy(zero_copy_only=False)
        else:
            mask |= pc.equal(paths, root).to_numpy(zero_copy_only=False)
            mask |= pc.starts_with(paths, f"{root.rstrip('/')}/").to_numpy(zero_copy_only=False)
    return mask


def is_unicode(text: str) -> bool:
    """Whether a gallery can have a text, such as the name of a file: some names are other bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
