"""Text that is not ours: whether a sentence says anything, and how a terminal or log shows it."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import regex

# Of these characters any that is no space is a token. Others may be repaired away (control
# characters, "&nbsp;"), or stand for a token that is no word ("<end_of_text>").
PLAIN = re.compile(r"[ -%'-;=-~]*")
START = 49406  # the first of CLIP's two special tokens
LONE = re.compile("[\ud800-\udfff]")
READ = 4096  # characters; 77 tokens of ordinary captions have about 400, the longest under 1,000
WORD = 256  # characters; a German compound has 80, and of scripts without spaces 77 tokens fewer
# What CLIP's tokenizer takes for one word, if it is longer.
LONG_WORD = regex.compile(rf"\p{{L}}{{{WORD + 1},}}|[^\s\p{{L}}\p{{N}}]{{{WORD + 1},}}")
UNBROKEN = re.compile(rf"[^ \t\r\n]{{{WORD + 1}}}")  # what may hold one
# What moves a terminal's cursor, turns its direction, breaks a line, or cannot be written as UTF-8.
HIDDEN = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Lines(str):
    """A message of several lines, which the log keeps: a table, a list. Its line breaks are made
    here, and what stands in it and comes from elsewhere has gone through `visible`."""


def visible(text: object, lines: bool = False) -> str:
    """`text` on one line, for a terminal or a log: control characters, line breaks, marks that turn
    the direction of writing and halves of characters as `\\x1b`, `\\n`, `\\u202e`.

    Args:
        lines: keep line breaks.
    """

    def shown(found: re.Match[str]) -> str:
        letter = found.group()
        return letter if lines and letter == "\n" else letter.encode("unicode_escape").decode()

    return HIDDEN.sub(shown, str(text))


def fault(text: object) -> str:
    """What is wrong with a sentence, to stand behind "the caption", or nothing."""
    if text == "":
        return "is empty"
    if not isinstance(text, str):
        return f"is {text!r:.60}, no text"
    if has_lone_surrogate(text):
        return f"{text!r:.60} holds half a character (a lone surrogate); write it anew as UTF-8"
    return "" if has_words(text) else f"{text!r:.60} has no words"


def has_lone_surrogate(text: str) -> bool:
    """Whether it cannot be written as UTF-8."""
    return LONE.search(text) is not None


def has_words(text: str) -> bool:
    """Whether CLIP's tokenizer finds anything in it between start and end."""
    if PLAIN.fullmatch(text):
        return bool(text.strip())  # leading spaces are passed over before it is cut
    return any(token < START for token in tokenizer().encode(text))


def is_cut(text: str) -> bool:
    """Whether `tokenizer` reads less than the whole text."""
    return len(text) > READ or bool(
        UNBROKEN.search(text) and LONG_WORD.search(tokenizer().clean_whole(text))
    )


@functools.cache
def tokenizer() -> Any:
    """CLIP's, but of a text the first `READ` characters and of a word the first `WORD` are read:
    its time grows with the square of both, and 77 tokens end long before."""
    import open_clip  # slow to load

    own = copy.copy(open_clip.tokenizer._tokenizer)
    own.clean_whole, own.cache = own.clean_fn, dict(own.cache)
    own.clean_fn = lambda text: LONG_WORD.sub(
        lambda word: word.group()[:WORD], own.clean_whole(_start(text))
    )
    return own


def _start(text: str) -> str:
    """The first `READ` characters that are no leading spaces; if they are not all, up to the last
    space where there is one: in half of an entity or of a wrongly decoded letter the repair of a
    whole line may fail."""
    if len(text) <= READ:
        return text
    start = text.lstrip()[:READ]
    space = start.rfind(" ", READ // 2)
    return start if space < 0 else start[:space]
