"""The search page without a browser: what it answers, refuses, and keeps to itself."""

import base64
import io
import json
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from PIL import Image as PILImage

import search
from gallery import commands_serve, page_server
from gallery.page import build
from gallery.page_handlers import EXAMPLES, PAST, Handlers, example
from gallery.page_question import MAX_HITS, MAX_SENTENCE, Question
from gallery.sent import MAX_BYTES
from gallery.service import Service
from gallery.store import Gallery
from tests.gallery.conftest import NASTY, serving
from tests.gallery.made import path_of
from tests.helpers import run
from tools import askers
from utils.errors import UserError

SENTENCE = "a woman in a yellow dress with a black bag"


@pytest.fixture(scope="module")
def service(searched):
    return Service(searched, device="cpu")


@pytest.fixture(scope="module")
def do(service):
    return Handlers(service, list(service.now().choices()))


def event(**data):
    return SimpleNamespace(_data=data)


def boxed(service):
    """The ids of the two people in one picture."""
    items = service.now().gallery.items
    return [i for i, path in zip(items["id"].to_pylist(), items["path"].to_pylist(), strict=True) if NASTY in path]  # fmt: skip


def test_hits_are_those_of_find(service, searched, monkeypatch, capsys):
    hits = service.answer(Question(SENTENCE, minus="a hat", where="view = 'aerial'", count=5)).hits
    run(search.main, monkeypatch, "find", SENTENCE, "--minus", "a hat", "--where", "view = 'aerial'", "--top", 5, "--gallery", searched, "--json", "--device", "cpu")  # fmt: skip
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[:1] == "{"]
    assert [hit.id for hit in hits] == [hit["item"]["id"] for hit in found]
    assert [hit.score for hit in hits] == pytest.approx([hit["score"] for hit in found])


def test_pages_are_the_ranking_in_pieces(service):
    everything = Question(SENTENCE, count=96, collapse=False)
    whole = [hit.id for hit in service.answer(everything).hits]
    question = Question(SENTENCE, count=10, collapse=False)
    pages = [service.answer(question, n) for n in range(3)]
    assert [hit.id for p in pages for hit in p.hits] == whole and len(whole) == 26
    assert [p.more for p in pages] == [True, True, False]
    assert [bool(p.sure) for p in pages] == [True, False, False]
    assert service.answer(question, 7).hits == []


def test_chosen_values_filter(service):
    choices = service.now().choices()
    assert choices["view"] == ["aerial", "ground"] and "gender" in choices
    for column in ("view", "gender"):
        value = choices[column][0]
        hits = service.answer(Question(SENTENCE, choices=((column, value),))).hits
        assert hits and {hit.item[column] for hit in hits} == {value}
    nobody = Question(SENTENCE, choices=(("view", "'aerial' or '1'='1'"),))
    assert service.answer(nobody).hits == []


def test_a_text_of_a_filter_that_nobody_has_is_told_with_those_that_there_are(service, do):
    where = ("view = 'Air'", "view = 'aerial' and id = 1")
    told = [do.ask(SENTENCE, "", w, 6, True, None, *[""] * len(do.columns))[3] for w in where]
    assert "nobody. No view is &#39;Air&#39;; there are aerial, ground." in told[0]
    assert "nobody.<" in told[1]


def test_more_like_this_leaves_the_person_out_and_can_ask_for_other_views(service):
    aerial = service.answer(Question(SENTENCE, where="view = 'aerial'")).hits[0]
    alike = service.answer(Question(like=aerial.id, collapse=False, count=96)).hits
    assert aerial.id not in [hit.id for hit in alike] and len(alike) == 25
    other = service.answer(Question(like=aerial.id, other_view=True)).hits
    assert {hit.item["view"] for hit in other} == {"ground"}
    with pytest.raises(UserError, match="view of this person is not known"):
        service.answer(Question(like=boxed(service)[0], other_view=True))


