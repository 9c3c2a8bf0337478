"""An encoder that needs no torch: what `tools/export.py --onnx` wrote, in ONNX Runtime.

    encoder = OnnxEncoder("exported")
    scores_QG = encoder.encode_text(["a man in red"]) @ encoder.encode_image(["1.jpg", "2.jpg"]).T

Features are those of the run to about 1e-4. Shapes: Q captions, G images, D width of the features.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from datasets.images import load_resized, resized, upright
from gallery.pictures import Picture
from utils.bpe import MERGES
from utils.documents import read_json_file
from utils.errors import UserError
from utils.tokenizer import END, START, limited

VERSION = 1  # of the folder; increase it when old code cannot read it
IMAGE, TEXT, ABOUT = "image.onnx", "text.onnx", "encoder.json"
BATCH = 64  # images or captions at a time
# What encoder.json must have.
TYPES: Mapping[str, type] = {
    "version": int, "image_size": list, "text_length": int, "embed_dim": int, "attributes": dict,
}  # fmt: skip


class OnnxEncoder:
    """Both encoders of a run.

    Attributes:
        about: the content of encoder.json.
        attributes: the classes of each attribute of FIRM's head; {} without that head.

    Args:
        folder: what `tools/export.py --onnx` wrote.

    Raises UserError if a file is missing or corrupted, or ONNX Runtime is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        runtime, self.folder = import_onnxruntime(), Path(folder)
        self.about = _read_about(self.folder)
        self.attributes = {n: tuple(c) for n, c in self.about["attributes"].items()}
        height, width = self.about["image_size"]
        self.image_size = height, width
        self._sessions = {}
        for name in (IMAGE, TEXT):
            providers = runtime.get_available_providers()
            try:
                session = runtime.InferenceSession(self.folder / name, providers=providers)
            except Exception as error:  # it raises many kinds of its own
                raise UserError(
                    f"{self.folder / name}: cannot be loaded: {error}; export the run again "
                    "(tools/export.py --onnx)"
                ) from None
            self._sessions[name] = session
        try:
            self.tokenizer = limited(self.folder / MERGES)
        except (OSError, EOFError, ValueError) as error:
            raise UserError(
                f"{self.folder / MERGES}: cannot be read: {error}; export the run again "
                "(tools/export.py --onnx)"
            ) from None

    def encode_text(self, captions: str | Sequence[str]) -> np.ndarray:
        """Features [Q, D] of captions, float32 of unit length. A caption of more than
        `text_length` tokens is cut, as in training."""
        captions = [captions] if isinstance(captions, str) else list(captions)
        features = [self._no_features()]
        for start in range(0, len(captions), BATCH):
            ids_BL = self._ids(captions[start : start + BATCH])
            features += self._sessions[TEXT].run(["features"], {"ids": ids_BL})
        return np.concatenate(features)

    def encode_image(self, pictures: Picture | Sequence[Picture]) -> np.ndarray:
        """Features [G, D] of paths or PIL images. Raises UserError for a broken image."""
        pictures = [pictures] if isinstance(pictures, Picture) else list(pictures)
        features = [self._no_features()]
        with ThreadPoolExecutor() as threads:  # PIL decodes without Python's lock
            for start in range(0, len(pictures), BATCH):
                read = threads.map(self._bytes, pictures[start : start + BATCH])
                features.append(self.encode_bytes(np.stack(list(read)))[0])
        return np.concatenate(features)

    def encode_bytes(self, images_BCHW: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Features [B, D] of images as bytes, RGB of `image_size`; for each attribute, the
        probabilities of its classes [B, classes]."""
        feature_BD, *scores = self._sessions[IMAGE].run(None, {"images": images_BCHW})
        ends = np.cumsum([len(classes) for classes in self.attributes.values()])[:-1]
        parts = np.split(scores[0], ends, axis=1) if scores else []
        return feature_BD, dict(zip(self.attributes, parts, strict=True))

    def _bytes(self, picture: Picture) -> np.ndarray:
        """A picture as bytes [3, H, W]."""
        if isinstance(picture, PILImage.Image):
            image = resized(upright(picture), self.image_size)
        else:
            image = load_resized(os.fspath(picture), self.image_size)
        return np.asarray(image).transpose(2, 0, 1)

    def _ids(self, captions: Sequence[str]) -> np.ndarray:
        """Token ids [B, L] int64, padded with 0 to the longest caption."""
        length = self.about["text_length"]
        rows = [[START, *self.tokenizer.encode(c)[: length - 2], END] for c in captions]
        ids_BL = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for ids_L, row in zip(ids_BL, rows, strict=True):
            ids_L[: len(row)] = row
        return ids_BL

    def _no_features(self) -> np.ndarray:
        return np.zeros((0, self.about["embed_dim"]), np.float32)


def import_onnxruntime() -> Any:
    """ONNX Runtime. Raises UserError if it is not installed."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise UserError(
            "onnxruntime is not installed; pip install -r requirements-search.txt"
        ) from None
    return onnxruntime


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    if not path.is_file():
        raise UserError(f"{path}: no such file; --onnx takes a folder of tools/export.py --onnx")
    about = read_json_file(path)
    if not isinstance(about, dict):
        raise UserError(f"{path}: expected an object; export the run again")
    for name, kind in TYPES.items():
        if type(about.get(name)) is not kind:
            raise UserError(f"{path}: {name} is {about.get(name)!r}; export the run again")
    size, classes = about["image_size"], about["attributes"].values()
    if about["version"] != VERSION:
        raise UserError(
            f"{path}: version {about['version']}, but this code reads {VERSION}; export the run "
            "again"
        )
    if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise UserError(f"{path}: image_size is {size!r}; export the run again")
    if not all(isinstance(names, list) for names in classes):
        raise UserError(f"{path}: attributes are not lists of classes; export the run again")
    return about
