"""The data card: what is in a data set, what fell out and why, and what a reader should look at.

`card.md` and `card.html` say the same; the HTML also shows pictures. Everything comes from the
table of pictures by SQL, so that a million of them need no memory. The same data set gives the same
bytes.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from construction.card_page import (
    Bars,
    Block,
    Code,
    Example,
    Examples,
    Grid,
    Page,
    Section,
    Sheet,
    Shown,
    Words,
    in_html,
    in_text,
    thumbnail,
)
from construction.recipe import Recipe
from construction.records import SPLITS, VIEWS, Label
from construction.table import Table
from datasets.text import TokenizedCaptions
from utils.files import write_atomically
from utils.tokenizer import MAX_TEXT

SUMS = ("pictures found", "pictures left", "pairs made", "pairs left")
STAGES = ("sources", "quality", "balance")
EXAMPLES = 3  # of each reason
PROBLEMS = 12  # reasons of missing captions that are listed
FIRST_WORDS = 10  # of captions, that are listed
SHEET = 24  # pairs
BINS = 14  # of captions' words
CLIP_TOKENS = 77  # that CLIP reads of a caption
SHARES = (0, 5, 25, 50, 75, 95, 100)  # percent; quantiles
QUANTILES = ("least", *(f"{share} %" for share in SHARES[1:-1]), "most")
SHARPNESS = (0, 25, 50, 100, 200, 400, 800, 1600, 3200, 6400, 12800)
HEIGHTS = (0, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # pixels
ALL = "all sources"  # has a space, so no source has this name
# The pictures of the pairs that are in, each once.
KEPT = (
    "(SELECT aerial AS number, split AS part FROM pairs WHERE removed = '' "
    "UNION SELECT ground, split FROM pairs WHERE removed = '')"
)
PAIRS = "pairs JOIN pictures ON pictures.number = aerial"


def write_card(folder: Path, table: Table, recipe: Recipe, notes: Sequence[str]) -> None:
    """Write `card.md` and `card.html`, after `Table.finish`. Raises UserError.

    Args:
        folder: the data set's, with its pictures. A picture that is missing is not shown.
        notes: warnings about the data.
    """
    sources = [source.name for source in recipe.sources]
    counts = _counts(table, sources)
    names = ("persons", "identities", "pairs", "aerial pictures", "ground pictures", "captions")
    # No person and no picture is in two sources.
    of_sources = [counts[source, ""] for source in sources if (source, "") in counts]
    sums = map(sum, zip((0,) * len(names), *of_sources, strict=True))
    page = Page(
        "Data card",
        list(zip(sums, names, strict=True)),
        notes,
        (
            Section("What it is", _what(table, recipe, counts)),
            Section("What fell out", _fell_out(table, recipe, sources)),
            Section("Labels", _labels(table, recipe)),
            Section("Captions", _captions(table)),
            Section("Quality", _quality(table)),
            Section("Pairs", _sheet(folder, table, recipe)),
            Section("Settings", _settings(recipe)),
        ),
    )
    _write(folder / "card.md", in_text(page))
    _write(folder / "card.html", in_html(page))


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def _counts(table: Table, sources: Sequence[str]) -> dict[tuple[str, str], tuple[int, ...]]:
    """(persons, identities, pairs, aerial, ground, captions) by source and split; the split "" is
    the whole source."""
    counts: dict[tuple[str, str], tuple[int, ...]] = {}
    for split in ("pairs.split", "''"):
        rows = table.query(
            f"SELECT source, {split}, count(DISTINCT person), count(DISTINCT identity), count(*), "
            f"count(DISTINCT aerial), count(DISTINCT ground), count(captions.number) FROM {PAIRS} "
            "LEFT JOIN captions ON captions.number = pairs.number AND text != '' "
            f"WHERE removed = '' GROUP BY source, {split}"
        )
        counts |= {(source, part): tuple(values) for source, part, *values in rows}
    return counts


def _what(
    table: Table, recipe: Recipe, counts: dict[tuple[str, str], tuple[int, ...]]
) -> list[Block]:
    listed = ", ".join(f"{source.name} (read as {source.reader})" for source in recipe.sources)
    rows = [
        (source.name, split or "all", *counts[source.name, split])
        for source in recipe.sources
        for split in (*SPLITS, "")
        if (source.name, split) in counts
    ]
    head = (
        "source", "split", "persons", "identities", "pairs", "aerial", "ground", "captions",
    )  # fmt: skip
    return [
        Words(
            "A data set for text-based aerial-ground person retrieval. Each pair is an aerial and "
            "a ground picture of one identity, with a caption."
        ),
        Words(
            f"Sources: {listed}. Layout: {recipe.output.layout}. Pictures lie in a folder for each "
            "source; manifest.sha256 has the hash of every file."
        ),
        Grid("Counts", head, rows, 2, [i for i, row in enumerate(rows) if row[1] == "all"]),
        Words(_how_split(table, recipe)),
    ]


def _how_split(table: Table, recipe: Recipe) -> str:
    splits = recipe.splits
    if splits.by == "person":
        how = (
            f"Persons were drawn for the splits at random with the seed {recipe.seed}, in each "
            f"source: {100 * splits.val:g} % are val, {100 * splits.test:g} % test, the "
            "others train."
        )
    else:
        how = (
            "The splits are the sources' own. In a source without val, "
            f"{100 * splits.val:g} % of the persons of train were drawn for val with the seed "
            f"{recipe.seed}."
        )
    ((both,),) = table.query(
        f"SELECT count(*) FROM (SELECT 1 FROM {PAIRS} WHERE removed = '' "
        "GROUP BY source, person HAVING count(DISTINCT pairs.split) > 1)"
    )
    return f"{how} Persons in more than one split: {both}."


def _fell_out(table: Table, recipe: Recipe, sources: Sequence[str]) -> list[Block]:
    def by_source(of: str, *values: object) -> list[int]:
        rows = dict(table.query(f"SELECT source, count(*) FROM {of} GROUP BY source", values))
        return [rows.get(source, 0) for source in sources]

    examples: list[Example] = []
    found = by_source("pictures")
    kept = by_source(f"{KEPT} JOIN pictures USING (number)")
    rows, rest = [(SUMS[0], found)], np.subtract(found, kept)
    for stage, reason, total in _reasons(table):
        of = "removed JOIN pictures USING (number) WHERE stage = ? AND reason = ?"
        rows.append((f"{stage}: {reason}", by_source(of, stage, reason)))
        rest -= rows[-1][1]
        examples += _removed_pictures(table, recipe, stage, reason, total)
    rows += [("captions: in no pair with a caption", rest.tolist()), (SUMS[1], kept)]
    made, left = by_source(PAIRS), by_source(f"{PAIRS} WHERE removed = ''")
    rows, rest = [*rows, (SUMS[2], made)], np.subtract(made, left)
    problems = table.query(
        "SELECT removed, count(*) FROM pairs WHERE removed != '' GROUP BY removed "
        "ORDER BY count(*) DESC, removed LIMIT ?",
        (PROBLEMS,),
    )
    for problem, total in list(problems):
        rows.append((f"no caption: {problem}", by_source(f"{PAIRS} WHERE removed = ?", problem)))
        rest -= rows[-1][1]
        examples += _removed_pairs(table, recipe, problem, total)
    if rest.any():
        rows.append(("no caption: other problems", rest.tolist()))
    rows.append((SUMS[3], left))
    return [
        Words(
            "Pictures and pairs that each stage took out, and why. construction/removed.csv lists "
            "the pictures, construction/captions.csv the pairs."
        ),
        Grid(
            "From what was found to what is left",
            ("stage", *sources, ALL),
            [(name, *counts, sum(counts)) for name, counts in rows],
            sums=[i for i, (name, _) in enumerate(rows) if name in SUMS],
        ),
        *([Examples("Examples", examples)] if examples else []),
    ]


def _reasons(table: Table) -> list[tuple[str, str, int]]:
    """(stage, reason, pictures): the stages in their order, the most frequent reason first."""
    rows = list(table.query("SELECT stage, reason, count(*) FROM removed GROUP BY stage, reason"))
    return sorted(rows, key=lambda row: (_place(row[0], STAGES), -row[2], row[1]))


def _removed_pictures(
    table: Table, recipe: Recipe, stage: str, reason: str, total: int
) -> Iterator[Example]:
    """Some of the pictures that a stage has taken out for a reason."""
    for place in _drawn(recipe, f"{stage}: {reason}", total, EXAMPLES):
        rows = table.query(
            "SELECT source, name, file, box, detail FROM removed JOIN pictures USING (number) "
            "WHERE stage = ? AND reason = ? ORDER BY number LIMIT 1 OFFSET ?",
            (stage, reason, place),
        )
        for source, name, file, box, detail in rows:
            # A message about a file names its path, which means nothing elsewhere.
            shown = f"{source}/{name}", detail.replace(file, name)
            yield Example(f"{stage}: {reason}", *shown, (thumbnail(file, json.loads(box)),))


def _removed_pairs(table: Table, recipe: Recipe, problem: str, total: int) -> Iterator[Example]:
    """Some of the pairs that got no caption because of a problem."""
    for place in _drawn(recipe, f"no caption: {problem}", total, EXAMPLES):
        rows = table.query(
            "SELECT aerial, ground, problem, tries FROM pairs JOIN captions USING (number) "
            "WHERE removed = ? ORDER BY number LIMIT 1 OFFSET ?",
            (problem, place),
        )
        for aerial, ground, last, tries in rows:
            pictures = [table.candidate(number).picture for number in (aerial, ground)]
            yield Example(
                f"no caption: {problem}",
                " and ".join(f"{p.source}/{p.name}" for p in pictures),
                f"{last} (answer {tries})",
                tuple(thumbnail(p.file, p.box) for p in pictures),
            )


def _labels(table: Table, recipe: Recipe) -> list[Block]:
    person = "source || '/' || identity"
    of_split = {
        split: numbers
        for split, *numbers in table.query(
            f"SELECT part, count(DISTINCT {person}), count(*) FROM {KEPT} "
            "JOIN pictures USING (number) GROUP BY part"
        )
    }
    counts: dict[tuple[str, str], dict[str, list[int]]] = {}
    for attribute, value, split, *numbers in table.query(
        f"SELECT attribute, value, part, count(DISTINCT {person}), count(*) FROM {KEPT} "
        "JOIN pictures USING (number) JOIN labels USING (number) GROUP BY attribute, value, part"
    ):
        counts.setdefault((attribute, value), {})[split] = numbers
    if not counts:
        return [Words("The data set has no labels.")]
    attributes = list(recipe.attributes)
    splits = [split for split in SPLITS if split in of_split]
    rows = [
        (
            *key,
            *(
                _percent(part, whole)
                for split in splits
                for part, whole in zip(of.get(split, (0, 0)), of_split[split], strict=True)
            ),
        )
        for key, of in sorted(
            counts.items(),
            key=lambda item: (
                _place(item[0][0], attributes), -sum(n for _, n in item[1].values()), item[0],
            ),
        )
    ]  # fmt: skip
    origins = table.query(
        f"SELECT attribute, origin, count(*), avg(confidence) FROM {KEPT} "
        "JOIN labels USING (number) GROUP BY attribute, origin ORDER BY count(*) DESC, origin"
    )
    total = sum(pictures for _, pictures in of_split.values())
    from_rows = [
        (attribute, origin, pictures, _percent(pictures, total), f"{confidence:.2f}")
        for attribute, origin, pictures, confidence in sorted(
            origins, key=lambda row: _place(row[0], attributes)
        )
    ]
    head = (f"{split}, % of {what}" for split in splits for what in ("identities", "pictures"))
    return [
        Words(
            "Shares of the identities and pictures of a split. An identity counts for each class "
            "that one of its pictures has. construction/labels.csv has every label."
        ),
        Grid("Classes", ("attribute", "class", *head), rows, left=2),
        Grid(
            "Where the labels come from",
            ("attribute", "origin", "pictures", "% of pictures", "mean confidence"),
            from_rows,
            left=2,
        ),
    ]


def _captions(table: Table) -> list[Block]:
    of = (
        f"{PAIRS} JOIN captions ON captions.number = pairs.number WHERE removed = '' AND text != ''"
    )
    words: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    first: Counter[str] = Counter()
    for (text,) in table.query(f"SELECT text FROM {of} ORDER BY pairs.number"):
        parts = text.split()
        words[len(parts)] += 1
        first[" ".join(parts[:2]).lower()] += 1
        tokens[len(TokenizedCaptions((text,), MAX_TEXT).flat)] += 1
    total = words.total()
    if not total:
        return [Words("The data set has no captions.")]
    ((distinct,),) = table.query(f"SELECT count(DISTINCT text) FROM {of}")
    long = sum(number for length, number in tokens.items() if length > CLIP_TOKENS)
    origins = table.query(
        f"SELECT origin, count(*) FROM {of} GROUP BY origin ORDER BY count(*) DESC, origin"
    )
    tries = table.query("SELECT tries, count(*) FROM captions GROUP BY tries ORDER BY tries")
    scores = _quantiles(table, "source", "score", f"{of} AND score IS NOT NULL")
    common = sorted(first.items(), key=lambda item: (-item[1], item[0]))[:FIRST_WORDS]
    lengths = [
        (name, f"{_mean(of):.1f}", _median(of), min(of), max(of))
        for name, of in (("words", words), ("tokens of CLIP", tokens))
    ]
    shares = ((name, number, _percent(number, total)) for name, number in origins)
    return [
        Words(
            f"{distinct} of {total} captions are distinct ({_percent(distinct, total)} %). CLIP "
            f"reads the first {CLIP_TOKENS} tokens; captions with more of them: {long} "
            f"({_percent(long, total)} %). construction/captions.csv has every caption."
        ),
        Grid("Written by", ("origin", "captions", "% of captions"), list(shares)),
        Grid("Length", ("unit", "mean", "median", "least", "most"), lengths),
        _word_bars(words),
        Grid(
            "Answers read until a caption was good, or none was", ("answers", "pairs"), list(tries)
        ),
        *(
            [Grid("Cosine of caption and picture by CLIP", ("source", *QUANTILES), scores)]
            if scores
            else []
        ),
        Grid(
            "Most frequent first words",
            ("first two words", "captions", "% of captions"),
            [(name, number, _percent(number, total)) for name, number in common],
        ),
    ]


def _word_bars(words: Counter[int]) -> Bars:
    """A histogram of the captions' words, in bins of 1, 2, 5, 10, 20, ... words."""
    low, high = min(words), max(words)
    sizes = (step * 10**power for power in count() for step in (1, 2, 5))
    size = next(size for size in sizes if high // size - low // size < BINS)
    binned: Counter[int] = Counter()
    for length, number in words.items():
        binned[length // size] += number
    rows = [
        (f"{n * size} to {n * size + size - 1}" if size > 1 else f"{n}", (binned[n],))
        for n in range(low // size, high // size + 1)
    ]
    return Bars("Words of a caption", ("captions",), rows)


def _quality(table: Table) -> list[Block]:
    of = f"{KEPT} JOIN measures USING (number) JOIN pictures USING (number)"
    rows = [
        (view, name, *values)
        for column, name in (
            ("width", "width, pixels"), ("height", "height, pixels"), ("sharpness", "sharpness"),
            ("brightness", "brightness, 0 to 255"),
        )
        for view, *values in _quantiles(table, "view", column, of)
    ]  # fmt: skip
    return [
        Words(
            "Measures of the pictures that are left. Sharpness is the variance of the Laplacian of "
            "the grey picture at 128x384 pixels. A bin holds its lower bound, not its upper one."
        ),
        _histogram(table, "Sharpness", "sharpness", SHARPNESS),
        _histogram(table, "Height, pixels", "height", HEIGHTS),
        Grid("Quantiles", ("view", "measure", *QUANTILES), rows, left=2),
    ]


def _histogram(table: Table, title: str, column: str, edges: Sequence[int]) -> Bars:
    """Pictures by view in bins of a measure; the last bin has no upper bound."""
    bounds = list(zip(edges, (*edges[1:], None), strict=True))
    sums = ", ".join(
        f"sum({column} >= {low}" + (")" if high is None else f" AND {column} < {high})")
        for low, high in bounds
    )
    by_view = {
        view: numbers
        for view, *numbers in table.query(
            f"SELECT view, {sums} FROM {KEPT} JOIN measures USING (number) "
            "JOIN pictures USING (number) GROUP BY view"
        )
    }
    none = [0] * len(edges)
    rows = [
        (f"{low} or more" if high is None else f"{low} to {high}", numbers)
        for (low, high), numbers in zip(
            bounds, zip(*(by_view.get(view, none) for view in VIEWS), strict=True), strict=True
        )
    ]
    filled = [i for i, (_, numbers) in enumerate(rows) if any(numbers)]
    return Bars(title, VIEWS, rows[filled[0] : filled[-1] + 1] if filled else [])


def _sheet(folder: Path, table: Table, recipe: Recipe) -> list[Block]:
    ((total,),) = table.query("SELECT count(*) FROM pairs WHERE removed = ''")
    shown = []
    for place in _drawn(recipe, "pairs", total, SHEET):
        ((number, split, *both),) = table.query(
            "SELECT number, split, aerial, ground FROM pairs WHERE removed = '' "
            "ORDER BY number LIMIT 1 OFFSET ?",
            (place,),
        )
        pictures = [table.candidate(n).picture for n in both]
        caption = table.caption(number)
        source = pictures[0].source
        shown.append(
            Shown(
                f"{source}, {split}, identity {pictures[0].identity}",
                tuple((p.view, p.name, thumbnail(folder / source / p.name)) for p in pictures),
                caption.text if caption else "",
                _label_texts(*(table.labels(n) for n in both)),
            )
        )
    how = f"{len(shown)} of {total} pairs, drawn at random with the seed {recipe.seed}."
    return [Words(how), Sheet(shown)] if shown else [Words("The data set has no pairs.")]


def _label_texts(aerial: dict[str, Label], ground: dict[str, Label]) -> list[str]:
    """Such as "gender: male", or "angle: side (aerial), back (ground)" if the views differ."""
    texts = []
    for name in {**aerial, **ground}:
        of_view = zip(VIEWS, (aerial.get(name), ground.get(name)), strict=True)
        values = {view: label.value for view, label in of_view if label}
        if len(set(values.values())) == 1:
            texts.append(f"{name}: {next(iter(values.values()))}")
        else:
            both = ", ".join(f"{value} ({view})" for view, value in values.items())
            texts.append(f"{name}: {both}")
    return texts


def _settings(recipe: Recipe) -> list[Block]:
    content = recipe.model_dump(mode="json")
    return [
        Words("The recipe with every default. construction/recipe.yaml is the same as a file."),
        Code("yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True)),
    ]


def _quantiles(table: Table, group: str, value: str, of: str) -> list[tuple[Any, ...]]:
    """(group, its quantiles at `SHARES`), in the order of the groups. A quantile is a value of the
    column: the lower one of two neighbours."""
    shares = ", ".join(f"max(CASE WHEN place = last * {s} / 100 THEN v END)" for s in SHARES)
    rows = table.query(
        f"SELECT g, {shares} FROM (SELECT {group} AS g, {value} AS v, "
        f"row_number() OVER (PARTITION BY {group} ORDER BY {value}) - 1 AS place, "
        f"count(*) OVER (PARTITION BY {group}) - 1 AS last FROM {of}) GROUP BY g ORDER BY g"
    )
    return [(name, *(f"{number:.4g}" for number in numbers)) for name, *numbers in rows]


def _drawn(recipe: Recipe, what: str, total: int, most: int) -> list[int]:
    """Places of at most `most` of `total` things, drawn at random, in order."""
    # RandomState, because NumPy promises that its numbers stay the same in later versions.
    rng = np.random.RandomState([recipe.seed, *what.encode("utf-8", "surrogatepass")])
    return sorted(rng.permutation(total)[:most].tolist())


def _place(name: str, names: Sequence[str]) -> int:
    """The position of a name; the end for one that is not among them."""
    return names.index(name) if name in names else len(names)


def _mean(counts: Counter[int]) -> float:
    return sum(value * number for value, number in counts.items()) / counts.total()


def _median(counts: Counter[int]) -> int:
    """The lower one of two in the middle."""
    values = sorted(counts)
    below = list(accumulate(counts[value] for value in values))
    return values[bisect_left(below, (counts.total() + 1) // 2)]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else ""
