"""`search.py --onnx`: a gallery by an export is that of its run, and needs no torch."""

import json
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest

import search
import tools.export as export
from gallery.engine_onnx import in_threads
from gallery.frames import Chunk
from gallery.manifest import MANIFEST
from gallery.onnx import ABOUT, OnnxEncoder
from gallery.page_handlers import Handlers
from gallery.page_question import Question
from gallery.service import Service
from gallery.store import Gallery
from tests.gallery.test_frames import make_video, picture
from tests.helpers import ROOT, run
from tests.reliability.runs import train_small_run
from utils.errors import UserError

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

# search.py where torch is not installed: importing it raises.
WITHOUT_TORCH = """
import sys
sys.modules.update(dict.fromkeys(["torch", "torchvision", "open_clip"]))
import search
from utils.errors import run_main
run_main(search.main)
assert not any(sys.modules[n] for n in ("torch", "torchvision", "open_clip"))
"""


@pytest.fixture(scope="module")
def folders(mini_root, tmp_path_factory):
    """A run with FIRM's head, its export, one of other weights, and things to index."""
    base = tmp_path_factory.mktemp("onnx")
    train_small_run(mini_root, base / "logs").rename(base / "run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        words = ("--config_file", base / "run/configs.yaml", "--onnx", base / "exported")
        run(export.main, monkeypatch, *words)
    shutil.copytree(base / "exported", base / "other")
    about = json.loads((base / "other" / ABOUT).read_text())
    (base / "other" / ABOUT).write_text(json.dumps({**about, "name": "other", "sha256": "f" * 64}))
    (base / "photos").mkdir()
    (base / "videos").mkdir()
    for n in range(9):
        picture(base / f"photos/{n}.jpg", seed=n)
    (base / "photos/broken.jpg").write_bytes(b"no picture")
    make_video(base / "videos/v.mp4")
    (base / "boxes.csv").write_text(
        "path,left,top,width,height,identity\n"
        + "".join(f"{n}.jpg,{n},5,30,50,a\n" for n in range(4))
    )
    return base


def without_torch(*words):
    """What search.py prints, in a process without torch."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else done.stderr.strip()


@pytest.fixture(scope="module")
def galleries(folders):
    """Galleries by the run and by its export, of pictures, a video and boxes."""
    words = ("--images", folders / "photos", "--videos", folders / "videos")
    boxes = ("--images", folders / "photos", "--boxes", folders / "boxes.csv")
    by_run = ("--config_file", folders / "run/configs.yaml", "--precision", "fp32")
    by_export = ("--onnx", folders / "exported")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, encoder in (("by_run", by_run), ("by_export", by_export)):
            for what in (words, boxes):
                call = ("index", "--gallery", folders / name, "--test_batch_size", 4, *encoder, *what)  # fmt: skip
                if name == "by_run":
                    run(search.main, monkeypatch, *call, "--num_workers", 0)
                else:
                    assert "people encoded" in without_torch(*call)
    return folders / "by_run", folders / "by_export"


def rows_of(folder):
    gallery = Gallery.open(folder)
    return gallery, np.argsort(gallery.items["id"].to_numpy())


def test_an_index_without_torch_is_that_of_the_run(galleries):
    (ours, order), (theirs, other) = map(rows_of, galleries)
    assert len(order) == 12  # four boxes, five pictures, three frames
    expected, found = (g.items.take(o).to_pydict() for g, o in ((ours, order), (theirs, other)))
    scores = [name for name in found if name.endswith("_score")]
    assert scores and ours.manifest["attributes"] == theirs.manifest["attributes"]
    for name in scores:
        np.testing.assert_allclose(found.pop(name), expected.pop(name), atol=1e-4)
    assert found == expected  # also the attributes that are guessed
    assert theirs.features.dtype == np.float16
    np.testing.assert_allclose(theirs.features[other], ours.features[order], atol=1e-3)


@pytest.mark.parametrize(
    "question",
    [
        ("a woman in a yellow dress",),
        ("a man", "in red", "--minus", "a bag", "--rerank"),
        ("--like", "photos/3.jpg", "--where", "frame_time is null"),
    ],
)
def test_a_question_without_torch_has_the_hits_of_the_run(
    question, galleries, folders, monkeypatch, capsys
):
    question = [folders / word if word.startswith("photos/") else word for word in question]
    words = ("find", *question, "--json", "--top", 12, "--collapse", "off", "--gallery")
    run(search.main, monkeypatch, *words, galleries[0])
    run(search.main, monkeypatch, *words, galleries[1], "--encoder", folders / "run")
    lines = capsys.readouterr().out.splitlines()
    expected = [json.loads(line) for line in lines[: len(lines) // 2]]
    assert len(expected) >= 9
    for found in (
        [json.loads(line) for line in lines[len(lines) // 2 :]],  # the run asks the other's gallery
        answer(*words, galleries[0], "--onnx", folders / "exported"),
        answer(*words, galleries[1]),  # its manifest names the export
    ):
        assert [hit["item"]["id"] for hit in found] == [hit["item"]["id"] for hit in expected]
        for ours, theirs in zip(expected, found, strict=True):
            assert abs(ours["score"] - theirs["score"]) < 1e-3


def answer(*words):
    return [json.loads(line) for line in without_torch(*words).splitlines()]


def test_hits_are_written_with_their_pictures(galleries, tmp_path):
    words = ("find", "a man", "--gallery", galleries[1], "--sheet", tmp_path / "hits.html")
    without_torch(*words)
    assert (tmp_path / "hits.html").read_text().count("data:image/jpeg") >= 9


def test_a_run_and_its_export_go_on_with_each_others_gallery(folders, tmp_path, monkeypatch):
    gallery = ("--gallery", tmp_path / "gallery", "--num_workers", 0)
    by_run = ("--config_file", folders / "run/configs.yaml", "--precision", "fp32")
    by_export = ("--onnx", folders / "exported")
    for n, encoder in enumerate((by_run, by_export, by_run)):
        picture(tmp_path / f"{n}.jpg", seed=n)
        run(search.main, monkeypatch, "index", *gallery, *encoder, "--images", tmp_path / f"{n}.jpg")  # fmt: skip
        opened = Gallery.open(tmp_path / "gallery")
        assert len(opened.items) == n + 1
        assert ("onnx" in opened.manifest["encoder"]) == (encoder is by_export)
    manifest = json.loads((tmp_path / "gallery" / MANIFEST).read_text())
    manifest["encoder"]["precision"] = "bf16"
    (tmp_path / "gallery" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="made by another encoder .precision bf16, not fp32"):
        run(search.main, monkeypatch, "index", *gallery, *by_export, "--images", tmp_path / "0.jpg")  # fmt: skip


def test_files_that_are_all_broken_are_listed(folders, tmp_path, monkeypatch):
    words = ("--onnx", folders / "exported", "--images", folders / "photos/broken.jpg")
    run(search.main, monkeypatch, "index", "--gallery", tmp_path / "gallery", *words)
    assert len(Gallery.open(tmp_path / "gallery").items) == 0
    (entry,) = json.loads((tmp_path / "gallery/broken.json").read_text())
    assert "not one of JPEG" in entry["reason"]


def test_the_page_asks_without_torch_and_has_no_heat_maps(galleries, folders):
    service = Service(galleries[0], onnx=folders / "exported")
    question = Question("a woman in a yellow dress")
    expected = Service(galleries[0], device="cpu").answer(question)
    assert [h.id for h in service.answer(question).hits] == [h.id for h in expected.hits]
    assert service.words(question) == []
    with pytest.raises(UserError, match="no such words"):
        service.heat(question, expected.hits[0].id, 0)
    assert Handlers(service, []).warm(question, expected.hits[0].id) == gr.skip()
    code = """
import sys
sys.modules["torch"] = None
from gallery.page_question import Question
from gallery.service import Service
print(Service(sys.argv[1]).answer(Question("a man")).sure)
"""
    done = subprocess.run([sys.executable, "-c", code, galleries[1]], cwd=ROOT, capture_output=True)
    assert b"the first hit" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("index", "--config_file", "x", "--onnx", "y"), "give the encoder: one of --config_file, "),
        (("index", "--images", "x", "--onnx", "y", "--detect", "z"), "--detect: detectors need torch"),
        (("index", "--images", "x", "--onnx", "y", "--precision", "bf16"), "--precision: an export has"),
        (("index", "--images", "x", "--onnx", "y", "--checkpoint", "last.pth"), "--checkpoint last.pth: one of a run"),
        (("index", "--images", "x", "--onnx", "y", "--img_size", "32", "16"), "--img_size: a run has"),
        (("index", "--images", str(ROOT / "docs"), "--onnx", "/gone"), "/gone/encoder.json: no such file; --onnx takes"),
        (("find", "x", "--onnx", "/gone"), "/gone/encoder.json: no such file; --onnx takes"),
        (("find", "x", "--onnx", "y", "--encoder", "z"), "--onnx and --encoder: two encoders"),
        (("find", "x", "--sheet", "x.png", "--heat"), "--heat: heat maps need torch and the run"),
        (("find", "x", "--device", "cuda"), "--device cuda: this ONNX Runtime has no CUDA"),
        (("serve", "--onnx", "y", "--encoder", "z"), "--onnx and --encoder: two encoders"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line(words, message, galleries, monkeypatch):
    if words[0] == "index" or "/gone" in words:
        words = (*words, "--device", "cpu")
    with pytest.raises(UserError, match=message):
        run(search.main, monkeypatch, *words, "--gallery", galleries[1])


def test_an_export_of_other_weights_is_refused(galleries, folders, monkeypatch):
    other = ("--gallery", galleries[0], "--onnx", folders / "other")
    with pytest.raises(UserError, match="other: its sha256 is .*give the encoder that made"):
        run(search.main, monkeypatch, "find", "a man", *other)
    with pytest.raises(UserError, match="made by another encoder .weights of run .*, not other "):
        run(search.main, monkeypatch, "index", *other, "--images", folders / "photos")


def test_what_needs_torch_says_so_in_one_line(galleries, folders):
    line = "error: torch is not installed: pip install -r requirements-search.txt"
    assert without_torch("find", "a man", "--gallery", galleries[0]) == line
    data = ("--dataset_name", "AGDataAttr", "--gallery", folders / "new")
    assert without_torch("index", "--onnx", folders / "exported", *data) == line


def test_the_device_is_that_of_the_options(folders, monkeypatch):
    asked = []

    def session(path, providers):
        asked.append(providers)
        return SimpleNamespace()

    known = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: known)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    for device in ("auto", "cuda", "cpu"):
        OnnxEncoder(folders / "exported", device)
    assert asked == [known, known, known, known, known[1:], known[1:]]


def test_threads_read_one_chunk_ahead_and_errors_come_through():
    taken, lock = [], threading.Lock()

    def reader(number, count):
        for n in range(count):
            with lock:
                taken.append(number)
            yield Chunk(rows=[{"at": (number, n)}])

    chunks = in_threads([reader(0, 3), reader(1, 1), reader(2, 0)])
    first = next(chunks)
    order = [first.rows[0]["at"], *(chunk.rows[0]["at"] for chunk in chunks)]
    assert order == [(0, 0), (1, 0), (0, 1), (0, 2)]
    endless = in_threads([reader(7, 1000)])
    for _ in range(3):
        next(endless)
    endless.close()
    assert taken.count(7) == 4

    def failing():
        yield Chunk()
        raise MemoryError

    with pytest.raises(MemoryError):
        list(in_threads([failing()]))
