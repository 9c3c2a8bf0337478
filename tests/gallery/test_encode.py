"""A gallery has the features, the ranking and the attributes of the evaluation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import search
from gallery.encode import load_encoder, run_encoder, weights_encoder
from gallery.store import Gallery
from processor.inference import load_pretrained, load_run
from tests.gallery.made import path_of
from tests.helpers import run
from tests.reliability.runs import train_small_run
from utils.errors import UserError


@pytest.fixture(scope="module")
def folder(mini_root, tmp_path_factory):
    return train_small_run(mini_root, tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def gallery(folder, mini_root, tmp_path_factory):
    """The test split of mini."""
    path = tmp_path_factory.mktemp("gallery") / "test"
    words = ("--dataset_name", "AGDataAttr", "--root_dir", mini_root, "--split", "test")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(search.main, monkeypatch, "index", "--gallery", path, "--config_file", folder / "configs.yaml", "--num_workers", 0, "--test_batch_size", 4, *words)  # fmt: skip
    return Gallery.open(path)


def evaluation(folder):
    evaluated = load_run(folder, device="cpu")
    evaluator = evaluated.evaluator("test")
    return evaluated, evaluator, evaluator.encode(evaluated.model)


def rows_of(gallery, images):
    rows = {path_of(gallery, n): n for n in range(len(gallery.items))}
    return [rows[image.path] for image in images]


def test_features_and_ranking_are_those_of_the_evaluation(folder, gallery):
    evaluated, evaluator, features = evaluation(folder)
    captions = evaluated.encode_text(evaluator.split.captions)
    for view, images in evaluator.images.items():
        rows, expected = rows_of(gallery, images), F.normalize(features.views[view])
        found = gallery.features[rows]
        assert np.array_equal(found, expected.half().numpy())
        seen = gallery.items["view"].take(rows).to_pylist()
        assert set(seen) == {view}
        order = (captions @ expected.half().float().T).argsort(dim=1, descending=True)
        assert torch.equal((captions @ torch.tensor(found).float().T).argsort(dim=1, descending=True), order)  # fmt: skip
        # Float16 moves no score by more than its own precision.
        scores, exact = captions @ torch.tensor(found).float().T, captions @ expected.T
        torch.testing.assert_close(scores, exact, rtol=0, atol=5e-4)
    assert len(gallery.items) == sum(map(len, evaluator.images.values()))


def test_labels_of_the_data_set_have_the_score_1(gallery):
    for name in ("gender", "person_height", "altitude"):
        assert gallery.items[name].null_count == 0
        assert set(gallery.items[f"{name}_score"].to_pylist()) == {1.0}


def test_attributes_are_those_that_the_evaluation_predicts(folder, mini_root):
    evaluated, evaluator, features = evaluation(folder)
    encoder = run_encoder(folder, device="cpu")
    feature_GD = features.views["aerial"]
    expected = evaluated.model.predict_attributes(feature_GD)
    guesses = encoder.classify(feature_GD)
    assert list(guesses) == list(evaluator.attribute_names)
    for a, (name, (classes, scores)) in enumerate(guesses.items()):
        assert classes == [encoder.attributes[name][c] for c in expected[:, a].tolist()]
        assert all(1 / len(encoder.attributes[name]) <= s < 1 for s in scores)


def test_an_encoder_comes_from_a_run_or_from_the_manifest(folder, gallery, tmp_path):
    captions = ["a man in a grey shirt"]
    by_run = load_encoder(folder / "configs.yaml", device="cpu")
    by_manifest = load_encoder(gallery.manifest, device="cpu")
    assert torch.equal(by_run.encode_text(captions), by_manifest.encode_text(captions))
    path = path_of(gallery, 0)
    assert torch.equal(by_manifest.encode_image([path]), load_run(folder, device="cpu").encode_image([path]))  # fmt: skip
    moved = {**gallery.manifest["encoder"], "folder": str(tmp_path / "gone")}
    with pytest.raises(UserError, match="gone/configs.yaml: no such file"):
        load_encoder({"encoder": moved}, device="cpu")
    assert load_encoder({"encoder": moved}, run=folder, device="cpu").about["folder"] == str(folder)
    other = {**gallery.manifest["encoder"], "sha256": "f" * 64}
    with pytest.raises(UserError, match="best.pth: not the weights that made the gallery"):
        load_encoder({"encoder": other}, device="cpu")


def test_vanilla_weights_encode_without_a_run(clip_file, gallery):
    encoder = weights_encoder(str(clip_file), [96, 32], device="cpu")
    assert encoder.about["kind"] == "weights" and encoder.attributes == {}
    image_GD = encoder.encode_image([path_of(gallery, 0), path_of(gallery, 1)])
    expected = load_pretrained(str(clip_file), img_size=[96, 32], device="cpu")
    assert torch.equal(image_GD, expected.encode_image([path_of(gallery, 0), path_of(gallery, 1)]))
    torch.testing.assert_close(image_GD.norm(dim=1), torch.ones(2))
    again = load_encoder({"encoder": encoder.about}, device="cpu")
    assert torch.equal(again.encode_text("a man"), encoder.encode_text("a man"))
    assert encoder.classify(image_GD) == {}
    with pytest.raises(UserError, match="random weights find nobody"):
        weights_encoder("scratch")
