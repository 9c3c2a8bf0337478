"""Captions of pairs, in rounds: every pair without a good caption gets its next try.

    for number, caption in write_captions(pairs, recipe, attributes, store, prompt, encoder):
        ...

A caption is checked (checks.py), and compared with its picture by CLIP if the recipe says so. After
`captions.tries` the pair is given up, with the reason of its last try.

Between rounds it remembers one byte for each pair. Answers and scores are in the store.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from construction import grammar
from construction.checks import problem_of, repair
from construction.clip import BATCH, Encoder, scores
from construction.endpoints import Question, ask
from construction.recipe import Recipe
from construction.records import VIEWS, Caption, Pair, View
from construction.store import Store, key_of
from utils.attributes import Attribute
from utils.errors import UserError
from utils.files import PROJECT, read_file

PROMPTS = PROJECT / "configs/construction/prompts"
THRESHOLD = "threshold"  # kind in the store
NO_LABELS = "no labels to write from"


class Draft(NamedTuple):
    """A caption before CLIP's filter; `problem` is empty if it is good so far."""

    pair: Pair
    text: str
    origin: str
    problem: str


def read_prompt(name: str, folder: Path, file: str = "") -> str:
    """A prompt: `file`, or NAME.txt in `prompts` beside the recipe, or else the project's own.

    Args:
        name: "vision", "text" or "attributes".
        folder: of the recipe.

    Raises UserError if it cannot be read, or lacks the place for attributes or classes.
    """
    beside = folder / "prompts" / f"{name}.txt"
    path = Path(file) if file else beside if beside.exists() else PROMPTS / f"{name}.txt"
    try:
        text = read_file(path).decode().strip()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} (captions.prompt in the recipe)") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save it as UTF-8") from None
    place = {"text": "{attributes}", "attributes": "{classes}"}.get(name, "")
    if not text or place not in text:
        raise UserError(f"{path}: {f'{place} is missing in the prompt' if text else 'it is empty'}")
    return text


def notes(recipe: Recipe) -> list[str]:
    """What a data card must say about how captions were made."""
    return [grammar.NOTE] if recipe.captions.by == "grammar" else []


def write_captions(
    pairs: Callable[[], Iterable[Pair]],
    recipe: Recipe,
    attributes: Sequence[Attribute],
    store: Store,
    prompt: str = "",
    encoder: Encoder | None = None,
    total: int | None = None,
) -> Generator[tuple[int, Caption], None, None]:
    """Captions by the number of their pair, each pair once, in the order in which they are done.

    Args:
        pairs: gives all pairs, in the same order each time.
        prompt: from `read_prompt`, unless a grammar writes.
        encoder: for CLIP's filter.
        total: number of pairs, for the progress bar.

    Close it (`contextlib.closing`) to end the requests if an exception ends the caller's loop.
    Raises UserError as `ask` does.
    """
    writer = _Writer(recipe, attributes, store, prompt, encoder)
    least = writer.threshold(pairs, total)
    done = bytearray()

    def open_pairs() -> Iterator[Pair]:
        for pair in pairs():
            done.extend(bytes(max(0, pair.number + 1 - len(done))))
            if not done[pair.number]:
                yield pair

    for number in range(recipe.captions.tries):
        last = number == recipe.captions.tries - 1
        left = None if total is None else total - sum(done)
        if left == 0:
            return
        with closing(writer.drafts(open_pairs(), number, left)) as drafts:
            for draft, score in writer.scored(drafts):
                problem = draft.problem
                if not problem and least is not None and score is not None and score < least:
                    problem = f"CLIP: the cosine {score:.3f} is below {least:.3f}"
                if not problem or last:
                    done[draft.pair.number] = True
                    text = "" if problem else draft.text
                    yield draft.pair.number, Caption(text, draft.origin, score, problem, number + 1)


