"""What every reader must return is checked, with a message for the author of a reader."""

from dataclasses import replace

import pytest

from datasets.records import Data, Gallery, Image, Split, TrainSample
from utils.errors import UserError


def small() -> Data:
    """Two people to train on and one to test on, with two attributes."""
    image = Image("a.jpg", (1, 2))
    train = [TrainSample(pid, "a man", image, image, f"entry {pid}") for pid in (0, 1)]
    test = Split(["x"], {"aerial": Gallery(), "ground": Gallery()})
    for gallery in test.galleries.values():
        gallery.add(image, 0, 0)
    test.add_caption("a man", 0, 0)
    return Data("Mine", train, {"test": test}, {"gender": 2, "age": 3})


def change(**values):
    """Change the second training sample."""
    return lambda d: d.train.__setitem__(1, replace(d.train[1], **values))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda d: d.train.clear(), "no training samples"),
        (change(pid=2), "training identities other than 0, 1, 2, ..."),
        (change(pair=None), "not one image per view for entry 1"),
        (change(image=Image("b.jpg", (1,))), "labels that fit no classes for entry 1"),
        (change(pair=Image("b.jpg", (1, 3))), "labels that fit no classes for entry 1"),
        (change(pair=Image("b.jpg", (-1, 0))), "labels that fit no classes for entry 1"),
        (lambda d: d.splits.clear(), "no test split"),
        (lambda d: d.splits["test"].galleries.pop("ground"), "galleries of test other than its"),
        (lambda d: d.splits["test"].galleries["ground"].add(Image("c"), 0, 0), "labels that fit no classes in test"),
        (lambda d: d.splits["test"].caption_pids.__setitem__(0, 9), "no image of aerial in test"),
    ],
)  # fmt: skip
def test_records_that_break_a_rule_are_refused(wrong, message):
    data = small()
    data.check()
    wrong(data)
    with pytest.raises(UserError, match=f"the reader of Mine returned {message}"):
        data.check()
