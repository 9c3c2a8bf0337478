"""The data card, of a table that is filled here with real small pictures."""

import html.parser
import re
import shutil
from collections import Counter

import pytest

from construction.card import write_card
from construction.quality import measure_file
from construction.recipe import Recipe
from construction.records import Caption, Label, Picture
from construction.table import Table
from datasets.mini import render_people

HOSTILE = """"'><script>x<b onload=y>|{{ 7 * 7 }}```\x1b\u202e[a](b)&amp;"""
RECIPE = {
    "seed": 3,
    "sources": [{"name": "campus", "reader": "table"}, {"name": "town", "reader": "ag_reid"}],
    "attributes": {
        "gender": {"origins": ["clip"], "default": "male"},
        "angle": {"origins": ["clip"], "default": "side"},
    },
    "output": {"layout": "custom"},
}
THUMBNAIL = re.compile("data:image/jpeg;base64,[A-Za-z0-9+/=]+")


def fill(root, identities=6, captions=None):
    """A data set of `identities` persons with two pairs each, after all stages but the card: the
    first picture of each view is broken, the last pair has no caption, one picture is of nobody.
    Returns its folder, table and recipe."""
    root.mkdir(parents=True, exist_ok=True)
    raw, folder = root / "raw", root / "set.unfinished"
    rendered = render_people(raw, identities, 2)
    table, measures = Table(root / "table.sqlite"), {}
    files = [(p, view, getattr(p, view)) for p in rendered for view in ("aerial", "ground")]
    sources = ("campus", "town")
    pictures = [
        Picture(
            sources[p.identity % 2],
            f"{view}/{n}.jpg",
            str(raw / file),
            view,
            f"P{p.identity}",
            str(p.identity),
        )
        for n, (p, view, file) in enumerate(files)
    ]
    for picture in pictures[:2]:
        (raw / picture.file).write_bytes(b"no picture")
    nobody = Picture("town", HOSTILE + ".jpg", str(raw / files[5][2]), "ground", "", "")
    table.add([*pictures, nobody])
    table.remove("sources", [(len(pictures) + 1, "no identity", HOSTILE)])
    for number, picture in enumerate(pictures, 1):
        (measures[number],) = measure_file(picture.file, [picture], root / "crops")
    table.set_measures(measures.items())
    table.remove("quality", [(n, "broken", measures[n].problem) for n in (1, 2)])
    split_of = ("train", "train", "val", "test")
    pairs = [(split_of[p.identity % 4], 2 * i + 1, 2 * i + 2) for i, p in enumerate(rendered)][1:]
    table.add_pairs(pairs)
    for number, pair in enumerate(pairs, 1):
        of = rendered[number]
        text = "" if number == len(pairs) else (captions or {}).get(number, of.captions[0])
        problem = "" if text else "too short"
        table.set_captions(
            [(number, Caption(text, HOSTILE, 0.25 + number / 100, problem, 2 if problem else 1))]
        )
        for n, labels in zip(pair[1:], (of.attributes, of.pair_attributes), strict=True):
            table.set_labels(
                (n, name, Label(labels[name], 0.75, "clip")) for name in ("gender", "angle")
            )
    table.finish()
    for candidate in table.written():
        path = folder / candidate.picture.source / candidate.picture.name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(candidate.picture.file, path)
    return folder, table, Recipe.model_validate(RECIPE)


def cards(folder, table, recipe, notes=()):
    """The Markdown and the HTML."""
    write_card(folder, table, recipe, notes)
    return [(folder / name).read_text() for name in ("card.md", "card.html")]


def rows(text, title):
    """The cells of the Markdown table below a heading."""
    below = text.split(f"### {title}\n\n")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in below[2:]]


