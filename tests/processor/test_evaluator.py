"""Metrics of an evaluation depend on neither its batches nor the gallery's order."""

import random
import shutil

import torch

from datasets.transforms import normalise
from model.build import build_model
from processor.evaluator import Evaluator
from tests.helpers import SCRATCH, options, read

CPU = torch.device("cpu")


def test_a_picture_that_is_there_twice_has_one_feature_in_any_batch_and_order(mini_copy):
    """Its files have other names and identities, so one of them is wrong: which one comes first may
    not follow from where they stand."""
    data = read("AGData", mini_copy)
    split = data.splits["test"]
    gallery = split.galleries["aerial"]
    for source, target in ((0, -1), (1, -2), (2, -3)):
        shutil.copyfile(gallery.images[source].path, gallery.images[target].path)
    twins = [(gallery.images[i].path, gallery.images[-1 - i].path) for i in range(3)]
    model = build_model(options(**SCRATCH), [], num_classes=0)
    found = set()
    for size in (1, 2, 5, 512):
        rows = list(zip(gallery.images, gallery.pids, gallery.sources, strict=True))
        random.Random(size).shuffle(rows)
        gallery.images, gallery.pids, gallery.sources = map(list, zip(*rows, strict=True))
        evaluator = Evaluator(data, "test", options(**SCRATCH, test_batch_size=size), CPU)
        features = evaluator.encode(model)
        assert len(features.views["aerial"]) == len(gallery.images)
        assert len(evaluator.loaders["aerial"].dataset) == len(gallery.images) - 3
        place = {image.path: i for i, image in enumerate(gallery.images)}
        for one, other in twins:
            a, b = (features.views["aerial"][place[path]] for path in (one, other))
            assert torch.equal(a, b)
        galleries = evaluator.galleries(features).items()
        found.add(tuple((name, *r.summary().metrics.values()) for name, r in galleries))
    assert len(found) == 1


def test_every_image_has_its_own_feature_where_some_are_repeated(mini_copy):
    """Rows of the gallery, not of the distinct files."""
    data = read("AGData", mini_copy)
    gallery = data.splits["test"].galleries["ground"]
    gallery.images[3] = gallery.images[0]
    args = options(**SCRATCH, test_batch_size=512)
    model = build_model(args, [], num_classes=0)
    evaluator = Evaluator(data, "test", args, CPU)
    repeated = evaluator.encode(model).views["ground"]
    for i, image in enumerate(gallery.images):
        single = evaluator.loaders["ground"].dataset
        alone = single[single.paths.index(image.path)][None]
        with torch.no_grad():
            torch.testing.assert_close(repeated[i], model.encode_image(normalise(alone))[0], rtol=1e-4, atol=1e-5)  # fmt: skip