class _Writer:
    """Writes drafts of captions, and scores them."""

    def __init__(
        self,
        recipe: Recipe,
        attributes: Sequence[Attribute],
        store: Store,
        prompt: str,
        encoder: Encoder | None,
    ) -> None:
        self.recipe, self.attributes, self.store = recipe, attributes, store
        self.prompt, self.encoder = prompt, encoder
        view = recipe.captions.view
        self.views: tuple[View, ...] = VIEWS if view == "both" else (view,)
        assert encoder is not None or not recipe.clip.filters, "the filter needs an encoder"

    def drafts(
        self, pairs: Iterable[Pair], number: int, total: int | None
    ) -> Generator[Draft, None, None]:
        """The drafts of the try with this number, in the order in which they are written."""
        what = f"captions, try {number + 1}"
        if self.recipe.captions.by == "grammar":
            for pair in tqdm(pairs, what, total, unit="caption", disable=None):
                yield self._by_grammar(pair, number)
            return
        models, without_labels = self.recipe.models, deque[Pair]()

        def questions() -> Iterator[Question]:
            for pair in pairs:
                if question := self._question(pair, number):
                    yield question
                else:
                    without_labels.append(pair)

        with closing(ask(questions(), models, self.store, total, what)) as asking:
            for question, answer in asking:
                text = repair(answer.said)
                problem = answer.problem or problem_of(
                    text, answer.finish_reason, question.prompt, self.recipe.captions.words
                )
                yield Draft(question.about, text, answer.model, problem)
                while without_labels:
                    yield Draft(without_labels.popleft(), "", "", NO_LABELS)
        for pair in without_labels:
            yield Draft(pair, "", "", NO_LABELS)

    def scored(self, drafts: Iterable[Draft]) -> Iterator[tuple[Draft, float | None]]:
        """Drafts with the cosine of caption and picture, the mean over the views that were seen.
        It is None without a filter, and for a draft that is refused already."""
        if not self.recipe.clip.filters or self.encoder is None:
            for draft in drafts:
                yield draft, None
            return
        rest = iter(drafts)
        while batch := list(islice(rest, BATCH)):
            good = [draft for draft in batch if not draft.problem]
            items = [(self._pictures(draft.pair), draft.text) for draft in good]
            flat = [(picture, text) for pictures, text in items for picture in pictures]
            values = iter(scores(flat, self.encoder, self.store))
            for draft in batch:
                if draft.problem:
                    yield draft, None
                else:
                    cosines = list(islice(values, len(self.views)))
                    yield draft, round(sum(cosines) / len(cosines), 5)

    def threshold(self, pairs: Callable[[], Iterable[Pair]], total: int | None) -> float | None:
        """The least cosine; None without a filter.

        A quantile is one of the first tries of all pairs. It is kept, so that a run that goes on
        has the same.
        """
        clip, recipe = self.recipe.clip, self.recipe
        if clip.quantile is None or self.encoder is None:
            return clip.at_least
        digest = hashlib.sha256()
        for pair in pairs():
            shown = [sha256 for sha256, _ in self._pictures(pair)]
            digest.update(json.dumps([shown, self._labels(pair)]).encode())
        models = [endpoint.model for endpoint in recipe.models.endpoints]
        asked = recipe.models.model_dump(include={"temperature", "max_tokens", "picture_side"})
        key = key_of(
            digest.hexdigest(), self.encoder.name, clip.quantile, self.prompt, models, asked,
            recipe.captions.model_dump(exclude={"tries"}), recipe.seed,
        )  # fmt: skip
        kept: float | None = self.store.get(THRESHOLD, key)
        if kept is None:
            with closing(self.drafts(pairs(), 0, total)) as drafts:
                found = array("d", (s for _, s in self.scored(drafts) if s is not None))
            if not found:
                return None  # every caption is refused anyway
            kept = round(float(np.quantile(found, clip.quantile)), 5)
            self.store.put(THRESHOLD, [(key, kept)])
        return kept

    def _question(self, pair: Pair, number: int) -> Question | None:
        if self.recipe.captions.by == "vision":
            return Question(self.prompt, self._pictures(pair), number=number, about=pair)
        lines = [f"{name}: {value}" for name, value in self._labels(pair).items()]
        prompt = self.prompt.replace("{attributes}", "\n".join(lines))
        return Question(prompt, number=number, about=pair) if lines else None

    def _by_grammar(self, pair: Pair, number: int) -> Draft:
        shown = [sha256 for sha256, _ in self._pictures(pair, VIEWS)]
        seed, words = key_of(self.recipe.seed, shown, number), self.recipe.captions.words
        text = grammar.write(self._labels(pair), self.attributes, seed, words)
        problem = problem_of(text, words=words) if text else NO_LABELS
        return Draft(pair, text, "grammar", problem)

    def _labels(self, pair: Pair) -> dict[str, str]:
        """The classes by attribute, without defaults. Where the views differ, an attribute has its
        view in its name."""
        labels: dict[str, str] = {}
        for name in dict.fromkeys(name for view in self.views for name in pair.labels[view]):
            seen = {
                view: label.value
                for view in self.views
                if (label := pair.labels[view].get(name)) and label.origin != "default"
            }
            if len(set(seen.values())) == 1:
                labels[name] = next(iter(seen.values()))
            else:
                labels |= {f"{name}, {view}": value for view, value in seen.items()}
        return labels

    def _pictures(self, pair: Pair, views: Sequence[View] = ()) -> tuple[tuple[str, str], ...]:
        """(sha256, file) of the pictures that a caption describes."""
        measures = [pair.candidate(view).measure for view in views or self.views]
        return tuple((measure.sha256, measure.file) for measure in measures)
