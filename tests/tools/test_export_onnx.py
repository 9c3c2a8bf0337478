"""Encoders in ONNX: the features of PyTorch, for any batch and length, and without torch."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image as PILImage

import tools._export_onnx as export
import tools.export as tool
from gallery.pictures import as_bytes
from model.aeafirm import AEAFIRM
from model.backbone import Backbone
from model.build import build_model
from model.weights import BackboneConfig
from processor.inference import load_run
from tests.helpers import ROOT, SCRATCH, options, run
from utils.checkpoint import save_checkpoint
from utils.config import write_config
from utils.errors import UserError

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from gallery.onnx import ABOUT, IMAGE, OnnxEncoder

WEIGHTS = {"name": "run", "checkpoint": "best.pth", "sha256": "0" * 64, "pretrain_choice": ""}
CAPTIONS = [
    "A man in a grey shirt.",
    "x",
    "a woman with a long coat and a very small dog " * 20,
    "caf\u00e9",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run with FIRM's head, and its export."""
    folder = tmp_path_factory.mktemp("run")
    args = options(**{**SCRATCH, "img_size": [64, 32], "text_length": 20, "vision_layers": 2}, loss_names="supkl+match2+dot")  # fmt: skip
    model = build_model(args, ("match2", "dot"), num_classes=0)
    save_checkpoint(folder / "best.pth", {"model": model.state_dict(), "epoch": 3, "input": model.base_model.input})  # fmt: skip
    write_config(folder / "configs.yaml", args)
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(
            tool.main,
            monkeypatch,
            "--config_file",
            folder / "configs.yaml",
            "--onnx",
            folder / "onnx",
        )
    return folder, folder / "onnx"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Files and a PIL image: turned, large, grey, and of 16 bits."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    exif = PILImage.Exif()
    exif[274] = 6
    paths = []
    for n, (height, width) in enumerate(((80, 40), (900, 700), (64, 32), (33, 90))):
        image = PILImage.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        paths.append(folder / f"{n}.{'jpg' if n < 2 else 'png'}")
        image.save(paths[-1], exif=exif) if n == 0 else image.save(paths[-1])
    grey = folder / "grey.png"
    PILImage.fromarray(rng.integers(0, 2**16, (50, 30), np.uint16)).save(grey)
    return [*paths, grey, PILImage.open(paths[0])]


def test_features_are_those_of_the_run(folders, pictures):
    trained, encoder = load_run(folders[0], device="cpu", precision="fp32"), OnnxEncoder(folders[1])
    for n in (1, 3, len(pictures)):
        ours, theirs = (
            trained.encode_image(pictures[:n]).numpy(),
            encoder.encode_image(pictures[:n]),
        )
        assert theirs.dtype == np.float32 and np.abs(ours - theirs).max() < 1e-4
    for captions in (CAPTIONS, CAPTIONS[:1], CAPTIONS[1:2], CAPTIONS * 40):
        ours, theirs = trained.encode_text(captions).numpy(), encoder.encode_text(captions)
        assert np.abs(ours - theirs).max() < 1e-4
    np.testing.assert_allclose(np.linalg.norm(theirs, axis=1), 1, rtol=1e-5)
    assert encoder.encode_text([]).shape == encoder.encode_image([]).shape == (0, 64)


def test_attributes_are_firms(folders, pictures):
    trained, encoder = load_run(folders[0], device="cpu", precision="fp32"), OnnxEncoder(folders[1])
    images = np.stack([as_bytes(picture, encoder.size) for picture in pictures])
    features, attributes = encoder.encode_bytes(images)
    predicted = trained.model.predict_attributes(trained.encode_image(pictures, normalize=False))
    assert list(attributes) == list(encoder.attributes) and features.shape == (6, 64)
    for column, (name, scores) in enumerate(attributes.items()):
        assert scores.shape == (6, len(encoder.attributes[name]))
        np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-5)
        assert (scores.argmax(axis=1) == predicted[:, column].numpy()).all()


