"""Checks of a caption that a model has written: is it one paragraph of English about the person?

    text = repair(answer)
    problem = problem_of(text, finish_reason, prompt, words)  # empty if it is good

All lists of words are in this file; tests/construction/test_checks.py has good and bad captions.
"""

from __future__ import annotations

import re
from collections import Counter

import regex
from py3langid import classify

from utils.tokenizer import is_cut, text_problem

# What `repair` removes.
PREFIX = re.compile(
    r"^[*_#\s]*(caption|description|answer|output|response)[*_]*\s*:[*_]*\s+", re.IGNORECASE
)
QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "`": "`"}
PLAIN_QUOTES = str.maketrans("“”‘’", "\"\"''")
ITEM = re.compile(r"^\s*([-*•·]|\d+[.)])\s", re.MULTILINE)  # of a list

# What makes a caption useless. Each list is joined with "or"; words are searched in lower case.
REFUSALS = (
    r"(i'm|i am) (unable|not able|afraid)", r"\b(sorry|apologi[sz]e|unfortunately)\b",
    r"\bi (cannot|can't|can not|could not|couldn't|won't|will not|do not|don't)\b",
    r"\bas an? (ai|artificial|language|large|assistant)\b", r"\b(ai|language) model\b",
    r"(cannot|can't|unable to) (identify|describe|assist|help|provide|determine|see|view)",
    r"\bno (person|people|pedestrian|image|picture)\b", r"\bi('d| would) be happy\b",
    r"\bplease (provide|upload|share|let me)\b", r"\bagainst my\b", r"\bguidelines\b",
)  # fmt: skip
CHAT = (
    r"^(sure|certainly|of course|okay|ok|here('s| is| are)|below is|absolutely)\b",
    r"^(write|describe|answer|begin|say)\b",
    r"\b(user|assistant|system|human) ?:", r"\blet me know\b", r"\bhope this\b",
    r"\b(the|this|your) (prompt|instructions?|task|caption|description|paragraph)\b",
    r"\bword count\b", r"\b\d+ words\b",
    r"<[^>]{1,40}>", r"\[/?inst\]", r"\[[^\]]{1,40}\]", r"\{[^}]{1,40}\}",
)  # fmt: skip
ABOUT_THE_PICTURE = (
    r"\b(image|photo|photograph|snapshot|screenshot|footage|video|thumbnail)s?\b",
    r"\b(the|this|these|both|first|second|each) (picture|frame|shot|scene|crop)s?\b",
    r"\bin (the )?pictures?\b", r"\b(picture|shot|frame) (shows|depicts|is|was|appears|quality)\b",
    r"\b(blurry|blurred|blurriness|pixelated|pixelation|grainy|low[- ]resolution|out of focus)\b",
    r"\b(resolution|image quality|viewpoint|vantage point|point of view|bird's[- ]eye)\b",
    # A person may face the camera, or walk towards it.
    r"(?<!facing )(?<!faces )(?<!toward )(?<!towards )(?<!from )(?<!past )(?<!to )(?<!at )"
    r"\bthe camera\b", r"\bcamera('s)? (angle|view|lens|perspective|position)", r"\bviewer\b",
    r"\b(drone|uav|cctv|surveillance|aerial|top-down|overhead (view|angle|shot))\b",
    r"\b(from above|from a height|high angle|ground[- ]level|close-up)\b",
    r"\bbounding box", r"\b(cropped|captured|photographed|pictured)\b", r"\bbackground\b",
    r"\bforeground\b",
)  # fmt: skip
UNSURE = (
    r"\b(unclear|unknown|unspecified|indistinct|indiscernible|unidentifiable|undetermined)\b",
    r"\b(not|isn't|aren't|barely|hardly) (clearly |fully )?(visible|discernible|clear|shown)\b",
    r"\b(cannot|can't|could not|can hardly) be (\w+ )?(seen|determined|discerned|identified)",
    r"\b(hard|difficult|impossible) to (tell|see|say|determine|discern|make out|identify)\b",
    r"\b(a man or (a )?woman|male or female|man/woman|he or she|he/she)\b", r"\bn/a\b",
    r"\b(not|none) (provided|specified|mentioned|given|available|listed)\b",
)  # fmt: skip
_PEOPLE = r"(people|persons|men|women|pedestrians|individuals|figures|boys|girls)"
_ONE = r"(person|man|woman|pedestrian|individual|figure|boy|girl)"
SEVERAL = (
    rf"\b(two|three|four|five|several|multiple|many|some|both|other|various) (\w+ )?{_PEOPLE}\b",
    rf"\b(group|crowd|pair|couple) of (\w+ )?{_PEOPLE}\b",
    rf"\b(the|an|a)? ?(other|another|second|first|left|right|third) {_ONE}\b",
    rf"\b{_ONE} (on|to) the (left|right)\b", rf"\b{_PEOPLE} are\b", r"\beach of them\b",
)  # fmt: skip
LISTS = (
    ("a refusal", REFUSALS),
    ("an answer to the prompt, not a caption", CHAT),
    ("about the picture", ABOUT_THE_PICTURE),
    ("unsure", UNSURE),
    ("several people", SEVERAL),
)
PATTERNS = [(name, re.compile("|".join(patterns))) for name, patterns in LISTS]
# The most frequent words of English captions. In French, German or Spanish captions they are rare.
ENGLISH = {
    "a", "an", "the", "and", "with", "of", "in", "on", "is", "are", "to", "at", "over", "while",
    "he", "she", "his", "her", "has", "have", "wears", "wearing", "dressed", "carrying", "man",
    "woman", "person", "hair", "shoes", "black", "white",
}  # fmt: skip
ENGLISH_SHARE = 0.25  # below it, the language is what py3langid says
LEAKED = 8  # words in a row that the prompt has too
LOOP = 3, 4  # that many words in a row, that many times
DISTINCT = 0.4  # the least share of distinct words, from 20 words on
QUOTED = 4  # words in quotation marks at most: a text on clothes, not speech
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
FOREIGN = regex.compile(r"[^\P{L}\p{Latin}]|\uFFFD")  # letters of other scripts, broken characters


