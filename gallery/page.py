"""The search page, in Gradio, and its server.

Pictures are in the page as data URLs, and so are files to save, and the picture that a visitor
sends: the server gives out no file and takes none, and `Guard` refuses every address of Gradio that
the page does not need, such as uploads.
"""

from __future__ import annotations

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is loaded

# isort: split

import asyncio
import hmac
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from gallery import sent as sent_pictures
from gallery.query import Hit
from gallery.sent import Sent
from gallery.service import MAX_PAGE, Person, Question, Service, title
from utils.errors import UserError
from utils.files import PROJECT
from utils.pages import render
from utils.text import visible

TEMPLATES = Path(__file__).parent / "templates"
SENT = TEMPLATES / "sent.js"
DOCUMENT = PROJECT / "docs/search.md"
EXAMPLES = (
    "a woman in a yellow dress with a black bag",
    "a man in a grey shirt with a black backpack",
    "a person in a red jacket, blue jeans and white shoes",
)
PAST = 20  # questions that a visitor can go back
SESSIONS = 200  # visitors whose question is remembered, 0.3 MB each; the oldest is forgotten first
AT_ONCE = 4  # requests that are answered at once; the others wait
WRONG_SECONDS = 1.0  # for which a wrong password keeps all others waiting that are wrong
MAX_BODY, MAX_QUESTION = 2**16, 2**16 + 4 * sent_pictures.MAX_BYTES // 3  # bytes of a request
# What a browser may ask for. Gradio's other addresses (files, uploads, proxies, an API) are closed.
OPEN = re.compile(
    r"/|/config/?|/login/?|/logout/?|/theme\.css|/favicon\.ico|/(?:assets|static)/[\w./-]+"
    r"|/gradio_api/(?:queue/(?:join|data)|heartbeat/\w+|startup-events|cancel)/?"
)
QUESTION = "/gradio_api/queue/join"  # has the visitor's picture
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; font-src 'self' data:; "
    # Gradio puts styles and scripts into the page, and makes functions of text.
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
# A click on a button tells the server what the button says in its data.
CHOOSE = """
element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (!button) return;
  if (button.dataset.id) {
    element.querySelector('[aria-current]')?.removeAttribute('aria-current');
    button.setAttribute('aria-current', 'true');
  }
  trigger('select', {...button.dataset});
});
"""
# Gradio forgets clicks while one is answered: the last one is told again until its person is open.
INSIST = """
let timer;
const insist = (button, tries) => {
  clearTimeout(timer);
  timer = setTimeout(() => {
    const open = document.querySelector('#person h2')?.dataset.of;
    if (!tries || open === button.dataset.id || !button.isConnected) return;
    if (open) trigger('select', {...button.dataset});
    insist(button, tries - 1);
  }, 400);
};
element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (button) insist(button, 20);
});
"""
# A new answer begins at its title.
ANSWERED = (
    CHOOSE
    + """
watch('value', () => {
  const title = element.closest('#status');
  if (title.getBoundingClientRect().top < 0) title.scrollIntoView({block: 'start'});
});
"""
)
# A person who is opened gets the focus; who is closed, by the button or by Escape, gives it back.
# The panel takes its place after this is told; then a phone scrolls to it, and where it is beside
# the hits, which now have fewer columns, its own hit stays in sight.
OPENED = """
const narrow = matchMedia('(max-width: 48rem)');
const focus = () => {
  const heading = element.querySelector('h2');
  heading?.focus({preventScroll: true});
  setTimeout(() => {
    if (narrow.matches) heading?.scrollIntoView({block: 'start'});
    else document.querySelector('#hits [aria-current]')?.scrollIntoView({block: 'nearest'});
  }, 50);
};
const close = () => {
  trigger('select', {do: 'close'});
  document.querySelector('#hits [aria-current]')?.focus();
};
watch('value', focus);
focus();
element.addEventListener('click', event => { if (event.target.closest('button')) close(); });
element.closest('#person').addEventListener('keydown', event => {
  if (event.key === 'Escape') close();
});
"""
# The button of the words that were chosen keeps the focus when the map comes. A map that comes when
# another person is open is replaced by that person's.
WORDS = """
let chosen = false;
const panel = element.closest('#person');
element.addEventListener('click', event => { if (event.target.closest('button')) chosen = true; });
watch('value', () => {
  if (chosen && !element.querySelector('.waiting')) {
    element.querySelector('[aria-pressed=true]')?.focus({preventScroll: true});
    chosen = false;
  }
  const [head, heat] = ['h2', '.pair'].map(part => panel.querySelector(part)?.dataset.of);
  if (head && heat && head !== heat) trigger('select', {words: '0'});
});
"""
SAVE = "watch('value', () => element.querySelector('a')?.click());"
START = "Describe a person in a sentence, choose an example, or add a picture."
NOBODY = "Nobody is in this gallery yet: python search.py index adds people."
SPOKEN = {"common.complete": "Done"}  # to screen readers; Gradio's own list lacks it
FILTER = "view = 'aerial' and not source = 'G2APS-AG'"
FILTER_INFO = "and, or, not, =, !=, <, <=, in, like, is null; text in single quotes"


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
            return [None, sent_html(None), *self.nothing(problem(error))]
        if sent is None and not sentence:
            return [None, sent_html(None), *self.nothing("", START)]
        asked = self.ask(sentence, minus, text, count, collapse, sent, *chosen)
        return [sent, sent_html(sent), *asked]

    def nothing(self, status: str, note: str = "") -> list[Any]:
        """No question, and no hits."""
        bar = [gr.Row(visible=False), gr.skip(), gr.skip()]
        hits = _html("hits", hits=[], note=note)
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
        note = "The filters keep nobody." if len(self.service.now()) else NOBODY
        bar = [
            gr.Row(visible=bool(found.hits)), gr.Button(interactive=page > 0),
            gr.Button(interactive=found.more),
        ]  # fmt: skip
        before = title(question.before[-1][0], "the person before") if question.before else ""
        status = _html(
            "status", title=title(question, "this person"), like=like[0] if like else "",
            page=page + 1, sure=found.sure, before=before,
        )  # fmt: skip
        cards_html = _html("hits", hits=list(zip(found.hits, cards, strict=True)), note=note)
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
            head = _html("person_head", of="", heading="Nobody", problem=f"{error}")
            return [None, gr.Column(visible=True), head, "", ""]
        words = [] if question is None or person.problem else self.service.words(question)
        views = "view" in self.service.now().choices() and person.item["view"] is not None
        return [
            identifier, gr.Column(visible=True),
            _html("person_head", of=identifier, heading="This person", problem=person.problem),
            _heat(identifier, person.picture, "", words),
            _html("person", person=person, facts=_about(person), views=views),
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
        return _heat(identifier, picture, heat, words if picture else [], number, reason)

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
        fields = [question.sentence, question.minus, sent, sent_html(sent)]
        return [*fields, *self.answer(question, page)]

    def save(self, kind: str, question: Question | None, page: int) -> str:
        """A link to a file with the hits, which the page then clicks."""
        try:
            if question is None:
                raise UserError("Ask first.")
            name, address, size = self.service.as_file(question, page, kind)
        except UserError as error:
            return problem(error)
        return _html("saved", name=name, address=address, size=f"{max(1, size // 1000)} kB")

    def newest(self) -> list[Any]:
        """The header, no hits, and the lists of choices, of the gallery as it is now."""
        try:
            known = self.service.now().choices()
        except UserError:  # the next question says what is wrong
            return [gr.skip()] * (2 + len(self.columns))
        lists = [gr.Dropdown(choices=_choices(known.get(column, []))) for column in self.columns]
        return [self.header(), self.start(), *lists]

    def header(self) -> Any:
        """The name of the gallery, and how many people it has now."""
        try:
            count = len(self.service.now())
        except UserError:  # the answer says what is wrong
            return gr.skip()
        return _html("header", name=self.service.folder.absolute().name, count=f"{count:,}")

    def start(self) -> str:
        """What there is in place of hits before the first question."""
        return _html("hits", hits=[], note=START if len(self.service.now()) else NOBODY)


def build(service: Service, max_requests: int = 64) -> gr.Blocks:
    """The page of a gallery.

    Args:
        max_requests: that may wait.
    """
    values = service.now().choices()
    do = Handlers(service, list(values))
    html = partial(gr.HTML, apply_default_css=False)
    line = partial(gr.Textbox, lines=1, max_lines=1)
    with gr.Blocks(title="Find a person", analytics_enabled=False, fill_width=True) as page:
        asked, number, shown, sent = gr.State(None), gr.State(0), gr.State(None), gr.State(None)
        header = html(do.header(), elem_id="title")
        with gr.Row(elem_id="ask"):
            sentence = line(
                label="Who is looked for?", placeholder=EXAMPLES[0], scale=5, autofocus=True
            )
            picture = html(
                sent_html(None), js_on_load=SENT.read_text(), elem_id="sent", scale=0, min_width=110
            )
            go = gr.Button("Search", variant="primary", scale=0, min_width=110)
        examples = html(_html("examples", examples=EXAMPLES), js_on_load=CHOOSE)
        with gr.Accordion("Filters and options", open=False):
            with gr.Row(elem_id="choices"):
                choices = [
                    gr.Dropdown(
                        label=name.replace("_", " "),
                        choices=_choices(known),
                        value="",
                        min_width=130,
                    )
                    for name, known in values.items()
                ]
            with gr.Row():
                minus = line(label="Without", placeholder="a backpack", scale=1)
                expert = line(label="Filter", placeholder=FILTER, scale=2, info=FILTER_INFO)
            with gr.Row():
                count = gr.Slider(6, MAX_PAGE, value=24, step=6, label="Hits on a page")
                collapse = gr.Checkbox(value=True, label="Pictures of one moment are one hit")
        status = html("", elem_id="status", js_on_load=ANSWERED)
        with gr.Row(elem_id="found", equal_height=False):
            with gr.Column(scale=3, min_width=0):
                hits = html(do.start(), elem_id="hits", js_on_load=CHOOSE + INSIST)
                with gr.Row(visible=False, elem_id="bar") as bar:
                    button = partial(gr.Button, size="md", min_width=120)
                    back, forth = button("← Previous"), button("Next →")
                    as_json, as_page = button("Save as JSON"), button("Save with pictures")
                saved = html("", js_on_load=SAVE, elem_id="saved")
            with gr.Column(scale=2, min_width=0, visible=False, elem_id="person") as panel:
                head = html("", js_on_load=OPENED)
                heat = html("", js_on_load=CHOOSE + WORDS)
                person = html("", js_on_load=CHOOSE)
        with gr.Accordion("About, and responsible use", open=False):
            gr.Markdown(about_text())

        answered = [asked, number, status, hits, bar, back, forth, saved, panel, head, heat]
        answered += [person, header]
        fields = [sentence, minus, expert, count, collapse, sent, *choices]
        turn, opened = [asked, number], [asked, shown]
        how: dict[str, Any] = {
            "api_visibility": "private", "show_progress": "minimal",
            "concurrency_id": "gallery", "concurrency_limit": AT_ONCE,
        }  # fmt: skip
        enter = [sentence.submit, minus.submit, expert.submit, go.click]
        gr.on(enter, do.ask, fields, answered, **how)
        examples.select(example, None, sentence, **how).success(do.ask, fields, answered, **how)
        picture.select(do.send, fields, [sent, picture, *answered], **how)
        back.click(do.back, turn, answered, **how)
        forth.click(do.forth, turn, answered, **how)
        look = hits.select(do.look, asked, [shown, panel, head, heat, person], **how)
        look.success(do.warm, opened, heat, **how)
        heat.select(do.other_words, opened, heat, **how)
        acts = [head.select, person.select, status.select]
        gr.on(acts, do.act, [*turn, shown], [sentence, minus, sent, picture, *answered], **how)
        as_json.click(partial(do.save, "json"), turn, saved, **how)
        as_page.click(partial(do.save, "html"), turn, saved, **how)
        page.load(do.newest, None, [header, hits, *choices], **how)
    page.state_session_capacity = SESSIONS
    page.queue(max_size=max_requests, default_concurrency_limit=AT_ONCE, api_open=False)
    return page


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


def problem(error: UserError) -> str:
    """A message for the visitor."""
    return _html("problem", text=f"{error}")


def sent_html(sent: Sent | None) -> str:
    """The picture that the hits are like, or what chooses one."""
    limits = {"most": sent_pictures.MAX_BYTES, "side": sent_pictures.SIDE}
    return _html("sent", small=sent.small if sent else "", **limits)


def about_text() -> str:
    """What the page says about itself: a section of the documentation."""
    text = DOCUMENT.read_text() if DOCUMENT.is_file() else ""
    section = re.search(r"(?ms)^## Responsible use\n(.*?)(?=^## |\Z)", text)
    more = "Whoever runs this page has more in the program's docs/search.md."
    return (section[1].strip() + "\n\n" if section else "") + more


def _data(event: gr.EventData) -> Mapping[str, Any]:
    return event._data if isinstance(event._data, dict) else {}


def _choices(values: Sequence[str]) -> list[tuple[str, str]]:
    return [("any", ""), *((visible(value), value) for value in values)]


def _html(template: str, **values: object) -> str:
    return render(TEMPLATES / f"{template}.html.jinja", **values, facts_of=_facts, name_of=_name)


def _heat(
    identifier: int, picture: str, heat: str, words: list[str], number: int = 0, reason: str = ""
) -> str:
    """A person beside its heat map, and the words for which there can be one."""
    return _html(
        "heat",
        of=identifier,
        picture=picture,
        heat=heat,
        words=words,
        number=number,
        problem=reason,
    )


def _facts(hit: Hit) -> list[str]:
    """What a card says of a hit."""
    facts = [hit.item[name] for name in ("view", "source", "camera") if hit.item[name]]
    return facts + ([_time(hit.item)] if _time(hit.item) else [])


def _name(hit: Hit) -> str:
    return PurePath(hit.item["path"]).name


def _time(item: Mapping[str, Any]) -> str:
    """When an item was seen, in a video or by the picture's own time."""
    if item["frame_time"] is not None:
        minutes, seconds = divmod(item["frame_time"], 60)
        return f"{minutes:.0f}:{seconds:04.1f}"
    return f"{item['taken']}" if item["taken"] is not None else ""


def _about(person: Person) -> list[tuple[str, str]]:
    """What is known of a person besides attributes, in words."""
    item = person.item
    known = [(name, item[name]) for name in ("view", "source", "camera", "identity")]
    known += [("time", _time(item)), ("file", item["path"]), ("id", f"{item['id']}")]
    return [(name, value) for name, value in known if value]


class Guard:
    """The server's app, with fewer addresses, smaller requests, and headers that bind browsers.

    Args:
        names: of this server, in requests; none: any. Without a password, a page elsewhere on the
            web could otherwise lead its own name to this machine and read the gallery.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], names: Sequence[str] = ()) -> None:
        self.app, self.names = app, names

    async def __call__(
        self, scope: MutableMapping[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        given = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        length = given.get("content-length", "" if "transfer-encoding" in given else "0")
        name = re.sub(r":\d+$", "", given.get("host", ""))
        most = MAX_QUESTION if scope["path"] == QUESTION else MAX_BODY
        status = 0
        if self.names and name not in self.names:
            status = 421
        elif ".." in scope["path"] or not OPEN.fullmatch(scope["path"]):
            status = 404
        elif not length.isdecimal() or int(length) > most:
            status = 413

        async def start(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [*message["headers"], *own]
            await send(message)

        if not status:
            return await self.app(scope, receive, start)
        await start({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def app_of(page: gr.Blocks, password: str = "", names: Sequence[str] = ()) -> Guard:
    """The app of a page, behind a password unless it is ""."""
    refused = asyncio.Lock()

    async def right(_: str, given: str) -> bool:
        if hmac.compare_digest(given.encode(), password.encode()):
            return True
        async with refused:  # so that nobody can try many passwords
            await asyncio.sleep(WRONG_SECONDS)
        return False

    theme = gr.themes.Base(
        primary_hue="teal",
        neutral_hue="stone",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        radius_size="lg",
    ).set(  # white text can be read on it
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
    )
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None), page, path="/", footer_links=[], run_history=False,
        auth=right if password else None, auth_message="Any name will do; the password counts.",
        allowed_paths=[], blocked_paths=["/"], show_error=False, max_file_size=0, ssr_mode=False,
        enable_monitoring=False, pwa=False, mcp_server=False, theme=theme,
        css_paths=[TEMPLATES / "page.css"], i18n=gr.I18n(en=SPOKEN),
    )  # fmt: skip
    return Guard(app, names)


class Server(uvicorn.Server):
    """A server that ends in silence: it cuts the connections of open pages, and would report each
    of them with a traceback."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def server_of(app: Guard) -> uvicorn.Server:
    """A server of an app, for a socket that listens."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return Server(
        uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=1,
            lifespan="on",
        )
    )


def serve(service: Service, listening: socket.socket, password: str, max_requests: int) -> None:
    """Serve a gallery's page until a signal."""
    names = () if password else ("localhost", "127.0.0.1", "[::1]", listening.getsockname()[0])
    app = app_of(build(service, max_requests), password, names)
    server_of(app).run(sockets=[listening])
