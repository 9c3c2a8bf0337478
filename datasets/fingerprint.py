"""The fingerprint of a data set: a run stores it, to report later that the data has changed."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from datasets.records import Data, Image, Split


def fingerprint(data: Data) -> dict[str, Any]:
    """{"name": ..., "fingerprint": {split: ...}, "counts": {split: ...}}.

    A split's fingerprint is the SHA-256 of all its captions, identities, sources, labels and image
    paths, in their order. Paths are relative to the data set's folder, so the folder may be moved.
    Image files are not read.
    """
    result: dict[str, Any] = {"name": data.name, "fingerprint": {}, "counts": {}}
    shown = partial(_shown, data.root)

    def add(split: str, pids: int, captions: int, images: int, digest: str) -> None:
        result["fingerprint"][split] = digest
        result["counts"][split] = {"identities": pids, "captions": captions, "images": images}

    add("train", *(getattr(data.train, "known", None) or of_train(data)))
    for name, split in data.splits.items():
        text = json.dumps(_content(split, shown)).encode()
        images = {image.path for g in split.galleries.values() for image in g.images}
        pids = {*split.image_pids, *split.caption_pids}
        digest = hashlib.sha256(text).hexdigest()
        add(name, len(pids), len(split.captions), len(images), digest)
    return result


def of_train(data: Data) -> tuple[int, int, int, str]:
    """Identities, captions, images and fingerprint of the training samples."""
    # Sample by sample, since there may be millions: the SHA-256 of the JSON of a list of all.
    sha256, separator = hashlib.sha256(b"["), b""
    paths = array("q")  # their hashes
    for s in data.train:
        images = [_shown(data.root, image) for image in (s.image, s.pair)]
        sha256.update(separator + json.dumps([s.pid, s.source, s.caption, *images]).encode())
        separator = b", "
        paths.extend(hash(image.path) for image in s.images)
    sha256.update(b"]")
    return data.num_identities, len(data.train), len(np.unique(paths)), sha256.hexdigest()


def changes(then: Any, now: dict[str, Any]) -> dict[str, str] | None:
    """What differs between two results of `fingerprint`: by split, a text. None if `then` is not
    such a result (it comes from an old checkpoint, or from other code)."""
    if not isinstance(then, dict) or not all(
        isinstance(then.get(key), dict) for key in ("fingerprint", "counts")
    ):
        return None
    differences = {}
    before = {str(k): v for k, v in then["fingerprint"].items() if isinstance(v, str)}
    for split in dict.fromkeys([*now["fingerprint"], *before]):
        if before.get(split) == now["fingerprint"].get(split):
            continue
        old, new = (_counts_text(result["counts"].get(split)) for result in (then, now))
        same = "; the same counts, but other content or another order" if old == new else ""
        differences[split] = f"{old} then, {new} now{same}"
    return differences


def _shown(root: str, image: Image | None) -> list[object] | None:
    if image is None:
        return None
    path = image.path.removeprefix(root).lstrip("/")
    return [unicodedata.normalize("NFC", path), image.attributes or None]


def _content(split: Split, shown: Callable[[Image], object]) -> list[object]:
    galleries = [
        [view, [shown(image) for image in g.images], g.pids, g.sources]
        for view, g in split.galleries.items()
    ]
    captions = [split.captions, split.caption_pids, split.caption_sources]
    return [split.sources, galleries, captions]


def _counts_text(counts: Any) -> str:
    if not isinstance(counts, dict):
        return "no such split"
    return ", ".join(f"{count} {what}" for what, count in counts.items() if type(count) is int)
