"""An encoder that needs no torch: what `tools/export.py --onnx` wrote, in ONNX Runtime.

    encoder = OnnxEncoder("exported")
    scores_QG = encoder.encode_text(["a man in red"]) @ encoder.encode_image(["1.jpg", "2.jpg"]).T

Features are those of the run to about 1e-4. Shapes: Q captions, G images, D width of the features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from gallery.pictures import Picture, as_bytes
from utils.bpe import MERGES
from utils.documents import read_json_file
from utils.errors import UserError
from utils.tokenizer import END, START, limited

VERSION = 2  # of the folder; increase it when old code cannot read it
IMAGE, TEXT, ABOUT = "image.onnx", "text.onnx", "encoder.json"
BATCH = 64  # images or captions at a time
# What encoder.json must say of the encoder, and the manifest of a gallery has.
TYPES: Mapping[str, type] = {
    "name": str, "checkpoint": str, "sha256": str, "pretrain_choice": str, "img_size": list,
    "text_length": int, "embed_dim": int,
}  # fmt: skip


class OnnxEncoder:
    """Both encoders of a run.

    Attributes:
        about: what a manifest says of it, see `gallery.encode.Encoder`; `onnx` is the folder.
        attributes: the classes of each attribute of FIRM's head; {} without that head.

    Args:
        folder: what `tools/export.py --onnx` wrote.
        device: "cpu", "cuda", or "auto": what ONNX Runtime has.

    Raises UserError if a file is missing or corrupted, or ONNX Runtime or the device is missing.
    """

    def __init__(self, folder: str | Path, device: str = "auto") -> None:
        runtime, self.folder = import_onnxruntime(), Path(folder)
        content = _read_about(self.folder)
        self.attributes = {n: tuple(c) for n, c in content["attributes"].items()}
        # Like the run's, but without its folder, which an export does not know.
        self.about: dict[str, Any] = {name: content[name] for name in TYPES} | {
            "kind": "run", "folder": "", "stride_size": content.get("stride_size"),
            "precision": "fp32", "onnx": str(self.folder.absolute()),
        }  # fmt: skip
        height, width = content["img_size"]
        self.size = height, width
        providers = _providers(runtime, device)
        self._sessions = {}
        for name in (IMAGE, TEXT):
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
                read = threads.map(as_bytes, pictures[start : start + BATCH], repeat(self.size))
                features.append(self.encode_bytes(np.stack(list(read)))[0])
        return np.concatenate(features)

    def encode_bytes(self, images_BCHW: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Features [B, D] of images as bytes, RGB of `image_size`; for each attribute, the
        probabilities of its classes [B, classes]."""
        feature_BD, *scores = self._sessions[IMAGE].run(None, {"images": images_BCHW})
        ends = np.cumsum([len(classes) for classes in self.attributes.values()])[:-1]
        parts = np.split(scores[0], ends, axis=1) if scores else []
        return feature_BD, dict(zip(self.attributes, parts, strict=True))

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


def _providers(runtime: Any, device: str) -> list[str]:
    """What ONNX Runtime shall compute with, the best first. Raises UserError."""
    known = runtime.get_available_providers()
    if device == "cuda" and "CUDAExecutionProvider" not in known:
        raise UserError(
            "--device cuda: this ONNX Runtime has no CUDA: install onnxruntime-gpu, or give "
            "--device cpu or auto"
        )
    return ["CPUExecutionProvider"] if device == "cpu" else known


def is_export(place: str | Path) -> bool:
    """Whether a folder is one of tools/export.py --onnx, and none of a run."""
    if not (Path(place) / ABOUT).is_file():
        return False
    from utils.runs import options_file  # not above: it needs easydict, and a search does not

    return not options_file(Path(place)).exists()


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    if not path.is_file():
        raise UserError(f"{path}: no such file; --onnx takes a folder of tools/export.py --onnx")
    about = read_json_file(path)
    if not isinstance(about, dict):
        raise UserError(f"{path}: expected an object; export the run again")
    if about.get("version") != VERSION:
        found = about.get("version")
        raise UserError(
            f"{path}: version {found}, but this code reads {VERSION}; export the run again"
        )
    for name, kind in TYPES.items():
        if type(about.get(name)) is not kind:
            raise UserError(f"{path}: {name} is {about.get(name)!r}; export the run again")
    size, attributes = about["img_size"], about.get("attributes")
    if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise UserError(f"{path}: img_size is {size!r}; export the run again")
    if not isinstance(attributes, dict) or not all(
        isinstance(names, list) for names in attributes.values()
    ):
        raise UserError(f"{path}: attributes are not lists of classes; export the run again")
    return about
