"""The metrics do not depend on the batch size or on the order of the gallery."""

import random
import shutil

import torch

import processor.evaluator as evaluator_module
from datasets.transforms import normalise
from model.build import build_model
from processor.evaluator import Evaluator
from tests.helpers import SCRATCH, options, read

CPU = torch.device("cpu")


def test_an_image_that_occurs_twice_has_one_feature_in_any_batch_and_order(mini_copy):
    """The two files have different names and identities, so only one can be a match. Their rank
    must not depend on their places in the gallery."""
    data = read("AGData", mini_copy)
    split = data.splits["test"]
    gallery = split.galleries["aerial"]
    for source, target in ((0, -1), (1, -2), (2, -3)):
        shutil.copyfile(gallery.images[source].path, gallery.images[target].path)
    twins = [(gallery.images[i].path, gallery.images[-1 - i].path) for i in range(3)]
    model = build_model(options(**SCRATCH), [], num_classes=0)
    results = set()
    for size in (1, 2, 5, 512):
        rows = list(zip(gallery.images, gallery.pids, gallery.sources, strict=True))
        random.Random(size).shuffle(rows)
        gallery.images, gallery.pids, gallery.sources = map(list, zip(*rows, strict=True))
        evaluator = Evaluator(data, "test", options(**SCRATCH, test_batch_size=size), CPU)
        features = evaluator.encode(model)
        assert len(features.views["aerial"]) == len(gallery.images)
        assert len(evaluator.loaders["aerial"].dataset) == len(gallery.images) - 3
        rows_by_path = {image.path: i for i, image in enumerate(gallery.images)}
        for paths in twins:
            a, b = (features.views["aerial"][rows_by_path[path]] for path in paths)
            assert torch.equal(a, b)
        galleries = evaluator.galleries(features).items()
        results.add(tuple((name, *r.summary().metrics.values()) for name, r in galleries))
    assert len(results) == 1


def test_an_epochs_evaluation_ranks_the_first_view_alone(mini_copy, monkeypatch):
    args = options(**SCRATCH)
    model = build_model(args, [], num_classes=0)
    evaluator = Evaluator(read("AGData", mini_copy), "test", args, CPU)
    expected = evaluator.galleries(evaluator.encode(model))["aerial"].summary()
    ranked, rank = [], evaluator_module.rank_gallery
    monkeypatch.setattr(evaluator_module, "rank_gallery", lambda *x: ranked.append(x) or rank(*x))
    assert evaluator.evaluate(model) == expected and len(ranked) == 1


def test_features_follow_the_gallery_if_images_are_repeated(mini_copy):
    """One row per image of the gallery, not per distinct file."""
    data = read("AGData", mini_copy)
    gallery = data.splits["test"].galleries["ground"]
    gallery.images[3] = gallery.images[0]
    args = options(**SCRATCH, test_batch_size=512)
    model = build_model(args, [], num_classes=0)
    evaluator = Evaluator(data, "test", args, CPU)
    features = evaluator.encode(model).views["ground"]
    for i, image in enumerate(gallery.images):
        distinct = evaluator.loaders["ground"].dataset
        batch = normalise(distinct[distinct.paths.index(image.path)][None])
        with torch.no_grad():
            torch.testing.assert_close(features[i], model.encode_image(batch)[0], rtol=1e-4, atol=1e-5)  # fmt: skip