def test_the_way_back_from_more_like_this(service, do):
    asked = do.ask(SENTENCE, "a hat", "", 6, True, None, *[""] * len(do.columns))
    question, number, *_ = do.forth(asked[0], 0)
    assert "data-do=" not in asked[2] and number == 1
    first, second = (hit.id for hit in service.answer(question, 1).hits[:2])
    like = do.act(question, number, first, event(do="like"))
    assert like[:3] == ["", "", None]  # the fields show what is asked: no sentence
    assert f'<img src="{service.cards([first])[0]}"' in like[6]
    assert "more like this person" in like[6] and str(first) not in like[6]
    assert f"Back to: {SENTENCE}, without a hat" in like[6]
    saved = do.save("json", like[4], 0).split("base64,")[1].split('"')[0]
    assert json.loads(base64.b64decode(saved))["question"] == {"like": first, "count": 6, "collapse": True}  # fmt: skip
    liker = do.act(like[4], 0, second, event(do="like"))
    assert "Back to: more like the person before" in liker[6]
    back = do.act(liker[4], 0, None, event(do="back"))
    assert back[4] == like[4]
    back = do.act(back[4], 0, None, event(do="back"))
    assert back[:3] == [SENTENCE, "a hat", None] and back[4:6] == [question, 1]
    nowhere = do.act(question, 1, None, event(do="back"))
    assert isinstance(nowhere[0], dict) and isinstance(nowhere[4], dict)  # nothing changes
    for _ in range(50):
        liker = do.act(liker[4], 0, second, event(do="like"))
    assert len(liker[4].before) == PAST


def test_an_answer_says_how_many_people_there_are_now(searched_copy, monkeypatch):
    service = Service(searched_copy, device="cpu")
    do = Handlers(service, [])
    assert "26 people" in do.header()
    person = service.now().gallery.items["id"][0].as_py()
    run(search.main, monkeypatch, "delete", "--gallery", searched_copy, "--id", person)
    assert "25 people" in do.ask(SENTENCE, "", "", 6, True, None)[-1]


def test_a_card_has_the_name_of_its_file(service, do):
    path = service.now().item(0)["path"]
    cards = do.ask(SENTENCE, "", f"path = '{path}'", 6, True, None, *[""] * len(do.columns))[3]
    assert f"<bdi>{Path(path).name}</bdi>" in cards


def data_url(content):
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


@pytest.mark.parametrize(("sentence", "minus"), [("", ""), (SENTENCE, ""), ("", "a hat"), (SENTENCE, "a hat")])  # fmt: skip
def test_hits_like_a_picture_that_is_sent_are_those_of_find(sentence, minus, service, searched, monkeypatch, capsys):  # fmt: skip
    path = Path(path_of(service.now().gallery, 4))
    sent = service.take(data_url(path.read_bytes()))
    assert sent.small.startswith("data:image/jpeg;base64,")
    hits = service.answer(Question(sentence, minus, sent=sent, count=5)).hits
    words = [sentence] * bool(sentence) + ["--minus", minus] * bool(minus) + ["--like", path]
    run(search.main, monkeypatch, "find", *words, "--top", 5, "--gallery", searched, "--json", "--device", "cpu")  # fmt: skip
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[:1] == "{"]
    assert [hit.id for hit in hits] == [hit["item"]["id"] for hit in found]
    assert [hit.score for hit in hits] == pytest.approx([hit["score"] for hit in found], abs=1e-4)


