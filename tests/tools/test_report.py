import argparse
import base64
import html.parser
import io
import json
import math
import re
import sys
from pathlib import Path

import pytest
from PIL import Image as PILImage

import test as test_entry
import tools.report as tool
import train as train_entry
from processor.results import read_queries
from tests.helpers import SCRATCH, run
from tools import _report_charts as charts
from tools._report_runs import ReportedRun, read_run
from utils.errors import UserError

HOSTILE = """ "'><script>x</script><b onload=y> {{ 7 * 7 }} $\\frac \x1b \u202e \ud800 &amp;"""
GIVEN = argparse.Namespace(queries=2, root_dir="", attributes_file="", device="cpu", heatmaps=False)


@pytest.fixture(scope="module")
def evaluated(mini_root, tmp_path_factory):
    """Folders of two short runs, trained and evaluated."""
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
    """Parses a page: asserts that tags are closed, and keeps each with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def values(self, name):
        return [attrs[name] for _, attrs in self.tags if name in attrs]


def synthetic(**scalars):
    """A run with these curves and no folder."""
    return ReportedRun(Path("a"), "a", {}, scalars, "#ff0000")


def test_a_page_of_two_runs_is_complete_and_has_no_external_links(evaluated, tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    run(tool.main, monkeypatch, *evaluated, "--output", out, "--queries", 3, "--device", "cpu")
    text = out.read_text()
    page = Page(text)
    links = page.values("href") + page.values("xlink:href") + page.values("src")
    ids = page.values("id")
    assert len(ids) == len(set(ids)) and {x[1:] for x in links if x[0] == "#"} <= set(ids)
    assert all(x.startswith(("#", "data:image/jpeg;base64,")) for x in links)
    assert set(re.findall(r"url\(.", text)) <= {"url(#"} and "@import" not in text
    assert set(re.findall(r"(\S*)=\"https?:", text)) == {"xmlns", "xmlns:xlink"}
    assert 'name="viewport"' in text and "default-src 'none'" in text
    assert "chosen by R@1 on the test split: this is the paper&#39;s protocol." in text
    for words in ("Recall against rank", "loss/supkl", "samples_per_second", "R@1", "All options",
                  "FIRM's accuracy"):  # fmt: skip
        assert words in text
    # Two runs, three galleries, two sheets (worst, random), three captions, ten images.
    shown = re.findall(r"<title>(rank \d+: (?:hit|miss), identity \d+, .*?)</title><use href", text)
    assert len(shown) == 2 * 3 * 2 * 3 * 10
    pictures = page.all("image")
    assert len({picture["href"] for picture in pictures}) == len(pictures) < len(shown) / 3
    picture = PILImage.open(io.BytesIO(base64.b64decode(pictures[0]["href"].split(",")[1])))
    assert picture.height <= tool.THUMBNAIL == int(pictures[0]["height"])
    assert abs(picture.width / picture.height * tool.THUMBNAIL - int(pictures[0]["width"])) <= 1
    assert len(text) < 700_000


def test_the_same_runs_give_the_same_bytes(evaluated):
    runs = [read_run(folder, "#ff0000") for folder in evaluated]
    assert tool.report(runs, GIVEN) == tool.report(runs, GIVEN)


def test_frames_agree_with_the_per_caption_results(evaluated, tmp_path, monkeypatch):
    """The first green frame of a caption is at its rank in test_queries.npz."""
    out = tmp_path / "report.html"
    run(tool.main, monkeypatch, evaluated[0], "--output", out, "--queries", 20, "--device", "cpu")
    captions = re.findall(r"first match at rank (\d+) of.*?<div class=\"row\">(.*?)</div>", out.read_text(), re.DOTALL)  # fmt: skip
    assert len(captions) > 20
    for rank, images in captions:
        frames = [bool(hit) for hit in re.findall(r'role="img"( class="hit")?>', images)]
        assert frames == [label == "hit" for label in re.findall(r"<title>rank \d+: (\w+)", images)]
        assert (frames.index(True) + 1 if any(frames) else 0) == (int(rank) if int(rank) <= 10 else 0)  # fmt: skip
    ranked = read_queries(evaluated[0] / "test_queries.npz", "test", "aerial")
    assert {int(r) for r, _ in captions} & {int(r) for r in ranked.rows_Q3[:, 0]}


def test_only_shown_captions_are_compared_with_the_gallery(evaluated, tmp_path, monkeypatch):
    compared, best = [], tool.best_images
    monkeypatch.setattr(tool, "best_images", lambda c, i: compared.append(len(c)) or best(c, i))
    out = tmp_path / "report.html"
    run(tool.main, monkeypatch, evaluated[0], "--output", out, "--queries", 3, "--device", "cpu")
    assert compared == [3] * 2 * 3  # two sheets of each of three galleries
    with pytest.raises(UserError, match="--queries -1: must be 0 or more"):
        run(tool.main, monkeypatch, evaluated[0], "--queries", -1)


def test_results_with_other_captions_than_the_data_set_are_refused(
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


def test_heat_maps_lie_over_all_ranked_images_and_are_switched_on_without_a_script(evaluated):
    runs = [read_run(evaluated[0], "#ff0000")]
    plain = tool.report(runs, GIVEN)
    page = tool.report(runs, argparse.Namespace(**{**vars(GIVEN), "heatmaps": True}))
    uses, heat = page.count("<use href"), page.count('<use class="heat"')
    assert uses == heat == plain.count("<use href") > 0 and plain.count('class="heat"') == 0
    (switch,) = (attrs for tag, attrs in Page(page).tags if tag == "input")
    assert switch == {"type": "checkbox", "class": "heat-switch"}
    images = {attrs["id"]: attrs["href"] for tag, attrs in Page(page).tags if tag == "image"}
    layers = re.findall(r'<use href="#(p\d+)"/><use class="heat" href="#(p\d+)"/>', page)
    assert len(layers) == heat
    assert all(images[picture] != images[over] for picture, over in layers)


def test_a_run_that_was_not_evaluated_is_refused(evaluated, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="evaluate the run first"):
        run(tool.main, monkeypatch, tmp_path, "--output", tmp_path / "x.html")


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_an_error_names_the_missing_package(package, evaluated, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "tools._report_charts")
    monkeypatch.delattr(sys.modules["tools"], "_report_charts")
    with pytest.raises(UserError, match=f"{package} is not installed; pip install -r requirem"):
        tool.report([read_run(evaluated[0], "#ff0000")], GIVEN)


def test_untrusted_text_changes_no_tag_of_the_page(evaluated, monkeypatch):
    """Hostile names, scalar tags, galleries, captions and options give the same HTML tags as harmless ones."""
    pages = {}
    for text in ("harm/less", HOSTILE):
        runs = [read_run(folder, "#ff0000") for folder in evaluated]
        for one in runs:
            one.name = text
            one.results["protocol"] = {"text": text}
            one.results["data"] = {"changed": {text: text}}
            split = one.results["splits"]["test"]
            one.results["splits"][text] = {"galleries": {text: split["galleries"]["aerial"]}}
            split["attribute_accuracy"] = {text: {text: 50.0}}
            one.scalars = {text: [(1, 1.0)], f"{text}/b": [(1, math.nan), (2, 1.0)]}
        picture = tool.RankedPicture("x", True, text)
        monkeypatch.setattr(tool, "sheets", lambda *_, t=text, p=picture: [tool.Sheet(t, [(t, t, [p])])])  # fmt: skip
        monkeypatch.setattr(tool, "thumbnail", lambda path: (1, "data:,"))
        monkeypatch.setattr(tool, "options_table", lambda _, t=text: [(t, t, "")])
        pages[text] = tool.report(runs, GIVEN)
    assert pages[HOSTILE].encode()
    trees = [[(tag, list(attrs)) for tag, attrs in Page(page).tags] for page in pages.values()]
    assert trees[0] == trees[1]
    shown = html.unescape(pages[HOSTILE])
    assert "{{ 7 * 7 }} $\\frac \\x1b \\u202e \\ud800 &amp;" in shown and "\x1b" not in shown


def test_results_of_older_versions_get_their_rsum(evaluated):
    run = read_run(evaluated[0], "#ff0000")
    galleries = [g for split in run.results["splits"].values() for g in split["galleries"].values()]
    expected = [f"{gallery.pop('RSum'):.2f}" for gallery in galleries]
    assert sorted(row["values"][-1] for row in tool.metrics([run])) == sorted(expected)


def test_the_table_can_be_filtered_and_has_the_best_value_of_each_gallery_in_bold(evaluated):
    runs = [read_run(folder, "#ff0000") for folder in evaluated]
    for one, value in zip(runs, (50, 60), strict=True):
        gallery = one.results["splits"]["test"]["galleries"]["ground"]
        gallery.update(dict.fromkeys(gallery, value), mAP=40)
    rows = [r for r in tool.metrics(runs) if r["gallery"] == "ground" and r["split"] == "test"]
    assert [row["best"] for row in rows] == [
        [False, False, False, True, False, False], [True] * 6
    ]  # fmt: skip
    assert not any(any(row["best"]) for row in tool.metrics(runs[:1]))
    page = Page(tool.report(runs, argparse.Namespace(**{**vars(GIVEN), "queries": 0})))
    offered = {attrs["value"] for attrs in page.all("option")} - {""}
    assert offered == {*page.values("data-split"), *page.values("data-gallery")}
    assert {attrs["scope"] for attrs in page.all("th")} == {"col", "row"}


def test_runs_of_different_length_share_the_axis_of_epochs(monkeypatch):
    drawn, figure = [], charts.figure
    monkeypatch.setattr(charts, "figure", lambda *a: drawn.append(figure(*a)) or drawn[-1])
    short, long = ([(n, 1000.0 / n) for n in range(1, most + 1)] for most in (3, 12))
    groups = charts.training([synthetic(lr=short, **{"loss/a": long}), synthetic(**{"loss/a": short})])  # fmt: skip
    assert {group: [c.title for c in of] for group, of in groups.items()} == {"loss": ["loss/a"], "": ["lr"]}  # fmt: skip
    axes = [one.axes[0] for one in drawn]
    assert len({a.get_xlim() for a in axes}) == len({a.get_position().bounds for a in axes}) == 1
    assert all(a.get_xlim()[0] < 1 and 12 < a.get_xlim()[1] < 13 for a in axes)


def test_a_long_line_is_thinned_to_its_extremes_and_keeps_gaps():
    points = [(n, math.sin(n)) for n in range(1, 5001)]
    points[1233] = (1234, 9.0)
    points[4321] = (4322, -9.0)
    points[2000:2003] = [(n, math.nan) for n in (2001, 2002, 2003)]
    kept = charts.thinned(points)
    assert len(kept) <= charts.MOST and kept == sorted(set(kept) & set(points), key=points.index)
    assert {points[0], points[-1], points[1233], points[4321]} <= set(kept)
    assert any(2001 <= x <= 2003 and math.isnan(y) for x, y in kept)
    assert charts.thinned(points[:500]) == points[:500]
    assert len(charts.thinned([(n, math.nan if n % 2 else 1.0) for n in range(9999)])) <= charts.MOST  # fmt: skip
    (line,) = charts.figure([("#ff0000", points)], "epoch", (1, 5000), None).axes[0].lines
    assert line.get_markevery() == [] and line.get_linewidth() <= 1


def test_a_chart_takes_the_pages_text_style_and_adds_no_style_sheet():
    chart = charts.training([synthetic(a=[(1, 1.0), (2, 2.0)])])[""][0]
    assert chart.summary == "a: 2 in the end, 1 to 2" and not chart.notes
    assert "currentColor" in chart.svg and charts.INK not in chart.svg
    assert "<style" not in chart.svg and "width=" not in chart.svg.split(">")[0]
    assert not re.search(r"fill: #(?!ff0000)", chart.svg)  # no background
