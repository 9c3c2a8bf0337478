"""People from files: upright, cut out, at their times; what is broken is told apart."""

import av
import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from datasets.transforms import load_image
from gallery.engine_torch import AHEAD, chunk_loader
from gallery.frames import Job, taken_at, video_frames
from gallery.ingest import Person
from utils.errors import UserError

SIZE = (32, 16)
CPU = torch.device("cpu")


def job(path, *people, is_video=False):
    return Job(path.name, str(path), people or (Person(),), is_video, 1, 2, "", "")


def chunks(jobs, batch_size=4, every=1.0, workers=0):
    return list(chunk_loader(jobs, SIZE, batch_size, every, False, workers, CPU))


def picture(path, size=(60, 90), seed=0, **kwargs):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1] // 10, size[0] // 10, 3))
    image = PILImage.fromarray(pixels.astype(np.uint8)).resize(size, PILImage.Resampling.NEAREST)
    image.save(path, **kwargs)
    return image


def make_video(path, seconds=3, rate=10):
    """A video whose frame at time t is grey of the level 20 + 50 t."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(seconds * rate):
            pixels = np.full((48, 64, 3), 20 + 50 * n / rate, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def test_whole_pictures_have_the_bytes_of_the_evaluation(tmp_path):
    for n in range(5):
        picture(tmp_path / f"{n}.png", size=(300, 700), seed=n)
        picture(tmp_path / f"{n}.jpg", size=(300, 700), seed=n)
    jobs = [job(path) for path in sorted(tmp_path.iterdir())]
    found = chunks(jobs)
    assert [len(chunk.rows) for chunk in found] == [4, 4, 2]
    expected = torch.stack([load_image(j.file, SIZE) for j in jobs])
    assert torch.equal(torch.cat([chunk.images for chunk in found]), expected)
    assert [d.job for chunk in found for d in chunk.done] == jobs


def test_boxes_are_cut_out_of_the_upright_picture(tmp_path):
    exif = PILImage.Exif()
    exif[274] = 6  # the camera was turned: to be shown turned clockwise
    upright = picture(tmp_path / "plain.png", size=(90, 60))
    upright.transpose(PILImage.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    people = Person((10, 20, 30, 30)), Person((70, 40, 100, 100)), Person((90, 0, 5, 5))
    plain, turned = (chunks([job(tmp_path / f"{n}.png", *people)])[0] for n in ("plain", "turned"))
    assert torch.equal(plain.images, turned.images) and len(plain.images) == 2
    crop = upright.crop((10, 20, 40, 50)).resize(SIZE[::-1], PILImage.Resampling.BILINEAR)
    assert torch.equal(plain.images[0], torch.from_numpy(np.array(crop)).permute(2, 0, 1))
    assert [row["left"] for row in plain.rows] == [10, 70] and len(plain.done) == 1
    assert plain.broken == [
        ("plain.png", "the box (90, 0, 5, 5) is outside of the picture (90x60)")
    ]


def test_the_time_of_a_picture_is_that_of_its_exif_data(tmp_path):
    exif = PILImage.Exif()
    exif.get_ifd(0x8769)[36867] = "2024:05:06 07:08:09"
    picture(tmp_path / "timed.jpg", exif=exif)
    picture(tmp_path / "plain.jpg")
    exif.get_ifd(0x8769)[36867] = "yesterday"
    picture(tmp_path / "wrong.jpg", exif=exif)
    times = [taken_at(str(tmp_path / f"{name}.jpg")) for name in ("timed", "plain", "wrong")]
    assert [time and time.isoformat() for time in times] == ["2024-05-06T07:08:09", None, None]


def test_broken_files_are_reported_and_the_others_are_read(tmp_path):
    for n in (1, 2, 3):
        picture(tmp_path / f"{n}.jpg", seed=n)
    (tmp_path / "2.jpg").write_bytes(b"no picture")
    make_video(tmp_path / "v.mp4")
    (tmp_path / "v.mp4").write_bytes(b"no video")
    jobs = [job(tmp_path / f"{n}.jpg") for n in (1, 2, 3)]
    jobs += [job(tmp_path / "v.mp4", is_video=True), job(tmp_path / "gone.jpg")]
    (chunk,) = chunks(jobs)
    assert [row["path"] for row in chunk.rows] == ["1.jpg", "3.jpg"]
    assert [path for path, _ in chunk.broken] == ["2.jpg", "v.mp4", "gone.jpg"]
    assert "it is not one of JPEG" in chunk.broken[0][1]
    assert "the video cannot be read" in chunk.broken[1][1]


@pytest.mark.parametrize(
    ("every", "times"), [(1.0, [0, 1, 2]), (0.25, [0, 0.3, 0.5, 0.8]), (9, [0])]
)
def test_a_video_gives_the_first_frame_of_each_step(every, times, tmp_path):
    found = list(video_frames(str(make_video(tmp_path / "v.mp4")), every))
    assert [time for time, _ in found][: len(times)] == pytest.approx(times)
    assert len(found) == int(3 / every) or every == 9
    for time, frame in found:
        assert frame.shape == (48, 64, 3) and abs(frame.mean() - (20 + 50 * time)) < 5


def test_rows_of_a_video_have_their_times_and_ids(tmp_path):
    path = make_video(tmp_path / "v.mp4")
    found = chunks([job(path, Person(view="aerial"), is_video=True)], batch_size=2)
    rows = [row for chunk in found for row in chunk.rows]
    assert [row["frame_time"] for row in rows] == [0, 1, 2]
    assert len({row["id"] for row in rows}) == 3 and {row["view"] for row in rows} == {"aerial"}
    assert [len(chunk.done) for chunk in found] == [0, 1]  # it ends in the second chunk


def test_a_sound_file_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        container.add_stream("aac", rate=44100)
        container.start_encoding()
    with pytest.raises(UserError, match="the video cannot be read"):
        list(video_frames(str(tmp_path / "a.mp4"), 1.0))


def test_several_processes_read_the_same_people(tmp_path):
    for n in range(9):
        picture(tmp_path / f"{n}.jpg", seed=n)
    jobs = [job(path) for path in sorted(tmp_path.iterdir())]
    alone, together = (
        {row["path"]: image for chunk in chunks(jobs, workers=workers) for row, image in
         zip(chunk.rows, chunk.images, strict=True)}
        for workers in (0, 2)
    )  # fmt: skip
    assert alone.keys() == together.keys() and len(alone) == 9
    assert all(torch.equal(alone[path], together[path]) for path in alone)


def test_reading_ahead_is_bounded(tmp_path):
    for n in range(8):
        picture(tmp_path / f"{n}.jpg", seed=n)
    jobs = [job(path) for path in sorted(tmp_path.iterdir())] * 4
    loader = chunk_loader(jobs, SIZE, 1, 1.0, False, 1, CPU)
    assert loader.prefetch_factor == AHEAD and loader.num_workers == 1
