"""Frames: files to people as resized bytes.

Pictures are read as in the evaluation (datasets/transforms.py). Boxes are cut out of the upright
picture. A video gives one frame for each step of `every` seconds, upright as its metadata says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PILImage

from datasets.images import FORMATS, MAX_BYTES, MAX_PIXELS, read_image
from datasets.shards import open_image
from datasets.thumbnails import cropped
from gallery.ingest import Person
from gallery.pictures import as_bytes, import_av, turned
from gallery.records import id_of
from utils.errors import UserError
from utils.files import open_file
from utils.text import visible

EXIF, TAKEN = 0x8769, 36867  # tags: where EXIF's own tags are, and DateTimeOriginal in them

Row = dict[str, Any]  # a row of the table of items, with `labels` in place of attributes


class Job(NamedTuple):
    """A file to read: see `ingest.File`, and how the gallery knows it."""

    path: str  # as the gallery keeps it
    file: str
    people: tuple[Person, ...]
    is_video: bool
    size: int
    mtime_ns: int
    request: str  # what is asked of the file; if it changes, the file is encoded again
    facts: str  # a hash of what is known of its people; if it changes, their rows change


class Done(NamedTuple):
    """A file that has been read to its end."""

    job: Job
    digest: str


@dataclass
class Chunk:
    """Some people, with the files that end among them.

    Attributes:
        images: [n, 3, H, W] uint8; for a detector, frames [h, w, 3] of any size.
    """

    rows: list[Row] = field(default_factory=list)
    images: Any = field(default_factory=list)
    done: list[Done] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)

    def stacked(self, size: tuple[int, int]) -> Chunk:
        """The same with one array of images."""
        images = np.stack(self.images) if self.images else np.zeros((0, 3, *size), np.uint8)
        return Chunk(self.rows, images, self.done, self.broken)

    def pin_memory(self) -> Chunk:
        """For the DataLoader: the same in memory that a GPU copies from at once."""
        if hasattr(self.images, "pin_memory"):
            self.images = self.images.pin_memory()
        return self


class Reader:
    """Reads chunks of the people in files.

    Args:
        size: height and width of the images.
        count: people in a chunk, at most.
        every: seconds between frames of a video.
        frames: give frames of full size, for a detector.
    """

    def __init__(
        self, jobs: Sequence[Job], size: tuple[int, int], count: int, every: float, frames: bool
    ) -> None:
        self.jobs, self.size, self.count, self.every = jobs, size, count, every
        self.frames = frames

    def chunks(self, first: int = 0, step: int = 1) -> Iterator[Chunk]:
        """The chunks of every `step`-th file, from the file `first`."""
        chunk = Chunk()
        for job in self.jobs[first::step]:
            problems: list[str] = []
            try:
                digest = digest_of(job.file, job.is_video)
                for row, image in self._people(job, digest, problems):
                    if len(chunk.rows) == self.count:  # here, so that files end with their rows
                        yield self._finished(chunk)
                        chunk = Chunk()
                    chunk.rows.append(row)
                    chunk.images.append(image)
                chunk.done.append(Done(job, digest))
            except UserError as error:  # the file is named beside the problem
                problems.append(str(error).removeprefix(f"{visible(job.file)}: "))
            except OSError as error:
                problems.append(error.strerror or str(error))
            chunk.broken += [(job.path, problem) for problem in problems]
        if chunk.rows or chunk.done or chunk.broken:
            yield self._finished(chunk)

    def _finished(self, chunk: Chunk) -> Chunk:
        return chunk if self.frames else chunk.stacked(self.size)

    def _people(self, job: Job, digest: str, problems: list[str]) -> Iterator[tuple[Row, Any]]:
        """Rows and images of a file's people; adds to `problems` those that cannot be shown. Raises
        UserError or OSError if the file cannot be read."""
        if job.is_video:
            for time, frame in video_frames(job.file, self.every):
                row = row_of(job, digest, job.people[0], frame_time=time)
                if not self.frames:
                    yield row, as_bytes(PILImage.fromarray(frame), self.size)
                else:
                    yield row, frame
            return
        whole = [person for person in job.people if person.box is None]
        if whole and not self.frames:
            image = as_bytes(job.file, self.size)
            taken = taken_at(job.file)
            for person in whole:
                yield row_of(job, digest, person, taken=taken), image
        if len(whole) == len(job.people) and not self.frames:
            return
        picture = read_image(job.file)
        taken = taken_at(job.file)
        if self.frames:
            yield row_of(job, digest, job.people[0], taken=taken), np.asarray(picture)
            return
        for person in job.people:
            if person.box is not None:
                try:
                    crop = cropped(picture, person.box)
                except ValueError as error:
                    problems.append(f"{error}")
                    continue
                yield row_of(job, digest, person, taken=taken), as_bytes(crop, self.size)


def row_of(
    job: Job,
    digest: str,
    person: Person,
    *,
    frame_time: float | None = None,
    taken: datetime | None = None,
) -> Row:
    """The row of a person."""
    left, top, width, height = person.box or (None,) * 4
    return {
        "id": id_of(job.path, frame_time, person.box),
        "path": job.path, "frame_time": frame_time,
        "left": left, "top": top, "width": width, "height": height,
        "size": job.size, "mtime_ns": job.mtime_ns, "digest": digest, "taken": taken,
        "view": person.view, "camera": person.camera, "source": person.source,
        "identity": person.identity, "labels": dict(person.labels),
    }  # fmt: skip


def digest_of(path: str, is_video: bool = False) -> str:
    """16 hexadecimal digits of a file's SHA-256. Raises OSError."""
    digest = hashlib.sha256()
    try:
        with open_file(path) if is_video else open_image(path, MAX_BYTES) as file:
            while block := file.read(2**20):
                digest.update(block)
    except ValueError as error:  # too large for a picture
        raise UserError(f"{path}: the image cannot be read: {error}") from None
    return digest.hexdigest()[:16]


def taken_at(path: str) -> datetime | None:
    """When a picture was taken, by its EXIF data (camera's local time), or None."""
    try:
        with (
            open_image(path, MAX_BYTES) as file,
            PILImage.open(file, formats=FORMATS) as image,
        ):
            text = str(image.getexif().get_ifd(EXIF)[TAKEN])
        return datetime.strptime(text.strip("\0 "), "%Y:%m:%d %H:%M:%S")
    except Exception:  # missing or corrupted EXIF data raises many kinds of errors
        return None


def video_frames(path: str, every: float) -> Iterator[tuple[float, np.ndarray]]:
    """(seconds, frame [h, w, 3] uint8): the first frame at or after each multiple of `every`.

    Raises UserError if it is no video, or from where it is corrupted.
    """
    av = import_av()
    open_file(path).close()  # a pipe would block the reader
    steps = 0
    try:
        with av.open(path, metadata_errors="replace") as container:
            if not container.streams.video:
                raise UserError(f"{path}: the video cannot be read: it has no pictures")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if stream.width * stream.height > MAX_PIXELS:
                raise UserError(
                    f"{path}: the video cannot be read: {stream.width}x{stream.height} is over the "
                    f"limit of {MAX_PIXELS} pixels"
                )
            start = None
            for frame in container.decode(stream):
                if frame.time is None:
                    continue
                start = frame.time if start is None else start
                time = frame.time - start
                if time < steps * every - 1e-6:  # times are fractions, rounded
                    continue
                steps = int((time + 1e-6) / every) + 1
                yield round(time, 3), turned(frame)
    except (av.error.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path}: the video cannot be read: {reason}. Replace it, or convert it with ffmpeg."
        ) from None
