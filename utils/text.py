"""Untrusted text: escape control characters for terminals and logs."""

from __future__ import annotations

import re

# Characters that move a terminal's cursor, change the direction of text, break a line, or cannot be
# encoded as UTF-8.
HIDDEN = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Multiline(str):
    """A log message of several lines, such as a table: the log does not escape its line breaks. The
    code that makes it passes untrusted text through `visible`."""


def visible(text: object, lines: bool = False) -> str:
    """`text` on one line, for a terminal or a log: control characters, line breaks, direction marks
    and lone surrogates are escaped as `\\x1b`, `\\n`, `\\u202e`.

    Args:
        lines: keep line breaks.
    """

    def escape(match: re.Match[str]) -> str:
        char = match.group()
        return char if lines and char == "\n" else char.encode("unicode_escape").decode()

    return HIDDEN.sub(escape, str(text))