def png(width, height):
    buffer = io.BytesIO()
    PILImage.new("L", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (None, "no content"),
        (5, "no content"),
        ("", "no content"),
        ("data:;base64,", "no content"),
        ("data:image/png;base64,$$$", "no content"),
        ("/etc/passwd", "no content"),
        ("file:///etc/passwd", "no content"),
        (data_url(b"x" * (MAX_BYTES + 1)), "more than 1 MB"),
        (data_url(b"x"), "your picture: the image cannot be read: it is not one of JPEG"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "it is not one of JPEG"),
        (data_url(png(40, 80)[:-30]), "your picture: the image cannot be read"),
        (
            data_url(png(2049, 2048)),
            "2049x2048 is over the limit of 4194304 pixels. Choose another",
        ),
        (data_url(png(30_001, 9)), "a side is over the limit"),
    ],
)
def test_a_picture_that_cannot_be_read_has_a_message(address, message, service, do):
    with pytest.raises(UserError, match=message):
        service.take(address)
    answered = do.send(event(picture=address or ""), SENTENCE, "", "", 24, True, None, *[""] * len(do.columns))  # fmt: skip
    assert answered[0] is None and answered[2] is None and "Add a picture" in answered[1]
    assert message.split(": ")[-1] in answered[4] and "<img" not in answered[5]


def test_a_picture_stays_in_the_question_until_it_is_removed(service, do, searched_copy):
    fields = ["", "", "", 6, True, None, *[""] * len(do.columns)]
    address = data_url(Path(path_of(service.now().gallery, 4)).read_bytes())
    sent, shown, question, *answered = do.send(event(picture=address), *fields)
    assert sent.small in shown and "remove the picture" in shown
    assert "like your picture" in answered[1] and answered[2].count("<li") == 6
    assert do.forth(question, 0)[0] == question
    saved = do.save("json", question, 0).split("base64,")[1].split('"')[0]
    assert json.loads(base64.b64decode(saved))["question"] == {"count": 6, "collapse": True, "picture": True}  # fmt: skip
    identifier = service.answer(question).hits[0].id
    assert service.words(question) == [] and do.look(question, event(id=str(identifier)))[0]
    with_words = do.ask(SENTENCE, "a hat", *fields[2:5], sent, *fields[6:])
    assert f"{SENTENCE}, like your picture, without a hat" in with_words[2]
    removed = do.send(event(), SENTENCE, *fields[1:])
    assert removed[0] is None and "Add a picture" in removed[1] and removed[2] == Question(SENTENCE, count=6)  # fmt: skip
    assert "Describe a person" in do.send(event(), *fields)[5]
    with pytest.raises(UserError, match="another encoder now: choose the picture again"):
        service.answer(replace(question, sent=replace(sent, encoder="other")))


@pytest.mark.parametrize(
    ("question", "number", "message"),
    [
        (Question(), 0, "Say who"),
        (Question("x" * (MAX_SENTENCE + 1)), 0, "at most 300"),
        (Question("x", minus="x" * 2000), 0, "2000 characters"),
        (Question("x", where="path = 'a' union select"), 0, "union"),
        (Question("x", where="__class__ = 'a'"), 0, "__class__"),
        (Question("x", choices=(("nothing", "a"),)), 0, "nothing"),
        (Question("x", count=10**9), 0, "1 to 96"),
        (Question("x", count=0), 0, "1 to 96"),
        (Question("x"), MAX_HITS, "are shown"),
        (Question("x"), -1, "are shown"),
        (Question(like=5), 0, "no longer in the gallery"),
    ],
)
def test_what_cannot_be_asked_has_a_message(service, question, number, message):
    with pytest.raises(UserError, match=message):
        service.answer(question, number)


def test_a_person_is_shown_in_the_whole_picture_with_its_box(service):
    person = service.person(boxed(service)[1])
    assert person.box == (50, 25, 50, 50) and person.picture and person.whole and not person.problem
    hit = service.answer(Question(SENTENCE, where="view = 'aerial'")).hits[0]
    person = service.person(hit.id)
    assert not person.whole and person.picture
    assert [name for name, _, score in person.attributes if score == 100] == list(service.now().gallery.manifest["attributes"])  # fmt: skip
    guesses = service.person(boxed(service)[0]).attributes
    assert guesses and all(0 < score < 100 for _, _, score in guesses)


