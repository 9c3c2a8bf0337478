import logging
from types import SimpleNamespace

import torch

from datasets.records import Data, Split, TrainSample
from processor.summary import describe
from tests.helpers import options
from utils.distributed import ALONE


def test_the_log_tells_what_the_reader_warned_of(caplog):
    sample = TrainSample(0, "a man", None, None, "x.json, entry 0")
    data = Data("AGData", [sample], {}, warnings=["said twice: 1 samples of train"])
    loaders = {"aerial": SimpleNamespace(num_workers=0)}
    evaluator = SimpleNamespace(name="test", split=Split([], {}), images={}, loaders=loaders)
    with caplog.at_level(logging.INFO):
        describe(logging.getLogger("x"), data, [evaluator], options(), torch.device("cpu"), ALONE)
    assert "warning: said twice: 1 samples of train" in caplog.messages
