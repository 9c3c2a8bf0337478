"""CLIP's tokenizer with limits, and the checks of sentences that it reads."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import regex

from utils.bpe import BytePairs, clean_text, merges_file

# Each of these characters except the space is a token. The tokenizer's text repair may remove other
# characters (control characters, "&nbsp;"), or they may form a special token ("<end_of_text>").
PLAIN = re.compile(r"[ -%'-;=-~]*")
START, END = 49406, 49407  # CLIP's start and end token, the largest ids
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# Characters. 77 tokens of usual captions have about 400, the longest below 1,000.
MAX_TEXT = 4096
# Characters; more than a German compound (80) or 77 tokens of a script without spaces.
MAX_WORD = 256
# A longer word, as CLIP's tokenizer splits words.
LONG_WORD = regex.compile(rf"\p{{L}}{{{MAX_WORD + 1},}}|[^\s\p{{L}}\p{{N}}]{{{MAX_WORD + 1},}}")
UNBROKEN = re.compile(rf"[^ \t\r\n]{{{MAX_WORD + 1}}}")  # may contain a long word


def text_problem(text: object) -> str:
    """What is wrong with a sentence, as a predicate for "the caption ...", or nothing."""
    if text == "":
        return "is empty"
    if not isinstance(text, str):
        return f"is {text!r:.60}, not text"
    if has_lone_surrogate(text):
        return f"{text!r:.60} contains half a character (a lone surrogate); save it as UTF-8"
    return "" if has_words(text) else f"{text!r:.60} has no words"


def has_lone_surrogate(text: str) -> bool:
    """Whether the text has half a character, which UTF-8 cannot encode."""
    return LONE_SURROGATE.search(text) is not None


def has_words(text: str) -> bool:
    """Whether CLIP's tokenizer gives any token between the start and the end token."""
    if PLAIN.fullmatch(text):
        return bool(text.strip())  # leading spaces are removed before the text is cut
    return any(token < START for token in tokenizer().encode(text))


def is_cut(text: str) -> bool:
    """Whether `tokenizer` reads only a part of the text."""
    return len(text) > MAX_TEXT or bool(
        UNBROKEN.search(text) and LONG_WORD.search(clean_text(text))
    )


@functools.cache
def tokenizer() -> BytePairs:
    """CLIP's tokenizer, limited as `limited` does it."""
    return limited(merges_file())


def limited(merges: Path) -> BytePairs:
    """CLIP's tokenizer, limited to `MAX_TEXT` characters of a text and `MAX_WORD` of a word.

    Its time grows with the square of both, and 77 tokens need far fewer characters.

    Args:
        merges: the file of its merges.
    """

    def clean(text: str) -> str:
        return LONG_WORD.sub(lambda word: word.group()[:MAX_WORD], clean_text(_start(text)))

    return BytePairs(merges, clean)


def _start(text: str) -> str:
    """The first `MAX_TEXT` characters after leading spaces, cut at a space if there is one.

    Half an HTML entity or half a wrongly decoded letter may break the repair of the complete line.
    """
    if len(text) <= MAX_TEXT:
        return text
    start = text.lstrip()[:MAX_TEXT]
    space = start.rfind(" ", MAX_TEXT // 2)
    return start if space < 0 else start[:space]
