"""The search page in Chromium, as a visitor uses it."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image as PILImage

from gallery import page_server
from gallery.sent import MAX_BYTES
from gallery.service import Service
from tests.gallery.conftest import serving
from tests.gallery.made import path_of

SENTENCE = "a woman in a yellow dress with a black bag"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium (apt-get install chromium)"
)
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def service(searched):
    return Service(searched, device="cpu")


@pytest.fixture(scope="module")
def address(service):
    with serving(service) as url:
        yield url


@pytest.fixture
def visit(browser):
    """Open an address; in the end no page has had an error, or asked for what is elsewhere."""
    contexts, elsewhere, errors = [], [], []

    def call(url, size=DESK, **options):
        context = browser.new_context(viewport=size, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on(
            "request",
            lambda r: r.url.startswith((url, "data:", "blob:")) or elsewhere.append(r.url),
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        return page

    yield call
    for context in contexts:
        context.close()
    assert (elsewhere, errors) == ([], [])


def ask(page, sentence, where=None):
    if where is not None:
        if not page.get_by_label("Without").is_visible():
            page.get_by_role("button", name="Filters and options").click()
        page.get_by_label("Filter", exact=False).last.fill(where)
    box = page.get_by_label("Who is looked for?")
    box.fill(sentence)
    box.press("Enter")


def ranks(page):
    return page.locator(".hit .top b").all_inner_texts()


def title(page):
    return page.locator("#status b")


def wait_for_title(page, text):
    from playwright.sync_api import expect

    expect(title(page)).to_have_text(text)


def test_ask_filter_open_heat_map_more_like_this_and_pages(visit, address):
    page = visit(address)
    assert "26 people" in page.locator("#title").inner_text()
    ask(page, SENTENCE)
    wait_for_title(page, SENTENCE)
    everybody = ranks(page)
    assert everybody[:3] == ["1", "2", "3"]
    page.get_by_role("button", name="Filters and options").click()
    page.get_by_label("view", exact=True).click()
    page.get_by_role("option", name="aerial").click()
    page.get_by_label("Pictures of one moment are one hit").uncheck()
    page.get_by_role("button", name="Search", exact=True).click()
    page.wait_for_function("document.querySelectorAll('.hit').length == 12")
    assert all(text.startswith("aerial") for text in page.locator(".hit .facts").all_inner_texts())

    page.locator(".hit").nth(1).click()
    page.locator("#person figure img").nth(1).wait_for()
    whole = page.locator("#person figure img").nth(1).get_attribute("src")
    page.get_by_role("button", name="yellow dress", exact=True).click()
    page.locator(".chip[aria-pressed=true]", has_text="yellow dress").wait_for()
    page.wait_for_function(
        "s => document.querySelectorAll('#person figure img')[1]?.src != s", arg=whole
    )
    assert page.locator(".attributes tr").count() == 7
    page.get_by_role("button", name="In the other view").click()
    wait_for_title(page, "more like this person, in other views")
    assert all(text.startswith("ground") for text in page.locator(".hit .facts").all_inner_texts())
    assert not page.locator("#person").is_visible()
    page.locator(".hit").first.click()
    page.get_by_role("button", name="More like this").click()
    wait_for_title(page, "more like this person")
    assert page.get_by_label("Who is looked for?").input_value() == ""
    page.get_by_role("button", name="Back to: more like the person before").click()
    wait_for_title(page, "more like this person, in other views")
    page.get_by_role("button", name=f"Back to: {SENTENCE}").click()
    wait_for_title(page, SENTENCE)
    assert page.get_by_label("Who is looked for?").input_value() == SENTENCE
    page.wait_for_function("document.querySelectorAll('.hit').length == 12")

    ask(page, SENTENCE, where="frame_time is null")
    wait_for_title(page, SENTENCE)
    count = page.get_by_label("number input for Hits on a page")
    count.fill("6")
    count.press("Tab")
    page.get_by_role("button", name="Search", exact=True).click()
    page.wait_for_function("document.querySelectorAll('.hit').length == 6")
    assert page.get_by_role("button", name="Previous").is_disabled()
    page.get_by_role("button", name="Next").click()
    page.locator(".hit .top b", has_text="7").wait_for()
    assert ranks(page) == ["7", "8", "9", "10", "11", "12"]
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as JSON").click()
    saved = json.loads(download.value.path().read_text())
    assert [hit["rank"] for hit in saved["hits"]] == [7, 8, 9, 10, 11, 12]
    assert download.value.suggested_filename == "hits-2.json"
    with page.expect_download() as download:
        page.get_by_role("button", name="Save with pictures").click()
    assert download.value.path().read_text().count("<li") == 6
    page.get_by_role("button", name="Previous").click()
    page.locator(".hit .top b", has_text="1").first.wait_for()


def test_a_phone_shows_all_of_it_and_a_keyboard_is_enough(visit, address):
    page = visit(address, PHONE, color_scheme="dark", has_touch=True)
    page.locator(".chip").first.wait_for()
    for _ in range(12):  # to the second example
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.example") == "1":
            break
    page.keyboard.press("Enter")
    page.locator(".hit").first.wait_for()
    assert "grey shirt" in title(page).inner_text()
    assert page.get_by_label("Who is looked for?").input_value() == title(page).inner_text()
    page.locator(".hit").nth(2).focus()
    page.keyboard.press("Enter")
    page.locator("#person h2:focus").wait_for()
    page.locator("#person figure img").nth(1).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    panel, cards = page.locator("#person").bounding_box(), page.locator(".hits").bounding_box()
    assert panel["y"] < cards["y"] and panel["width"] > 340
    page.keyboard.press("Tab")
    page.keyboard.press("Escape")
    page.locator("#person").wait_for(state="hidden")
    assert page.evaluate("document.activeElement.querySelector('b').innerText") == "3"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", dark)[:3])) < 60


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_a_low_hit_opens_where_it_is_seen_and_a_new_answer_begins_at_its_title(
    visit, address, size
):
    page = visit(address, {**size, "height": 450})
    page.locator(".chip").first.wait_for()
    assert all(chip.bounding_box()["x"] + chip.bounding_box()["width"] <= size["width"] for chip in page.locator(".examples .chip").all())  # fmt: skip
    ask(page, SENTENCE)
    page.locator(".hit").nth(3).wait_for()
    last = page.locator(".hit").last
    last.scroll_into_view_if_needed()
    page.wait_for_function("scrollY > 100")
    last.click()
    seen = "s => { const b = document.querySelector(s)?.getBoundingClientRect(); return b && b.top >= -1 && b.bottom <= innerHeight + 1; }"
    page.wait_for_function(seen, arg="#person h2")
    if size is DESK:
        page.wait_for_function(seen, arg="#hits [aria-current]")
    page.get_by_role("button", name="More like this").click()
    page.get_by_role("button", name="Back to").wait_for()
    page.wait_for_function(seen, arg="#status b")


def test_the_last_row_of_24_hits_is_full(visit, address):
    page = visit(address)
    ask(page, SENTENCE)
    page.locator(".hit").first.wait_for()
    columns = (
        "getComputedStyle(document.querySelector('.hits')).gridTemplateColumns.split(' ').length"
    )
    for width in (340, 390, 700, 900, 1200, 1900):
        page.set_viewport_size({"width": width, "height": 900})
        assert 24 % page.evaluate(columns) == 0, width
    page.locator(".hit").first.click()
    page.locator("#person h2").wait_for()
    for width in (900, 1200):
        page.set_viewport_size({"width": width, "height": 900})
        assert 24 % page.evaluate(columns) == 0, width


def test_a_page_that_is_open_does_not_make_ctrl_c_noisy(browser, service, capfd):
    # Not by `visit`: what the page still loads when the server ends is an error in the page.
    with browser.new_page() as page, serving(service) as url:
        page.goto(url)
        ask(page, "anybody")
    assert "Traceback" not in (errors := capfd.readouterr().err) and "Cancel" not in errors


def test_of_quick_clicks_the_last_one_counts(visit, address):
    page = visit(address)
    ask(page, SENTENCE)
    page.locator(".hit").nth(3).wait_for()
    for n in range(4):
        page.locator(".hit").nth(n).click()
    last = page.locator(".hit").nth(3).get_attribute("data-id")
    for part in ("h2", ".pair"):
        page.locator(f"#person {part}[data-of='{last}']").wait_for()


def test_a_picture_of_ones_own_with_and_without_a_sentence(visit, address, service, tmp_path):
    page = visit(address)
    file, remove = page.locator("#sent input"), page.get_by_label("remove the picture")
    file.set_input_files(path_of(service.now().gallery, 4))
    wait_for_title(page, "like your picture")
    assert page.locator(".hit .top span").first.inner_text() == "1.000"
    page.locator("#sent button:focus").wait_for()
    ask(page, SENTENCE)
    wait_for_title(page, f"{SENTENCE}, like your picture")
    page.locator(".hit").first.click()
    page.get_by_role("button", name="yellow dress", exact=True).wait_for()
    page.get_by_role("button", name="More like this").click()
    wait_for_title(page, "more like this person")
    assert page.locator("#sent img").count() == 0
    page.get_by_role("button", name="Back to").click()
    wait_for_title(page, f"{SENTENCE}, like your picture")
    remove.click()
    wait_for_title(page, SENTENCE)
    page.locator("#sent input:focus").wait_for()

    noise = np.random.default_rng(0).integers(0, 256, (1400, 900, 3), np.uint8)
    large = tmp_path / "large.png"
    PILImage.fromarray(noise).save(large)
    assert large.stat().st_size > 3 * MAX_BYTES
    file.set_input_files(large)
    wait_for_title(page, f"{SENTENCE}, like your picture")
    assert page.locator("#sent img").evaluate("image => image.naturalHeight") == 320
    remove.click()
    for content in (b"no picture", b"no picture" * (MAX_BYTES // 5)):
        broken = {"name": "x.png", "mimeType": "image/png", "buffer": content}
        file.set_input_files([broken])
        message = "cannot be read" if len(content) < MAX_BYTES else "more than 1 MB"
        page.locator("#status .problem", has_text=message).wait_for()
        assert page.locator(".hit").count() == 0 and page.locator("#sent img").count() == 0


def test_what_cannot_be_asked_is_said(visit, address):
    page = visit(address)
    for sentence, where, message in (
        ("", None, "Say who is looked for, or add a picture."),
        ("x" * 2000, None, "The sentence has 2000 characters"),
        ("a man", "path = '../../etc/passwd", "'"),
        ("a man", "pth = 'x'", "path"),
    ):
        ask(page, sentence, where)
        page.locator("#status .problem", has_text=message).wait_for()
        assert page.locator(".hit").count() == 0
    for where in ("path = '../../etc/passwd'", "path like '/etc/%'"):
        ask(page, "../../etc/passwd", where)
        page.get_by_text("The filters keep nobody.").wait_for()
        wait_for_title(page, "../../etc/passwd")


def test_scripts_in_sentences_and_paths_are_text(visit, address):
    page = visit(address)
    evil = "<script>document.title='hacked'</script><img src=x onerror=document.title='hacked'>{{value}}${document.title='hacked'}"
    ask(page, evil, "left is not null")
    wait_for_title(page, evil)
    assert page.locator(".hit").count() == 2
    page.locator(".hit").first.click()
    page.locator("#person .whole .box").wait_for()
    assert "onerror=document.title" in page.locator("#person .about").inner_text()
    page.locator("#person figure img").nth(1).wait_for()
    assert page.title() == "Find a person" and page.locator("img[src=x]").count() == 0


def test_a_changed_gallery_leaves_the_page_up(visit, searched_copy, monkeypatch):
    import search
    from tests.helpers import run

    service = Service(searched_copy, device="cpu")
    with serving(service) as url:
        page = visit(url)
        ask(page, SENTENCE)
        page.locator(".hit").first.wait_for()
        ids = [hit.get_attribute("data-id") for hit in page.locator(".hit").all()]
        run(search.main, monkeypatch, "delete", "--gallery", searched_copy, "--id", ids[0])
        page.locator(".hit").first.click()
        page.locator("#person .problem", has_text="no longer in the gallery").wait_for()
        page.get_by_role("button", name="close").click()
        items = service.now().gallery.items["id"].to_pylist()
        run(search.main, monkeypatch, "delete", "--gallery", searched_copy, "--id", *items)
        ask(page, "anybody")
        page.get_by_text("Nobody is in this gallery yet").wait_for()
        page.get_by_text("0 people").wait_for()
        page.reload()
        page.get_by_text("0 people").wait_for()


def test_a_password_is_asked_for(visit, service, monkeypatch):
    monkeypatch.setattr(page_server, "WRONG_SECONDS", 0)
    with serving(service, "a long password", ()) as url:
        page = visit(url)
        for password in ("wrong", "a long password"):
            page.get_by_label("username").fill("me")
            page.get_by_label("password").fill(password)
            page.get_by_role("button", name="Login").click()
            if password == "wrong":
                page.get_by_text("Incorrect credentials").wait_for()
        ask(page, SENTENCE)
        page.locator(".hit").first.wait_for()
