import base64
import html.parser
import io
import json
import re

import pytest
from PIL import Image as PILImage

import test as test_entry
import tools.report as tool
import train as train_entry
from processor.queries import read_queries
from tests.helpers import SCRATCH, run
from utils.errors import UserError


@pytest.fixture(scope="module")
def evaluated(mini_root, tmp_path_factory):
    """Two short runs, evaluated."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for losses in ("supkl+match2+dot", "itc"):
            values = {
                "root_dir": mini_root, "output_dir": out, "batch_size": 6, "num_epoch": 2,
                "warmup_epochs": 0, "num_workers": 0, "device": "cpu", "precision": "fp32",
                "loss_names": losses, "name": losses, **SCRATCH,
            }  # fmt: skip
            words = [w for name, value in values.items() for w in (f"--{name}", str(value))]
            run(train_entry.main, monkeypatch, *words, "--img_size", 32, 16)
        runs = sorted(out.glob("*/*"))
        for folder in runs:
            run(test_entry.main, monkeypatch, "--config_file", folder / "configs.yaml")
    return runs


class Page(html.parser.HTMLParser):
    """Counts tags, checks that they are closed, and keeps images."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.tags = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_of_two_runs_is_whole_and_needs_nothing_else(evaluated, tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    run(tool.main, monkeypatch, *evaluated, "--output", out, "--queries", 3, "--device", "cpu")
    text = out.read_text()
    page = Page(text)
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "<script" not in text
    assert 'name="viewport"' in text
    assert "chosen by R@1 on the test split: this is the paper&#x27;s protocol." in text
    for words in ("Recall against rank", "loss/supkl", "samples_per_second", "R@1", "All options",
                  "FIRM&#x27;s accuracy per attribute" if "FIRM&#x27;s" in text else "FIRM's accuracy"):  # fmt: skip
        assert words in text
    # Two runs, three galleries, the worst and random ones, three captions, ten images.
    assert len(page.images) == 2 * 3 * 2 * 3 * 10
    picture = base64.b64decode(page.images[0]["src"].split(",")[1])
    assert PILImage.open(io.BytesIO(picture)).height == tool.THUMBNAIL


def test_frames_agree_with_the_results_of_every_caption(evaluated, tmp_path, monkeypatch):
    """The first green frame of a sheet stands at the rank that test_queries.npz has."""
    out = tmp_path / "report.html"
    run(tool.main, monkeypatch, evaluated[0], "--output", out, "--queries", 20, "--device", "cpu")
    found = re.findall(r"first match at rank (\d+) of.*?<div class=\"row\">(.*?)</div>", out.read_text())  # fmt: skip
    assert len(found) > 20
    for rank, images in found:
        frames = re.findall(r'class="(hit|miss)"', images)
        assert (frames.index("hit") + 1 if "hit" in frames else 0) == (int(rank) if int(rank) <= 10 else 0)  # fmt: skip
    ranked = read_queries(evaluated[0] / "test_queries.npz", "test", "aerial")
    assert {int(r) for r, _ in found} & {int(r) for r in ranked.rows_Q3[:, 0]}


def test_only_captions_that_are_shown_are_compared_with_the_gallery(
    evaluated, tmp_path, monkeypatch
):
    compared, best = [], tool.best_images
    monkeypatch.setattr(tool, "best_images", lambda c, i: compared.append(len(c)) or best(c, i))
    out = tmp_path / "report.html"
    run(tool.main, monkeypatch, evaluated[0], "--output", out, "--queries", 3, "--device", "cpu")
    assert compared == [3] * 2 * 3  # the worst and random ones of three galleries
    with pytest.raises(UserError, match="--queries -1: must be 0 or more"):
        run(tool.main, monkeypatch, evaluated[0], "--queries", -1)


def test_results_of_other_captions_than_the_data_set_has_are_refused(
    evaluated, mini_copy, tmp_path, monkeypatch
):
    path = mini_copy / "AG-ReID/agtext_test.json"
    content = json.loads(path.read_text())
    for name in ("caption_pids", "captions"):
        content[name].append(content[name].pop(0))
    path.write_text(json.dumps(content))
    words = (evaluated[0], "--output", tmp_path / "x.html", "--device", "cpu")
    with pytest.raises(UserError, match="other captions or images in test_queries.npz than in"):
        run(tool.main, monkeypatch, *words, "--root_dir", mini_copy)


def test_a_run_that_was_not_evaluated_is_told(evaluated, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="evaluate the run first"):
        run(tool.main, monkeypatch, tmp_path, "--output", tmp_path / "x.html")


def test_captions_and_names_are_escaped():
    assert "<b>" not in tool.table(["<b>"], [["a & <b>"]])
    chart = tool.plot("<b>", {"<b>": ("red", [(0, 1.0), (1, 1.0)])}, "epoch")
    assert "<b>" not in chart and "nan" not in chart


@pytest.mark.parametrize(("low", "high"), [(0, 1), (79.59, 100), (1.19, 1.32), (-3, 4), (0, 2e-5)])
def test_axes_have_a_few_round_values(low, high):
    values = tool.round_values(low, high)
    assert 3 <= len(values) <= 8 and low - 1e-9 <= values[0] and values[-1] <= high + 1e-9
    step = values[1] - values[0]
    assert f"{step:.0e}"[0] in "125"