def test_heat_maps_differ_by_word_and_other_words_are_refused(service):
    question, identifier = Question(SENTENCE), boxed(service)[0]
    assert service.words(question) == [SENTENCE, "woman", "yellow dress", "black bag"]
    maps = [service.heat(question, identifier, n) for n in range(4)]
    assert len(set(maps)) == 4 and all(m.startswith("data:image/jpeg;base64,") for m in maps)
    for number in (-1, 4):
        with pytest.raises(UserError, match="no such words"):
            service.heat(question, identifier, number)
    assert service.words(Question(like=identifier)) == []


def test_the_gallerys_changes_are_seen_at_once(searched_copy, monkeypatch, capsys):
    service = Service(searched_copy, device="cpu")
    question = Question(SENTENCE, collapse=False, count=96)
    hits = service.answer(question).hits
    encoder, person = service.now().encoder, hits[0].item["identity"]
    run(search.main, monkeypatch, "delete", "--gallery", searched_copy, "--identity", person)
    left = [hit for hit in service.answer(question).hits]
    assert len(left) == len(Gallery.open(searched_copy).items) < len(hits)
    assert person not in [hit.item["identity"] for hit in left]
    assert service.now().encoder is encoder  # not loaded again
    with pytest.raises(UserError, match="no longer in the gallery"):
        service.person(hits[0].id)
    assert service.cards([hits[0].id]) == [""]
    kept = searched_copy.rename(f"{searched_copy}.old")
    do = Handlers(service, [])
    for asked in (do.answer(question, 0), do.nothing("")):
        assert all("gallery" not in text for text in asked[3:] if isinstance(text, str))
    with pytest.raises(UserError, match=r"^The gallery cannot be read now. Ask again later.$"):
        service.answer(question)
    assert "no gallery" in capsys.readouterr().err  # for whoever runs the page
    kept.rename(searched_copy)
    assert service.answer(question).hits


def test_a_gallery_without_anybody_says_so(searched_copy, monkeypatch):
    everybody = Gallery.open(searched_copy).items["id"].to_pylist()
    run(search.main, monkeypatch, "delete", "--gallery", searched_copy, "--id", *everybody)
    service = Service(searched_copy, device="cpu")
    do = Handlers(service, list(service.now().choices()))
    assert do.columns == []
    for text in (do.ask(SENTENCE, "", "", 24, True, None)[3], do.start(), do.newest()[1]):
        assert "Nobody is in this gallery yet: python search.py index" in text
    build(service)


def test_a_picture_that_has_vanished_leaves_a_placeholder_and_no_path(service, do, capsys):
    hit = service.answer(Question(SENTENCE, where="view = 'aerial'")).hits[-1]
    path = os.path.join(service.now().root, hit.item["path"])
    service.now().card.cache_clear()
    shutil.move(path, f"{path}.gone")
    try:
        answered = do.ask(SENTENCE, "", "view = 'aerial'", 24, True, None, *[""] * len(do.columns))
        assert (
            "no picture" in answered[3]
            and answered[3].count("<img") == answered[3].count("<li") - 1
        )
        opened = do.look(answered[0], event(id=str(hit.id)))
        assert 'role="alert"' in opened[2] and "<img" not in opened[3]
        assert "its file was moved, deleted or damaged" in opened[2]
        assert path in capsys.readouterr().err  # for whoever runs the page
        heat = do.warm(answered[0], hit.id)
        with pytest.raises(UserError) as error:
            service.heat(answered[0], hit.id, 0)
        saved = base64.b64decode(do.save("html", answered[0], 0).split("base64,")[1].split('"')[0]).decode()  # fmt: skip
        assert "<img" not in heat and "no picture" in saved
        shown = [text for text in (*answered, *opened) if isinstance(text, str)]
        assert service.now().root not in "".join([*shown, heat, saved, str(error.value)])
    finally:
        shutil.move(f"{path}.gone", path)
    assert "no picture" not in do.answer(answered[0], 0)[3]


