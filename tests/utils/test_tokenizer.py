"""The tokenizer gives the ids of open_clip's, for any text, and loads no torch."""

import random
import subprocess
import sys

import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.mini.build import sample_pair, sample_people
from tests.helpers import ROOT
from utils.bpe import BytePairs, merges_file
from utils.tokenizer import END, MAX_TEXT, START, tokenizer

CLIP = open_clip.tokenizer._tokenizer


def test_the_vocabulary_is_open_clips():
    ours = BytePairs(merges_file())
    assert ours.decoder == CLIP.decoder and ours.encoder == CLIP.encoder
    assert [ours.encoder[t] for t in ("<start_of_text>", "<end_of_text>")] == [START, END]


@pytest.mark.parametrize("text", [
    "", " ", "A man's T-shirt; they're £5 (50 % off)", "caf\u00e9 na\u00efve \u4e2d\u6587 \U0001f600", "&amp;lt;b&gt; &nbsp;x",
    "<start_of_text>a<END_OF_TEXT> <end_of_text", "don't I'd we've 12345 a1b2", "\x00\x07\u200b\ufeff", "sch\u00c3\u00b6n",
    "___---...!!!", "I\u0130\u0131\u017f\u1e9e", "\u0915\u094d\u0937 \u0e01\u0e33", "Donaudampfschifffahrtsgesellschaft",
])  # fmt: skip
def test_odd_texts_have_open_clips_ids(text):
    assert tokenizer().encode(text) == CLIP.encode(text)


def test_captions_have_open_clips_ids():
    for source, identity, person in sample_people(5, 0, 60):
        for text in sample_pair(5, 0, source, identity, 0, person)[1]:
            assert tokenizer().encode(text) == CLIP.encode(text)


@given(st.text(max_size=80))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_text_has_open_clips_ids(text):
    text = text.encode("utf-8", "ignore").decode()  # no lone surrogates
    assert tokenizer().encode(text) == CLIP.encode(text)


def test_random_words_have_open_clips_ids():
    """Each merge is used: words are tokens of the vocabulary, in random order."""
    rng = random.Random(0)
    words = [t.removesuffix("</w>") for t in CLIP.encoder if t.isascii() and t.isalpha()]
    for _ in range(200):
        text = "".join(rng.choice(words) for _ in range(4)) + " " + rng.choice(words)
        assert tokenizer().encode(text) == CLIP.encode(text)


def test_a_text_over_the_limit_is_read_to_the_limit():
    assert tokenizer().encode("ab " * MAX_TEXT) == CLIP.encode(("ab " * MAX_TEXT)[:MAX_TEXT].rstrip("a"))  # fmt: skip


def test_it_loads_neither_torch_nor_open_clip():
    code = "import sys; from utils.tokenizer import tokenizer; tokenizer().encode('a man'); print({'torch', 'open_clip'} & set(sys.modules))"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