def repair(text: str) -> str:
    """The text without what surrounds a caption: spaces, quotes, "Caption:", line breaks. A list
    keeps its lines, and is refused."""
    text = text.strip()
    while True:
        before = text
        text = PREFIX.sub("", text).strip()
        if len(text) > 1 and QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
            text = text[1:-1].strip()
        if text.startswith("**") and text.endswith("**") and text.count("**") == 2:
            text = text[2:-2].strip()
        if text == before:
            break
    return text if ITEM.search(text) else " ".join(text.split())


def problem_of(
    text: str,
    finish_reason: str = "stop",
    prompt: str = "",
    words: tuple[int, int] = (8, 120),
) -> str:
    """Why a repaired caption is not good enough, or nothing.

    Args:
        finish_reason: the server's.
        prompt: what was asked.
        words: fewest and most words.
    """
    if text_problem(text):
        return "empty"
    if finish_reason == "length":
        return "cut: the model reached max_tokens"
    if finish_reason == "content_filter":
        return "a refusal: the server's filter"
    if problem := _form_problem(text):
        return problem
    lower = text.translate(PLAIN_QUOTES).lower()
    for name, pattern in PATTERNS:
        if match := pattern.search(lower):
            return f"{name}: '{match[0].strip()}'"
    found = [word.lower() for word in WORD.findall(lower)]
    fewest, most = words
    if not fewest <= len(found) <= most:
        return f"length: {len(found)} words, not {fewest} to {most}"
    if problem := _language_problem(text, found):
        return problem
    asked = [word.lower() for word in WORD.findall(prompt.translate(PLAIN_QUOTES).lower())]
    if shared := _runs(found, LEAKED).keys() & _runs(asked, LEAKED).keys():
        return f"repeats the prompt: '{' '.join(min(shared))}'"
    length, times = LOOP
    run, count = _runs(found, length).most_common(1)[0] if len(found) >= length else ((), 0)
    if count >= times:
        return f"repeats itself: '{' '.join(run)}'"
    if len(found) >= 20 and len(set(found)) < DISTINCT * len(found):
        return f"repeats itself: {len(set(found))} of {len(found)} words are distinct"
    if not re.search(r"[.!?][\"')]?$", text):
        return "cut: it does not end like a sentence"
    return ""


def _form_problem(text: str) -> str:
    if text[0] in "{[" or "```" in text or '":' in text:
        return "JSON or code"
    if ITEM.search(text) or "\n" in text:
        return "a list or several lines"
    if "**" in text or "__" in text or text[0] == "#" or "| " in text:
        return "markdown"
    if is_cut(text):
        return "a word that is too long"
    if any(len(q.split()) > QUOTED for q in re.findall(r'"([^"]*)"', text.translate(PLAIN_QUOTES))):
        return "a quotation"
    return "a quotation mark too many" if text.translate(PLAIN_QUOTES).count('"') % 2 else ""


def _language_problem(text: str, words: list[str]) -> str:
    if letter := FOREIGN.search(text):
        return f"another language: '{letter[0]}'"
    if sum(word in ENGLISH for word in words) < ENGLISH_SHARE * len(words):
        language, _ = classify(text)
        if language != "en":
            return f"another language: {language}"
    return ""


def _runs(words: list[str], length: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + length]) for i in range(len(words) - length + 1))