def test_texts_of_visitors_and_pictures_are_shown_as_text(service, do):
    evil = "<script>alert(1)</script> {{value}} ${alert(1)} \ud800 \u202e\n x"
    columns = [""] * len(do.columns)
    texts = do.ask(evil, evil, "", 96, False, None, *columns) + do.look(None, event(id=str(boxed(service)[0])))  # fmt: skip
    texts += [do.warm(Question(evil), boxed(service)[0]), do.ask(evil, "", f"a = {evil}", 9, True, None, *columns)[2]]  # fmt: skip
    shown = "".join(text for text in texts if isinstance(text, str))
    assert "&lt;script&gt;" in shown and "<script" not in shown
    assert "&lt;b&gt;gate" in shown and "<b>gate" not in shown
    assert "&lt;img src=x" in shown and "<img src=x" not in shown
    assert "\\u202e" in shown and "\u202e" not in shown


@pytest.mark.parametrize("data", [{}, {"id": "../../etc/passwd"}, {"id": 5}, {"id": "-1"}, {"id": "9" * 19}, {"id": "x" * 10**5}, {"id": None}])  # fmt: skip
def test_a_button_that_lies_finds_nobody(do, data):
    opened = do.look(None, event(**data))
    assert opened[0] is None and "no longer in the gallery" in opened[2]
    assert do.look(None, SimpleNamespace(_data="text"))[0] is None
    assert example(event(example=str(data.get("id")))) in EXAMPLES


def test_files_to_save_have_the_hits_of_the_page(do):
    asked = do.ask(SENTENCE, "", "", 6, True, None, *[""] * len(do.columns))[0]
    contents = []
    for kind in ("json", "html"):
        link = do.save(kind, asked, 1)
        assert f'download="hits-2.{kind}"' in link
        contents.append(base64.b64decode(link.split("base64,")[1].split('"')[0]).decode())
    saved = json.loads(contents[0])
    assert saved["question"]["sentence"] == SENTENCE
    assert [hit["rank"] for hit in saved["hits"]] == [7, 8, 9, 10, 11, 12]
    assert contents[1].count("<li") == 6 and SENTENCE in contents[1]
    assert "Ask first" in do.save("json", None, 0)


def test_only_a_password_opens_the_page_to_other_machines(tmp_path, monkeypatch):
    monkeypatch.delenv("SEARCH_PASSWORD", raising=False)
    serve = ("serve", "--gallery", tmp_path)
    with pytest.raises(UserError, match="--host 0.0.0.0: others could see"):
        run(search.main, monkeypatch, *serve, "--host", "0.0.0.0")
    (tmp_path / "short").write_text("secret\n")
    with pytest.raises(UserError, match="at least 12 characters"):
        run(search.main, monkeypatch, *serve, "--host", "::", "--password_file", tmp_path / "short")
    with pytest.raises(UserError, match="No such file"):
        commands_serve.read_password(tmp_path / "none")
    (tmp_path / "long").write_text("a long password \nnote\n")
    assert commands_serve.read_password(tmp_path / "long") == "a long password "
    monkeypatch.setenv("SEARCH_PASSWORD", "another password")
    assert commands_serve.read_password(None) == "another password"
    assert [commands_serve.is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.org", "::")] == [True] * 3 + [False] * 3  # fmt: skip


def test_a_port_in_use_is_said(service, tmp_path, monkeypatch):
    folder = service.now().gallery.folder
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=f"--port {port}: Address already in use.*; --port 0 is"
        ):
            run(search.main, monkeypatch, "serve", "--gallery", folder, "--port", port)
        with pytest.raises(UserError, match="no gallery"):  # that is said first
            run(search.main, monkeypatch, "serve", "--gallery", tmp_path, "--port", port)
    with pytest.raises(UserError, match="--port 99999: must be 0 to 65535"):
        run(search.main, monkeypatch, "serve", "--gallery", folder, "--port", 99999)


def test_port_0_is_any_free_one_and_the_address_names_it(service, monkeypatch, capsys):
    listened = []
    monkeypatch.setattr(
        page_server, "serve", lambda service, listening, *_: listened.append(listening)
    )
    folder = service.now().gallery.folder
    run(search.main, monkeypatch, "serve", "--gallery", folder, "--port", 0, "--device", "cpu")
    with listened[0] as listening:
        assert f"http://127.0.0.1:{listening.getsockname()[1]} (" in "".join(capsys.readouterr())


