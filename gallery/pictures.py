"""The picture of a hit: a file, or a frame of a video, and the box of the person in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from datasets.images import MAX_PIXELS, BrokenImage, load_resized, read_image, resized, upright
from datasets.thumbnails import cropped
from utils.errors import UserError
from utils.files import open_file

Picture = str | os.PathLike | PILImage.Image
Box = tuple[int, int, int, int]  # left, top, width, height in the upright picture, pixels
SAME_TIME = 1e-3  # seconds; an item's time is rounded


def opened(picture: Picture) -> PILImage.Image:
    """A picture in RGB, upright as its EXIF data says. Raises BrokenImage."""
    if isinstance(picture, PILImage.Image):
        return upright(picture)
    return read_image(os.fspath(picture))


def as_bytes(picture: Picture, size: tuple[int, int]) -> np.ndarray:
    """A picture as the encoders take it: upright, resized to height and width, [3, H, W] uint8.
    Raises BrokenImage."""
    if isinstance(picture, PILImage.Image):
        image = resized(upright(picture), size)
    else:
        image = load_resized(os.fspath(picture), size)
    return np.asarray(image).transpose(2, 0, 1)


def whole_picture(item: Mapping[str, Any], root: str | Path) -> PILImage.Image:
    """The picture of an item, or its frame, with all that is in it.

    Args:
        item: has columns of `gallery.records.SCHEMA`, at least `path`.
        root: the folder to which paths are relative.

    Raises UserError if it cannot be read, or PyAV is not installed.
    """
    path, time = os.path.join(root, item["path"]), item.get("frame_time")
    return read_image(path) if time is None else frame_at(path, time)


def box_of(item: Mapping[str, Any]) -> Box | None:
    """The box of the person in the picture; None if the whole picture is the person."""
    if item.get("left") is None:
        return None
    return item["left"], item["top"], item["width"], item["height"]


def picture_of(item: Mapping[str, Any], root: str | Path) -> PILImage.Image:
    """The person of an item, cut out of its picture. Raises UserError as `whole_picture` does, and
    if the box is outside of the picture."""
    image, box = whole_picture(item, root), box_of(item)
    if box is None:
        return image
    try:
        return cropped(image, box)
    except ValueError as error:
        raise BrokenImage(f"{item['path']}: {error}; index it again") from None


def frame_at(path: str, time: float) -> PILImage.Image:
    """The first frame of a video at or after a time, in seconds since its first frame.

    Raises UserError if there is none, or PyAV is not installed.
    """
    av = import_av()
    try:
        open_file(path).close()  # a pipe would block the reader
        with av.open(path, metadata_errors="replace") as container:
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise ValueError(f"{stream.width}x{stream.height} is over the limit of pixels")
            start = next(frame.time for frame in container.decode(stream) if frame.time is not None)
            # To the last frame before it that needs no other one.
            container.seek(int((start + time) * av.time_base), backward=True)
            for frame in container.decode(stream):
                if frame.time is not None and frame.time - start >= time - SAME_TIME:
                    return PILImage.fromarray(turned(frame))
        error = "the video is shorter"
    except (av.error.FFmpegError, OSError, ValueError, IndexError, StopIteration) as reason:
        error = f"{reason}" or type(reason).__name__
    raise BrokenImage(f"{path}: the frame at {time:g} s cannot be read: {error}")


def turned(frame: Any) -> np.ndarray:
    """A frame of PyAV, upright as the video's metadata says, [h, w, 3] uint8."""
    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))


def import_av() -> Any:
    """PyAV. Raises UserError if it is not installed."""
    try:
        import av
    except ModuleNotFoundError:
        raise UserError("videos need PyAV; pip install -r requirements-search.txt") from None
    return av
