"""The search page, in Gradio: its components, and what each of them does.

Pictures are in the page as data URLs, and so are files to save, and the picture that a visitor
sends. What happens at an event is in gallery/page_handlers.py, the HTML of a part in
gallery/page_html.py, and scripts and styles are in gallery/templates/.
"""

from __future__ import annotations

import os
import re
from functools import partial
from typing import Any

import gradio as gr

from gallery.page_handlers import EXAMPLES, Handlers, choices_of, example
from gallery.page_html import TEMPLATES, part, sent_part
from gallery.page_question import MAX_PAGE
from gallery.service import Service
from utils.files import PROJECT

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads it when it makes a page

DOCUMENT = PROJECT / "docs/search.md"
SESSIONS = 200  # visitors whose question is remembered, 0.3 MB each; the oldest is forgotten first
AT_ONCE = 4  # requests that are answered at once; the others wait
SPOKEN = {"common.complete": "Done"}  # to screen readers; Gradio's own list lacks it
FILTER = "view = 'aerial' and not source = 'G2APS-AG'"
FILTER_INFO = "and, or, not, =, !=, <, <=, in, like, is null; text in single quotes"
STYLES = TEMPLATES / "page.css"
THEME = gr.themes.Base(
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
                sent_part(None), js_on_load=script("sent"), elem_id="sent", scale=0, min_width=110
            )
            go = gr.Button("Search", variant="primary", scale=0, min_width=110)
        examples = html(part("examples", examples=EXAMPLES), js_on_load=script("choose"))
        with gr.Accordion("Filters and options", open=False):
            with gr.Row(elem_id="choices"):
                choices = [
                    gr.Dropdown(
                        label=name.replace("_", " "),
                        choices=choices_of(known),
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
        status = html("", elem_id="status", js_on_load=script("choose", "answered"))
        with gr.Row(elem_id="found", equal_height=False):
            with gr.Column(scale=3, min_width=0):
                hits = html(do.start(), elem_id="hits", js_on_load=script("choose", "insist"))
                with gr.Row(visible=False, elem_id="bar") as bar:
                    button = partial(gr.Button, size="md", min_width=120)
                    back, forth = button("← Previous"), button("Next →")
                    as_json, as_page = button("Save as JSON"), button("Save with pictures")
                saved = html("", js_on_load=script("save"), elem_id="saved")
            with gr.Column(scale=2, min_width=0, visible=False, elem_id="person") as panel:
                head = html("", js_on_load=script("opened"))
                heat = html("", js_on_load=script("choose", "words"))
                person = html("", js_on_load=script("choose"))
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


def script(*names: str) -> str:
    """What a component does in the browser: the scripts of these names, one after the other."""
    return "".join((TEMPLATES / f"{name}.js").read_text() for name in names)


def about_text() -> str:
    """What the page says about itself: a section of the documentation."""
    text = DOCUMENT.read_text() if DOCUMENT.is_file() else ""
    section = re.search(r"(?ms)^## Responsible use\n(.*?)(?=^## |\Z)", text)
    more = "Whoever runs this page has more in the program's docs/search.md."
    return (section[1].strip() + "\n\n" if section else "") + more
