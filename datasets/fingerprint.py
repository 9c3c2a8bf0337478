"""What a run keeps of its data set, so that it goes on, or is compared, on no other in silence."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable
from typing import Any

from datasets.records import Data, Image, Split


def fingerprint(data: Data) -> dict[str, Any]:
    """`name`, and by split `fingerprint` and `counts`.

    A fingerprint is the SHA-256 of all captions, identities, sources, labels and image paths in
    their order. Paths are relative to the data set's folder, so it may be moved; images are not
    read.
    """
    found: dict[str, Any] = {"name": data.name, "fingerprint": {}, "counts": {}}

    def shown(image: Image | None) -> list[object] | None:
        if image is None:
            return None
        path = image.path.removeprefix(data.root).lstrip("/")
        return [unicodedata.normalize("NFC", path), image.attributes or None]

    def note(name: str, pids: set[int], captions: int, images: int, content: object) -> None:
        text = json.dumps(content).encode()
        found["fingerprint"][name] = hashlib.sha256(text).hexdigest()
        found["counts"][name] = {"identities": len(pids), "captions": captions, "images": images}

    samples = data.train
    rows = [[s.pid, s.source, s.caption, shown(s.image), shown(s.pair)] for s in samples]
    paths = {image.path for s in samples for image in s.images}
    note("train", {s.pid for s in samples}, len(samples), len(paths), rows)
    for name, split in data.splits.items():
        content = _content(split, shown)
        images = {image.path for g in split.galleries.values() for image in g.images}
        pids = {*split.image_pids, *split.caption_pids}
        note(name, pids, len(split.captions), len(images), content)
    return found


def _content(split: Split, shown: Callable[[Image], object]) -> list[object]:
    galleries = [
        [view, [shown(image) for image in g.images], g.pids, g.sources]
        for view, g in split.galleries.items()
    ]
    captions = [split.captions, split.caption_pids, split.caption_sources]
    return [split.sources, galleries, captions]


def changes(then: Any, now: dict[str, Any]) -> dict[str, str] | None:
    """By split what differs between two of `fingerprint`, in words; None if `then` is none (a
    checkpoint of before, or of other code)."""
    if not isinstance(then, dict) or not all(
        isinstance(then.get(key), dict) for key in ("fingerprint", "counts")
    ):
        return None
    told = {}
    before = {str(k): v for k, v in then["fingerprint"].items() if isinstance(v, str)}
    for split in dict.fromkeys([*now["fingerprint"], *before]):
        if before.get(split) == now["fingerprint"].get(split):
            continue
        old, new = (_counted(found["counts"].get(split)) for found in (then, now))
        same = "; the same counts, but other content or another order" if old == new else ""
        told[split] = f"{old} then, {new} now{same}"
    return told


def _counted(counts: Any) -> str:
    if not isinstance(counts, dict):
        return "no such split"
    return ", ".join(f"{count} {what}" for what, count in counts.items() if type(count) is int)