def test_it_needs_no_torch(folders, pictures):
    """In a process of its own, torch and open_clip cannot be imported, and features are the same."""
    paths = [str(path) for path in pictures[:-1]]
    code = f"""
import json, sys
sys.modules["torch"] = sys.modules["open_clip"] = None  # importing them raises
from gallery.onnx import OnnxEncoder
encoder = OnnxEncoder({str(folders[1])!r})
features = encoder.encode_image({paths!r}), encoder.encode_text({CAPTIONS!r})
assert not [name for name in sys.modules if name.startswith(("torch", "open_clip")) and sys.modules[name]]
print(json.dumps([f.tolist() for f in features]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    encoder = OnnxEncoder(folders[1])
    for theirs, ours in zip(json.loads(done.stdout), (encoder.encode_image(paths), encoder.encode_text(CAPTIONS)), strict=True):  # fmt: skip
        np.testing.assert_allclose(theirs, ours, atol=1e-6)


def test_the_description_has_what_a_program_needs(folders):
    about = json.loads((folders[1] / ABOUT).read_text())
    assert (about["img_size"], about["text_length"], about["embed_dim"]) == ([64, 32], 20, 64)
    assert (
        about["epoch"] == 3 and len(about["sha256"]) == 64 and about["pretrain_choice"] == "scratch"
    )
    assert about["attributes"]["gender"] == ["male", "female"] and "49406" in about["tokenizer"]
    assert not list(folders[1].glob(".*"))  # nothing unfinished


def test_a_resnet_is_exported(tmp_path):
    resnet = Backbone(BackboneConfig(32, (1, 1, 1, 1), 64, None, 64, 1), (64, 32))
    model = AEAFIRM(resnet, (), options(seed=1)).eval()
    line = export.export_onnx(model, tmp_path, 10, [], WEIGHTS)
    assert "ONNX Runtime gives PyTorch's features" in line
    assert OnnxEncoder(tmp_path).encode_bytes(np.zeros((3, 3, 64, 32), np.uint8))[1] == {}


def test_an_export_that_computes_something_else_is_not_written(folders, tmp_path, monkeypatch):
    model = load_run(folders[0], device="cpu", precision="fp32").model
    monkeypatch.setattr(export, "_write", lambda *rest: None)
    monkeypatch.setattr(export, "_error", lambda *rest: 1e-3)
    with pytest.raises(UserError, match="not written: its features differ by 1.0e-03"):
        export.export_onnx(model, tmp_path / "x", 20, [], {})
    assert not list((tmp_path / "x").iterdir())


@pytest.mark.parametrize(("change", "message"), [
    ({"version": 1}, "version 1, but this code reads 2"),
    ({"img_size": [64]}, "img_size is"),
    ({"text_length": "20"}, "text_length is '20'"),
    ({"attributes": {"gender": 2}}, "attributes are not lists"),
])  # fmt: skip
def test_a_description_that_is_wrong_is_named(folders, tmp_path, change, message):
    folder = shutil.copytree(folders[1], tmp_path / "x")
    about = json.loads((folder / ABOUT).read_text())
    (folder / ABOUT).write_text(json.dumps({**about, **change}))
    with pytest.raises(UserError, match=f"encoder.json: {message}"):
        OnnxEncoder(folder)


def test_a_missing_or_corrupted_file_is_named(folders, tmp_path):
    with pytest.raises(UserError, match="encoder.json: no such file; --onnx takes a folder of"):
        OnnxEncoder(tmp_path)
    for name in (IMAGE, "bpe_simple_vocab_16e6.txt.gz"):
        folder = shutil.copytree(folders[1], tmp_path / name)
        (folder / name).write_bytes(b"corrupted")
        with pytest.raises(UserError, match=f"{name}: cannot be .*; export the run again"):
            OnnxEncoder(folder)


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_a_missing_package_is_named(package, folders, tmp_path, monkeypatch):
    model = load_run(folders[0], device="cpu", precision="fp32").model
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=f"{package} is not installed; pip install -r requirements-"
    ):
        export.export_onnx(model, tmp_path, 20, [], {})