class Page(html.parser.HTMLParser):
    """Parses a page: asserts that tags are closed, and counts them; keeps the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.urls = [], Counter(), "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        assert not any(name.startswith("on") for name, _ in attrs)
        self.urls += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("card"))


def test_counts_are_those_that_were_put_in(filled):
    text, _ = cards(*filled)
    # 6 persons of two pairs. The first pair is broken, the last one (of person 5) has no caption.
    assert (
        "6 persons, 6 identities, 10 pairs, 10 aerial pictures, 10 ground pictures, 10 captions."
        in text
    )
    assert rows(text, "Counts") == [
        ["campus", "train", "2", "2", "3", "3", "3", "3"],
        ["campus", "val", "1", "1", "2", "2", "2", "2"],
        ["campus", "all", "3", "3", "5", "5", "5", "5"],
        ["town", "train", "2", "2", "3", "3", "3", "3"],
        ["town", "test", "1", "1", "2", "2", "2", "2"],
        ["town", "all", "3", "3", "5", "5", "5", "5"],
    ]
    assert "Persons in more than one split: 0." in text


def test_what_fell_out_leads_from_what_was_found_to_what_is_left(filled):
    text, _ = cards(*filled)
    assert rows(text, "From what was found to what is left") == [
        ["pictures found", "12", "13", "25"],
        ["sources: no identity", "0", "1", "1"],
        ["quality: broken", "2", "0", "2"],
        ["captions: in no pair with a caption", "0", "2", "2"],
        ["pictures left", "10", "10", "20"],
        ["pairs made", "5", "6", "11"],
        ["no caption: too short", "0", "1", "1"],
        ["pairs left", "5", "5", "10"],
    ]
    assert "(answer 2)" in text


def test_labels_and_captions_are_counted(filled):
    folder, table, recipe = filled
    text, _ = cards(folder, table, recipe)
    kept = [c for p in table.pairs("", "train") for c in (p.aerial, p.ground)]
    males = [c for c in kept if table.labels(c.number)["gender"].value == "male"]
    people = {c.picture.identity for c in kept}
    male_people = {c.picture.identity for c in males}
    shares = {(row[0], row[1]): row[2:] for row in rows(text, "Classes")}
    of_people, of_pictures = len(male_people) / len(people), len(males) / len(kept)
    assert shares["gender", "male"][:2] == [f"{100 * of_people:.1f}", f"{100 * of_pictures:.1f}"]
    assert rows(text, "Where the labels come from")[0] == ["gender", "clip", "20", "100.0", "0.75"]
    assert rows(text, "Written by")[0][-2:] == ["10", "100.0"]
    lengths = [len(table.caption(p.number).text.split()) for p in table.pairs()]
    words = rows(text, "Length")[0]
    assert words[1] == f"{sum(lengths) / 10:.1f}" and words[3:] == [
        str(min(lengths)),
        str(max(lengths)),
    ]
    assert words[2] == str(sorted(lengths)[4])
    assert rows(text, "Answers read until a caption was good, or none was") == [
        ["1", "10"],
        ["2", "1"],
    ]
    scores = sorted(table.caption(p.number).score for p in table.pairs("campus"))
    quantiles = [scores[4 * share // 100] for share in (0, 5, 25, 50, 75, 95, 100)]
    assert rows(text, "Cosine of caption and picture by CLIP")[0] == [
        "campus",
        *(f"{q:.4g}" for q in quantiles),
    ]


def test_both_files_escape_untrusted_names_and_captions(tmp_path):
    folder, table, recipe = fill(tmp_path, captions={1: HOSTILE, 2: "=cmd [x](javascript:y) <i>"})
    text, page = cards(folder, table, recipe, [f"the person {HOSTILE}"])
    parsed = Page(page)
    assert not parsed.tags["script"] and not parsed.tags["i"]
    assert "<script>x<b onload=y>" in parsed.text  # shown as it is
    for card in (text, page):
        assert "\x1b" not in card and "\u202e" not in card
        assert r"\x1b" in card
    assert not re.search(r"(?<!\\)<", text) and "[x](" not in text
    assert all(url.startswith(("#", "data:image/jpeg;base64,")) for url in parsed.urls)
    assert "default-src 'none'" in page


def test_settings_cannot_leave_their_code_block(filled):
    folder, table, recipe = filled
    text, page = cards(folder, table, recipe.model_copy(update={"attributes_file": "a\n````\n# x"}))
    block = text.split("## Settings")[1]
    fence = re.search("^(`+)yaml$", block, re.MULTILINE)[1]
    assert len(fence) == 5 and block.rstrip().endswith(fence) and block.count(fence) == 2
    assert "attributes_file" in Page(page).text


def test_the_same_data_set_gives_the_same_bytes_wherever_it_lies(filled, tmp_path):
    again = fill(tmp_path / "another place")
    assert cards(*filled) == cards(*again)


def test_no_absolute_path_is_in_the_card(filled):
    folder, table, recipe = filled
    for card in cards(folder, table, recipe):
        assert str(folder.parent) not in card
        assert (
            "the image cannot be read" in card
        )  # the message about the broken files, less its path


def test_missing_raw_files_leave_out_pictures(tmp_path):
    folder, table, recipe = fill(tmp_path)
    text, page = cards(folder, table, recipe)
    # 20 pictures of pairs; the examples are one picture of nobody and a pair without a caption.
    assert len(THUMBNAIL.findall(page)) == 23
    shutil.rmtree(tmp_path / "raw")
    without, page = cards(folder, table, recipe)
    assert without == text and len(THUMBNAIL.findall(page)) == 20
    assert Page(page).text.count("no picture") == 5


def test_a_data_set_in_which_nothing_is_left_has_a_card(tmp_path):
    table = Table(tmp_path / "table.sqlite")
    text, page = cards(tmp_path, table, Recipe.model_validate(RECIPE))
    assert "0 pairs" in text and Page(page).tags["section"] == 7


def test_histograms_count_every_picture_and_caption_once(filled):
    text, page = cards(*filled)
    for title, series in (
        ("Sharpness", "aerial"),
        ("Height, pixels", "ground"),
        ("Words of a caption", "captions"),
    ):
        block = text.split(f"### {title}\n\n```\n")[1].split("\n```")[0]
        assert sum(map(int, re.findall(rf"{series} +█* (\d+)$", block, re.MULTILINE))) == 10
    drawn = re.findall(r"<title>[\d a-z]+, (aerial|ground|captions): (\d+)</title>", page)
    sums = Counter()
    for series, number in drawn:
        sums[series] += int(number)
    assert sums == {"aerial": 20, "ground": 20, "captions": 10}  # two histograms by view


def test_a_card_shows_the_same_pairs_for_the_same_seed_and_others_for_another(tmp_path):
    folder, table, recipe = fill(tmp_path, identities=20)
    pages = [
        cards(folder, table, recipe.model_copy(update={"seed": seed}))[1] for seed in (3, 3, 4)
    ]
    shown = [re.findall(r"ground<br>ground/(\d+)\.jpg", page) for page in pages]
    assert shown[0] == shown[1] != shown[2] and len(set(shown[0])) == 24
