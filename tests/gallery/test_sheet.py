"""Hits as a picture and as a page, and the pictures of hits: files, boxes, frames of videos."""

import base64
import datetime
import html.parser
import io
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageFont

from datasets.images import BrokenImage
from gallery.pictures import frame_at, picture_of
from gallery.records import clock
from gallery.sheet import _ending, _font, _wrapped, sheet
from utils.errors import UserError

HOSTILE = """ "'><script>x</script><b onload=y> {{ 7 * 7 }} \x1b \u202e \ud800 &amp;"""
RED, GREEN, BLUE = (220, 20, 20), (20, 200, 20), (20, 20, 220)
BOX = {"left": 60, "top": 20, "width": 30, "height": 70}


class Hit(NamedTuple):
    rank: int
    score: float
    count: int
    item: dict[str, Any]


@pytest.fixture
def root(tmp_path):
    """A folder with a green picture that has a red person in BOX."""
    image = PILImage.new("RGB", (200, 100), GREEN)
    image.paste(RED, (60, 20, 90, 90))
    image.save(tmp_path / "street.png")
    return tmp_path


def tags_of(path):
    tags = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, dict(attrs)))
    parser.feed(path.read_text())
    return tags


def images_of(path):
    urls = [attrs["src"] for tag, attrs in tags_of(path) if tag == "img"]
    return [PILImage.open(io.BytesIO(base64.b64decode(u.partition("base64,")[2]))) for u in urls]


def near(colour, expected):
    return np.abs(np.asarray(colour, int) - expected).max() < 12


def hits(count=3, **item):
    return [
        Hit(n + 1, 0.5 - 0.1 * n, 1, {"path": "street.png", **BOX, **item}) for n in range(count)
    ]


def test_a_page_shows_crops_scores_and_what_is_known(root):
    taken = datetime.datetime(2024, 5, 1, 12)
    known = {"view": "aerial", "source": "campus", "identity": "17", "taken": taken}
    one = Hit(1, 0.41234, 4, {"path": "street.png", **BOX, **known})
    sheet([one], root / "a.html", root, query="a man in red")
    text = (root / "a.html").read_text()
    for shown in ("a man in red", "0.412", "aerial, campus, identity 17, 2024-05-01 12:00:00", "stands for 4 pictures", "street.png", "1 hit"):  # fmt: skip
        assert shown in text, shown
    (crop,) = images_of(root / "a.html")
    assert crop.size == (30, 70) and near(crop.getpixel((15, 35)), RED)


def test_a_page_loads_nothing_and_text_from_outside_changes_no_tag(root):
    pages = []
    for text in ("harmless", HOSTILE):
        named = hits(1, view=text, source=text, camera=text, identity=text)
        gone = [Hit(2, 0.1, 1, {"path": f"gone{text}.jpg"})]
        sheet([*named, *gone], root / "a.html", root, query=text)
        pages.append(
            [(tag, sorted(attrs)) for tag, attrs in tags_of(root / "a.html") if tag != "wbr"]
        )
    assert pages[0] == pages[1]
    content = (root / "a.html").read_bytes().decode()
    assert "://" not in content and "{{ 7 * 7 }}" in content and "\x1b" not in content


def test_a_picture_that_has_vanished_or_whose_box_is_outside_has_a_placeholder(root):
    outside = Hit(2, 0.2, 1, {"path": "street.png", **BOX, "left": 500})
    listed = [*hits(1), outside, Hit(3, 0.1, 1, {"path": "gone.jpg"})]
    sheet(listed, root / "a.html", root)
    assert len(images_of(root / "a.html")) == 1
    content = (root / "a.html").read_text()
    assert content.count("no picture") == 2 and str(root) not in content
    sheet(listed, root / "a.png", root)
    with PILImage.open(root / "a.png") as drawn:
        assert drawn.width > drawn.height / 2


def test_a_heat_map_and_the_whole_picture_with_a_frame_can_be_added(root):
    seen = []

    def heat(pictures):
        seen.extend(picture.size for picture in pictures)
        return [np.ones((p.height, p.width), np.float32) for p in pictures]

    sheet(hits(2), root / "a.html", root, heat=heat, whole=True)
    crop, over, whole = images_of(root / "a.html")[:3]
    assert seen == [(30, 70)] * 2 and crop.size == over.size and whole.size == (200, 100)
    assert not near(over.getpixel((15, 35)), crop.getpixel((15, 35)))
    inside, frame = whole.getpixel((75, 55)), whole.getpixel((75, 17))
    assert near(inside, RED) and frame[0] > 150 and frame[1] < 150  # the frame is red on white
    plain = [{"path": "street.png"}]
    sheet([Hit(1, 0.5, 1, item) for item in plain], root / "b.html", root, whole=True)
    assert len(images_of(root / "b.html")) == 1  # the person is the whole picture


