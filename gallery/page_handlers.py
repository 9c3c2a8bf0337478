"""What the buttons and fields of the search page do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from gallery.page_html import heat_part, part, person_facts, problem, sent_part
from gallery.page_question import Question, title
from gallery.sent import Sent
from gallery.service import Service
from utils.errors import UserError
from utils.text import visible

EXAMPLES = (
    "a woman in a yellow dress with a black bag",
    "a man in a grey shirt with a black backpack",
    "a person in a red jacket, blue jeans and white shoes",
)
PAST = 20  # questions that a visitor can go back
START = "Describe a person in a sentence, choose an example, or add a picture."
NOBODY = "Nobody is in this gallery yet: python search.py index adds people."
CLOSED = [gr.Column(visible=False), "", "", ""]  # no person is shown


class Handlers:
    """What the page's buttons do. What they return goes to the components that `build` names.

    Args:
        columns: those of the page's lists of choices, in their order.
    """

    def __init__(self, service: Service, columns: Sequence[str]) -> None:
        self.service, self.columns = service, columns

    def ask(
        self,
        sentence: str,
        minus: str,
        text: str,
        count: float,
        collapse: bool,
        sent: Sent | None,
        *chosen: str | None,
    ) -> list[Any]:
        """A new question: its first page."""
        pairs = zip(self.columns, chosen, strict=True)
        question = Question(
            one_line(sentence), one_line(minus), tuple((c, v) for c, v in pairs if v),
            whole(text).strip(), sent, count=int(count), collapse=bool(collapse),
        )  # fmt: skip
        return self.answer(question, 0)

    def send(self, event: gr.EventData, *fields: Any) -> list[Any]:
        """Take the picture that a visitor has sent, or drop the last one, and ask again.

        Args:
            fields: as `ask` has them.
        """
        sentence, minus, text, count, collapse, _, *chosen = fields
        address, sent = _data(event).get("picture"), None
        try:
            sent = None if address is None else self.service.take(address)
        except UserError as error:
            return [None, sent_part(None), *self.nothing(problem(error))]
        if sent is None and not sentence:
            return [None, sent_part(None), *self.nothing("", START)]
        asked = self.ask(sentence, minus, text, count, collapse, sent, *chosen)
        return [sent, sent_part(sent), *asked]

    def nothing(self, status: str, note: str = "") -> list[Any]:
        """No question, and no hits."""
        bar = [gr.Row(visible=False), gr.skip(), gr.skip()]
        hits = part("hits", hits=[], note=note)
        return [None, 0, status, hits, *bar, "", *CLOSED, self.header()]

    def answer(self, question: Question | None, page: int) -> list[Any]:
        """A page of a question."""
        try:
            if question is None:
                raise UserError("Ask first.")
            found = self.service.answer(question, page)
            cards = self.service.cards([hit.id for hit in found.hits])
            like = self.service.cards([] if question.like is None else [question.like])
        except UserError as error:
            return self.nothing(problem(error))
        why = "".join(f" {line[0].upper()}{visible(line[1:])}." for line in found.unknown)
        note = f"The filters keep nobody.{why}" if len(self.service.now()) else NOBODY
        bar = [
            gr.Row(visible=bool(found.hits)), gr.Button(interactive=page > 0),
            gr.Button(interactive=found.more),
        ]  # fmt: skip
        before = title(question.before[-1][0], "the person before") if question.before else ""
        status = part(
            "status", title=title(question, "this person"), like=like[0] if like else "",
            page=page + 1, sure=found.sure, before=before,
        )  # fmt: skip
        cards_html = part("hits", hits=list(zip(found.hits, cards, strict=True)), note=note)
        return [question, page, status, cards_html, *bar, "", *CLOSED, self.header()]

    def back(self, question: Question | None, page: int) -> list[Any]:
        return self.answer(question, max(0, page - 1))

    def forth(self, question: Question | None, page: int) -> list[Any]:
        return self.answer(question, page + 1)

    def look(self, question: Question | None, event: gr.EventData) -> list[Any]:
        """Open the person of a button."""
        identifier = number_of(event, "id")
        try:
            person = self.service.person(identifier)
        except UserError as error:
            head = part("person_head", of="", heading="Nobody", problem=f"{error}")
            return [None, gr.Column(visible=True), head, "", ""]
        words = [] if question is None or person.problem else self.service.words(question)
        views = "view" in self.service.now().choices() and person.item["view"] is not None
        return [
            identifier, gr.Column(visible=True),
            part("person_head", of=identifier, heading="This person", problem=person.problem),
            heat_part(identifier, person.picture, "", words),
            part("person", person=person, facts=person_facts(person), views=views),
        ]  # fmt: skip

    def warm(self, question: Question | None, identifier: int | None, number: int = 0) -> Any:
        """The heat map of the person who is open, for one of the question's words."""
        if identifier is None or question is None or not self.service.words(question):
            return gr.skip()
        words, picture, heat, reason = self.service.words(question), "", "", ""
        try:
            picture = self.service.person(identifier).picture
            if picture:
                heat = self.service.heat(question, identifier, number)
        except UserError as error:
            reason = f"{error}"
        return heat_part(identifier, picture, heat, words if picture else [], number, reason)

    def other_words(
        self, question: Question | None, identifier: int | None, event: gr.EventData
    ) -> Any:
        return self.warm(question, identifier, number_of(event, "words"))

    def act(
        self, question: Question | None, page: int, identifier: int | None, event: gr.EventData
    ) -> list[Any]:
        """Close the person, ask for more like it, or go back to the question before that. Then the
        fields of a question show what is asked."""
        what = _data(event).get("do")
        if what == "back" and question is not None and question.before:
            *before, (last, page) = question.before
            return self._asked(replace(last, before=tuple(before)), page)
        if what not in ("like", "other") or question is None or identifier is None:
            return [*[gr.skip()] * 12, *CLOSED, gr.skip()]
        like = Question(
            choices=tuple(c for c in question.choices if what == "like" or c[0] != "view"),
            where=question.where, like=identifier, other_view=what == "other",
            count=question.count, collapse=question.collapse,
            before=(*question.before, (replace(question, before=()), page))[-PAST:],
        )  # fmt: skip
        return self._asked(like, 0)

    def _asked(self, question: Question, page: int) -> list[Any]:
        sent = question.sent
        fields = [question.sentence, question.minus, sent, sent_part(sent)]
        return [*fields, *self.answer(question, page)]

    def save(self, kind: str, question: Question | None, page: int) -> str:
        """A link to a file with the hits, which the page then clicks."""
        try:
            if question is None:
                raise UserError("Ask first.")
            name, address, size = self.service.as_file(question, page, kind)
        except UserError as error:
            return problem(error)
        return part("saved", name=name, address=address, size=f"{max(1, size // 1000)} kB")

    def newest(self) -> list[Any]:
        """The header, no hits, and the lists of choices, of the gallery as it is now."""
        try:
            known = self.service.now().choices()
        except UserError:  # the next question says what is wrong
            return [gr.skip()] * (2 + len(self.columns))
        lists = [gr.Dropdown(choices=choices_of(known.get(column, []))) for column in self.columns]
        return [self.header(), self.start(), *lists]

    def header(self) -> Any:
        """The name of the gallery, and how many people it has now."""
        try:
            count = len(self.service.now())
        except UserError:  # the answer says what is wrong
            return gr.skip()
        return part("header", name=self.service.folder.absolute().name, count=f"{count:,}")

    def start(self) -> str:
        """What there is in place of hits before the first question."""
        return part("hits", hits=[], note=START if len(self.service.now()) else NOBODY)


def example(event: gr.EventData) -> str:
    """The example of a button."""
    return EXAMPLES[number_of(event, "example") % len(EXAMPLES)]


def whole(text: str | None) -> str:
    """A visitor's text without unpaired surrogates, which cannot be encoded."""
    return (text or "").encode("utf-8", "replace").decode()


def one_line(text: str | None) -> str:
    """A visitor's sentence without line breaks."""
    return " ".join(whole(text).split())


def number_of(event: gr.EventData, name: str) -> int:
    """A number that a button has told; -1 if it is none."""
    text = _data(event).get(name)
    return int(text) if isinstance(text, str) and re.fullmatch(r"[0-9]{1,19}", text) else -1


def choices_of(values: Sequence[str]) -> list[tuple[str, str]]:
    """What a list of choices shows, and the value of each; the first chooses none."""
    return [("any", ""), *((visible(value), value) for value in values)]


def _data(event: gr.EventData) -> Mapping[str, Any]:
    return event._data if isinstance(event._data, dict) else {}
