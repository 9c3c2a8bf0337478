"""Detection: the people in a frame, found by a detector of torchvision."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from gallery.frames import Chunk
from gallery.pictures import Box, as_bytes
from gallery.records import id_of
from utils.checkpoint import load_checkpoint
from utils.errors import UserError, suggest
from utils.files import expand

PERSON = 1  # the label of people in COCO, and of detectors with people alone
SIDE = 4  # pixels; a smaller box shows nobody


class Detector:
    """Finds people. Only boxes of at least `min_score` count."""

    def __init__(self, model: Any, device: torch.device, min_score: float) -> None:
        self.model, self.device, self.min_score = model.to(device).eval(), device, min_score

    @torch.no_grad()
    def __call__(self, frames: list[np.ndarray]) -> list[list[Box]]:
        """The boxes in each frame [h, w, 3] uint8, the surest first."""
        images = [self._image(frame) for frame in frames]
        return [
            self._boxes(found, *frame.shape[:2])
            for found, frame in zip(self.model(images), frames, strict=True)
        ]

    def _image(self, frame: np.ndarray) -> Tensor:
        pixels = torch.tensor(frame, device=self.device)
        return pixels.permute(2, 0, 1).float() / 255

    def _boxes(self, found: dict[str, Tensor], height: int, width: int) -> list[Box]:
        sure = (found["labels"] == PERSON) & (found["scores"] >= self.min_score)
        boxes = []
        for x1, y1, x2, y2 in found["boxes"][sure].round().int().tolist():
            left, top = max(x1, 0), max(y1, 0)
            box = (left, top, min(x2, width) - left, min(y2, height) - top)
            if min(box[2:]) >= SIDE:
                boxes.append(box)
        return list(dict.fromkeys(boxes))


def load_detector(choice: str, device: torch.device, min_score: float) -> Detector:
    """A detector by its name in torchvision (its weights are downloaded), by a file of weights
    whose name begins with that name, as torchvision's do, or as NAME@FILE. Raises UserError."""
    from torchvision.models import detection, get_model, get_model_weights, list_models

    names = [n for n in list_models(detection) if not n.startswith("keypoint")]
    name, _, file = choice.partition("@")
    if name not in names and not file:
        file = choice
        stem = re.split(r"[-.]", Path(file).name)[0]
        name = stem if Path(expand(file)).is_file() else name
    if name not in names:
        raise UserError(
            f"--detect {choice}: neither a detector of torchvision, nor a file whose name begins "
            f"with one; NAME@FILE gives both.{suggest(name, names)} Known: {', '.join(names)}"
        )
    if not file:
        weights = get_model_weights(name).DEFAULT
        try:
            return Detector(get_model(name, weights=weights), device, min_score)
        except OSError as error:
            raise UserError(
                f"--detect {choice}: the weights could not be downloaded ({error}); download "
                f"{weights.url} elsewhere, and give --detect the file"
            ) from None
    path = expand(file)
    weights = load_checkpoint(path)["model"]
    classes = weights.get("roi_heads.box_predictor.cls_score.bias")
    count = {"num_classes": len(classes)} if classes is not None and classes.dim() == 1 else {}
    model = get_model(name, weights=None, weights_backbone=None, **count)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--detect {path}: not the weights of a {name}: {reason}") from None
    return Detector(model, device, min_score)


def detected(
    chunks: Iterable[Chunk], detector: Detector, size: tuple[int, int], batch_size: int
) -> Iterator[Chunk]:
    """Chunks of people from chunks of frames: every box becomes a row and an image [3, H, W]."""
    ready = Chunk()
    for chunk in chunks:
        boxes = detector(chunk.images) if chunk.images else []
        for row, frame, found in zip(chunk.rows, chunk.images, boxes, strict=True):
            picture = PILImage.fromarray(frame)
            for left, top, width, height in found:
                if len(ready.rows) == batch_size:
                    yield ready.stacked(size)
                    ready = Chunk()
                crop = picture.crop((left, top, left + width, top + height))
                place = {"left": left, "top": top, "width": width, "height": height}
                number = id_of(row["path"], row["frame_time"], (left, top, width, height))
                ready.rows.append({**row, **place, "id": number})
                ready.images.append(as_bytes(crop, size))
        ready.done += chunk.done
        ready.broken += chunk.broken
    if ready.rows or ready.done or ready.broken:
        yield ready.stacked(size)