def test_connections_send_the_end_of_an_answer_at_once():
    with (
        commands_serve.listen("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()),
        listening.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.fixture(scope="module")
def served(service):
    """Addresses of the page without and with a password."""
    with serving(service) as open_one, serving(service, "a long password", ()) as closed_one:
        yield open_one, closed_one


def test_the_server_gives_out_no_file_and_no_api(served, service, tmp_path):
    secret = tmp_path / "secret.jpg"
    PILImage.new("RGB", (9, 9)).save(secret)
    shown = path_of(service.now().gallery, 0)
    paths = [
        f"/gradio_api/{file}{path}"
        for file in ("file=", "file/", "proxy=", "stream/")
        for path in ("/etc/passwd", "etc/passwd", "../../etc/passwd", "..%2f..%2fetc%2fpasswd", secret, shown, "https://example.org/")
    ]  # fmt: skip
    paths += [
        "/gradio_api/upload", "/gradio_api/upload?upload_id=1", "/gradio_api/info", "/gradio_api/openapi.json",
        "/gradio_api/runs", "/gradio_api/deep_link?session_hash=x", "/monitoring", "/docs", "/openapi.json",
        "/gradio_api/call/ask", "/gradio_api/run/ask", "/gradio_api/component_server", "/static/../../etc/passwd",
        "/assets/%2e%2e/%2e%2e/routes.py", "/svelte/x", "/custom_component/1/a/b/c", "/gradio_api/dev/reload",
    ]  # fmt: skip
    with httpx.Client(base_url=served[0]) as client:
        for path in paths:
            for method in ("GET", "POST"):
                response = client.request(method, path)
                assert (response.status_code, response.content) == (404, b""), path
        start = client.get("/")
        assert start.status_code == 200 and "default-src 'self'" in start.headers["content-security-policy"]  # fmt: skip
        config = client.get("/config").json()
        assert {d["api_visibility"] for d in config["dependencies"]} == {"private"}
        assert service.now().root not in start.text
        assert client.post("/login", content=b"x" * 10**5).status_code == 413
        assert client.post("/gradio_api/queue/join", content=b"x" * 10**6).status_code == 422
        assert client.post("/gradio_api/queue/join", content=b"x" * 2 * 10**6).status_code == 413
        assert client.get("/", headers={"host": "example.org"}).status_code == 421


def test_many_askers_are_all_answered(served, monkeypatch, capsys):
    run(askers.main, monkeypatch, served[0], "--askers", 6, "--seconds", 0.2)
    *_, values, _ = capsys.readouterr().out.strip().splitlines()
    count, answers, *_, errors = [value.strip() for value in values.strip("|").split("|")]
    assert (count, errors) == ("6", "0") and int(answers) >= 6
    with pytest.raises(UserError, match="not a search page without a password"):
        run(askers.main, monkeypatch, served[1])


def test_a_page_with_a_password_is_closed_without_it(served, monkeypatch):
    monkeypatch.setattr(page_server, "WRONG_SECONDS", 0)
    ask = {"fn_index": 0, "data": [], "session_hash": "x"}
    with httpx.Client(base_url=served[1]) as client:
        assert "yellow dress" not in client.get("/").text
        assert client.get("/config").status_code == 401
        assert "Type any name, and the password." in client.get("/").text
        assert client.post("/gradio_api/queue/join", json=ask).status_code == 401
        assert client.get("/gradio_api/queue/data?session_hash=x").status_code == 401
        wrong = client.post("/login", data={"username": "me", "password": "a wrong password"})
        assert wrong.status_code == 400 and client.get("/config").status_code == 401
        client.post("/login", data={"username": "me", "password": "a long password"})
        assert client.get("/config").status_code == 200
