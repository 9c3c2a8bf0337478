"""What a visitor of the search page asks, and the limits of it."""

from __future__ import annotations

from dataclasses import dataclass

from gallery.sent import Sent
from utils.errors import UserError

MAX_SENTENCE = 300  # characters
MAX_PAGE, MAX_HITS = 96, 960  # hits on a page, and on all pages of a question


@dataclass(frozen=True)
class Question:
    """What a visitor asks.

    Attributes:
        choices: columns, and the value that each must have.
        where: a filter of `gallery.where`.
        sent: a picture; the hits are like it.
        like: the id of an item; the hits are like it, and others than it.
        other_view: with `like`, hits of other views alone.
        count: hits on a page.
        collapse: near-duplicates are one hit.
        before: the questions that led to a `like`, each with its page; the last is the newest.
    """

    sentence: str = ""
    minus: str = ""
    choices: tuple[tuple[str, str], ...] = ()
    where: str = ""
    sent: Sent | None = None
    like: int | None = None
    other_view: bool = False
    count: int = 24
    collapse: bool = True
    before: tuple[tuple[Question, int], ...] = ()


def title(question: Question, person: str = "") -> str:
    """What was asked, in words.

    Args:
        person: what to call the person of `like`, instead of by the id.
    """
    if question.like is not None:
        other = ", in other views" if question.other_view else ""
        return f"more like {person or question.like}{other}"
    wanted = [question.sentence] * bool(question.sentence) + ["like your picture"] * bool(
        question.sent
    )
    return ", ".join(wanted) + (f", without {question.minus}" if question.minus else "")


def check(question: Question, page: int) -> None:
    """Raise UserError for what a page may not ask."""
    if question.like is None and question.sent is None and not question.sentence:
        raise UserError("Say who is looked for, or add a picture.")
    for text in (question.sentence, question.minus):
        if len(text) > MAX_SENTENCE:
            raise UserError(
                f"The sentence has {len(text)} characters, and at most {MAX_SENTENCE} are read. "
                "Shorten it."
            )
    if not 1 <= question.count <= MAX_PAGE:
        raise UserError(f"A page has 1 to {MAX_PAGE} hits.")
    if not 0 <= page * question.count < MAX_HITS:
        raise UserError(f"At most {MAX_HITS} hits are shown. Use a filter.")