def test_a_png_is_a_grid_of_the_crops_in_their_order(root):
    for n, colour in enumerate((RED, BLUE, GREEN)):
        PILImage.new("RGB", (60, 120), colour).save(root / f"{n}.png")
    listed = [Hit(n + 1, 0.5, 1, {"path": f"{n % 3}.png"}) for n in range(12)]
    sheet(listed, root / "a.png", root, query="somebody " * 60)
    drawn = np.asarray(PILImage.open(root / "a.png").convert("RGB"))
    cells = []
    for y in range(0, len(drawn), 10):
        strip = [c for x in range(0, drawn.shape[1], 10) for c in (RED, BLUE, GREEN) if near(drawn[y, x], c)]  # fmt: skip
        row = [c for n, c in enumerate(strip) if n == 0 or strip[n - 1] != c]
        if row and (not cells or cells[-1] != row):
            cells.append(row)
    assert sum(cells, []) == [(RED, BLUE, GREEN)[n % 3] for n in range(12)]
    sheet(listed, root / "b.png", root, query="somebody " * 60)
    assert (root / "a.png").read_bytes() == (root / "b.png").read_bytes()


def test_a_png_escapes_what_its_font_lacks():
    own = ImageFont.load_default(16)
    assert _wrapped("ein Gürtel 中", own, 999, 1) == [r"ein G\xfcrtel \u4e2d"]
    assert _ending("a/ü.jpg", own, 999) == r"a/\xfc.jpg"


def test_a_png_takes_a_font_with_more_letters_if_there_is_one(monkeypatch):
    asked, wider = [], ImageFont.load_default(9)
    monkeypatch.setattr(ImageFont, "truetype", lambda *words: asked.append(words) or wider)
    assert _font(16) is wider and asked == [("DejaVuSans.ttf", 16)]

    def none(*_):
        raise OSError("cannot open resource")

    monkeypatch.setattr(ImageFont, "load_default", lambda size: size)
    monkeypatch.setattr(ImageFont, "truetype", none)
    assert _font(16) == 16


def test_no_hits_make_an_empty_sheet(root):
    for name in ("a.png", "a.HTML"):
        sheet([], root / name, root, query="nobody")
        assert (root / name).stat().st_size > 100


def test_another_ending_is_refused(root):
    with pytest.raises(UserError, match=r"--sheet .*a.pdf: give a name that ends in .png or .html"):
        sheet(hits(), root / "a.pdf", root)


# Videos


def grey(n):
    return 67 * n % 251


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Six seconds at 10 frames a second; frame n has the grey level `grey(n)`."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("video") / "walk.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(60):
            frame = np.full((48, 64, 3), grey(n), np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.mark.parametrize("n", [0, 1, 11, 12, 13, 30, 59])
def test_a_frame_is_the_one_at_its_time(video, n):
    frame = frame_at(str(video), round(n / 10, 3))
    assert frame.size == (64, 48) and abs(np.asarray(frame).mean() - grey(n)) < 8


def test_a_hit_in_a_video_shows_its_box_in_its_frame(video):
    item = {"path": "walk.mp4", "frame_time": 3.0, "left": 50, "top": 40, "width": 30, "height": 30}
    person = picture_of(item, video.parent)
    assert person.size == (14, 8)  # the part that is in the picture
    assert abs(np.asarray(person).mean() - grey(30)) < 8
    sheet([Hit(1, 0.5, 1, item)], video.parent / "a.html", video.parent)
    assert "at 0:03.0" in (video.parent / "a.html").read_text()


def test_a_frame_after_the_end_and_a_file_that_is_no_video_are_named(video, tmp_path):
    with pytest.raises(
        BrokenImage, match="walk.mp4: the frame at 7 s cannot be read: the video is"
    ):
        frame_at(str(video), 7)
    (tmp_path / "x.mp4").write_bytes(b"no video")
    with pytest.raises(BrokenImage, match="x.mp4: the frame at 0 s cannot be read"):
        frame_at(str(tmp_path / "x.mp4"), 0)
    with pytest.raises(BrokenImage, match="gone.mp4"):
        frame_at(str(tmp_path / "gone.mp4"), 0)


def test_a_video_needs_pyav(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="need PyAV; pip install -r requirements-search.txt"):
        picture_of({"path": "x.mp4", "frame_time": 1.0}, Path(tmp_path))


def test_a_page_has_ids_and_breaks_names_between_their_pieces(root):
    (root / "gate_3").mkdir()
    (root / "street.png").rename(root / "gate_3/0001-a.png")
    one = Hit(1, 0.5, 1, {"path": "gate_3/0001-a.png", "id": 6110056214522409932})
    assert sheet([one], root / "a.html", root) == []
    text = (root / "a.html").read_text()
    assert ">gate_<wbr>3/<wbr>0001-<wbr>a<wbr>.png<wbr></span><br>id 6110056214522409932<" in text


@pytest.mark.parametrize(("seconds", "text"), [(3, "0:03.0"), (59.94, "0:59.9"), (59.97, "1:00.0"), (3599.96, "60:00.0")])  # fmt: skip
def test_a_time_in_a_video_has_less_than_60_seconds(seconds, text):
    assert clock(seconds) == text
