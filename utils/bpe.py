"""CLIP's byte-pair encoding: text to token ids, as OpenAI's and open_clip's tokenizers give them.

open_clip's own is the same, but cannot be loaded without torch, which takes seconds, and which an
exported encoder does not need.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import ftfy
import regex

MERGES = "bpe_simple_vocab_16e6.txt.gz"  # OpenAI's file, in open_clip's package
USED = 49152 - 256 - 2  # merges; the file has more
SPECIAL = ("<start_of_text>", "<end_of_text>")
WORD = regex.compile(
    "|".join(SPECIAL) + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)


class BytePairs:
    """Token ids of texts.

    Attributes:
        cache: the tokens of words that were seen, joined by spaces; the caller limits its size.
        decoder: the token of each id; one that ends a word ends in `</w>`.

    Args:
        merges: the file of merges.
        clean: applied to a text before it is cut into words.
    """

    def __init__(self, merges: Path, clean: Callable[[str], str] | None = None) -> None:
        self.clean_fn = clean or clean_text
        lines = gzip.decompress(merges.read_bytes()).decode("utf-8").split("\n")[1 : USED + 1]
        pairs = [tuple(line.split()) for line in lines]
        self.letters = _letters()
        single = list(self.letters.values())
        tokens = [*single, *(f"{letter}</w>" for letter in single), *map("".join, pairs), *SPECIAL]
        self.encoder = {token: id_ for id_, token in enumerate(tokens)}
        self.decoder = {id_: token for token, id_ in self.encoder.items()}
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.cache = {token: token for token in SPECIAL}

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without those of start and end."""
        words = WORD.findall(self.clean_fn(text))
        in_letters = ("".join(self.letters[byte] for byte in word.encode()) for word in words)
        return [self.encoder[token] for word in in_letters for token in self._merged(word)]

    def _merged(self, word: str) -> list[str]:
        """The tokens of a word: pairs of neighbours merge, the pair first that is first in the
        file."""
        if word not in self.cache:
            parts = [*word[:-1], word[-1] + "</w>"]
            while len(parts) > 1:
                first = min(pairwise(parts), key=lambda pair: self.ranks.get(pair, USED))
                if first not in self.ranks:
                    break
                merged: list[str] = []
                at = 0
                while at < len(parts):
                    step = 2 if tuple(parts[at : at + 2]) == first else 1
                    merged.append("".join(parts[at : at + step]))
                    at += step
                parts = merged
            self.cache[word] = " ".join(parts)
        return self.cache[word].split(" ")


def clean_text(text: str) -> str:
    """Repair wrongly encoded letters and HTML entities, and remove capitals and extra spaces."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def merges_file() -> Path:
    """OpenAI's file of merges, in the package of open_clip, which is not loaded."""
    spec = importlib.util.find_spec("open_clip")
    assert spec and spec.submodule_search_locations, "open_clip is in requirements.txt"
    return Path(spec.submodule_search_locations[0]) / MERGES


def _letters() -> dict[int, str]:
    """A printable letter for each byte: itself, or one after the 256th."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]  # fmt: skip
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + n) for n, byte in enumerate(others)
    }
