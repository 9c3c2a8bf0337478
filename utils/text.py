"""Text that is not ours: whether a sentence says anything, and how a terminal or log shows it."""

from __future__ import annotations

import re

# Of these characters any that is no space is a token. Others may be repaired away (control
# characters, "&nbsp;"), or stand for a token that is no word ("<end_of_text>").
PLAIN = re.compile(r"[ -%'-;=-~]*")
START = 49406  # the first of CLIP's two special tokens
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

    def shown(found: re.Match) -> str:
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
    return any("\ud800" <= c <= "\udfff" for c in text) if not text.isascii() else False


def has_words(text: str) -> bool:
    """Whether CLIP's tokenizer finds anything in it between start and end."""
    if PLAIN.fullmatch(text):
        return bool(text.strip())
    import open_clip  # slow to load, and hardly ever needed

    return any(token < START for token in open_clip.tokenizer._tokenizer.encode(text))
