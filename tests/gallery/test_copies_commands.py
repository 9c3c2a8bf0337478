"""search.py with a copy in Milvus: who is deleted is in neither, after every kill and failure."""

import pytest
from pymilvus import MilvusClient
from pymilvus.exceptions import MilvusException

import search
from gallery import commands_delete
from gallery.copies import Copy, stores
from gallery.page_question import Question
from gallery.service import Service
from gallery.store import Gallery, Store
from tests.helpers import run
from utils.errors import UserError


@pytest.fixture
def store(tmp_path):
    return f"milvus:{tmp_path / 'milvus.db'}#campus"


@pytest.fixture
def call(searched_copy, monkeypatch):
    """A command on a gallery of 26 people."""

    def call(command, *words):
        run(search.main, monkeypatch, command, "--gallery", searched_copy, *words)

    return call


@pytest.fixture
def copied(call, searched_copy, store):
    """The gallery's folder; the gallery has a copy at `store`."""
    call("index", "--store", store)
    return searched_copy


def ids(folder, where=lambda item: True):
    items = Gallery.open(folder, features=False).items.to_pylist()
    return sorted(item["id"] for item in items if where(item))


def ids_there(folder, store):
    return sorted(Copy(folder, store).milvus.others([]))


def of(identity):
    return lambda item: item["identity"] == identity


def someone(folder):
    identity = Gallery.open(folder).items["identity"][0].as_py()
    return identity, ids(folder, of(identity))


def assert_gone(folder, store, gone):
    left = ids(folder)
    assert ids_there(folder, store) == left and len(left) == 26 - len(gone) < 26
    assert not set(gone) & set(left)


def test_a_deletion_without_the_copy_is_refused(copied, call, store):
    identity, _ = someone(copied)
    with pytest.raises(
        UserError, match="has copies, .*: give --store .*milvus.db#campus; "
    ) as error:
        call("delete", "--identity", identity)
    assert "\n" not in str(error.value)
    assert len(ids(copied)) == len(ids_there(copied, store)) == 26


def test_who_is_deleted_is_in_neither(copied, call, store, capsys):
    identity, gone = someone(copied)
    call("delete", "--identity", identity, "--store", store)
    assert_gone(copied, store, gone)
    assert not Copy(copied, store).is_behind(Gallery.open(copied).manifest["parts"])
    capsys.readouterr()
    call("info")
    assert f"copies: {store}" in capsys.readouterr().out


@pytest.mark.parametrize("killed_in", ["milvus", "commit", "update"])
def test_after_a_kill_who_is_deleted_is_in_neither_or_the_same_command_ends_it(
    copied, call, store, monkeypatch, killed_in
):
    identity, gone = someone(copied)

    def killed(*words, **options):
        raise KeyboardInterrupt

    owner, name = {"milvus": (MilvusClient, "delete"), "commit": (Store, "commit"), "update": (Copy, "update")}[killed_in]  # fmt: skip
    command = ("delete", "--identity", identity, "--store", store)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            call(*command)
    there = set(ids_there(copied, store))
    assert (set(gone) <= there) if killed_in == "milvus" else not set(gone) & there
    if killed_in == "update":
        with pytest.raises(UserError, match="has nobody of these"):
            call(*command)
    else:
        assert set(gone) <= set(ids(copied))  # so that the command finds them
        call(*command)
    assert_gone(copied, store, gone)


def test_nobody_is_deleted_while_a_copy_cannot_be_changed(copied, call, store, monkeypatch):
    identity, gone = someone(copied)

    def fails(*words, **options):
        raise MilvusException(message="not today")

    with monkeypatch.context() as patch:
        patch.setattr(MilvusClient, "delete", fails)
        with pytest.raises(UserError, match="Milvus: not today"):
            call("delete", "--identity", identity, "--store", store)
    assert len(ids(copied)) == 26
    call("delete", "--identity", identity, "--store", store)
    assert_gone(copied, store, gone)


def test_who_left_the_gallery_before_leaves_the_copy_too(copied, call, store, capsys):
    identity, gone = someone(copied)
    with pytest.MonkeyPatch.context() as patch:  # as if an index had found the pictures gone
        patch.setattr(commands_delete, "stores", lambda folder: [])
        call("delete", "--identity", identity)
    assert len(ids_there(copied, store)) == 26
    with pytest.raises(UserError, match="has nobody of these"):
        call("delete", "--identity", identity, "--store", store)
    assert f"{store}: {len(gone)} people left it" in capsys.readouterr().out
    assert_gone(copied, store, gone)


def test_people_leave_all_copies_and_a_copy_can_be_given_up(copied, call, store, capsys):
    second = store.replace("campus", "second")
    call("index", "--store", second)
    identity, gone = someone(copied)
    with pytest.raises(UserError, match="give --store .*#campus .*#second;"):
        call("delete", "--identity", identity, "--store", store)
    call("delete", "--identity", identity, "--store", store, second)
    assert_gone(copied, store, gone)
    assert_gone(copied, second, gone)
    call("delete", "--copy", second)
    assert f"{second}: deleted; forgotten" in capsys.readouterr().out
    assert stores(copied) == [store] and len(ids(copied)) == 26 - len(gone)
    with pytest.raises(UserError, match="has no copy of"):
        Copy(copied, second)


def test_the_page_searches_the_copy_and_follows_the_gallery(copied, call, store):
    here, there = (Service(copied, device="cpu", store=place) for place in (None, store))
    question = Question("a man in red", where="not view = 'ground'", count=20)
    expected = [(hit.id, round(hit.score, 5)) for hit in here.answer(question).hits]
    assert [(hit.id, round(hit.score, 5)) for hit in there.answer(question).hits] == expected
    first = expected[0][0]
    call("delete", "--id", first, "--store", store)
    hits = [hit.id for hit in there.answer(question).hits]
    assert first not in hits and hits == [hit.id for hit in here.answer(question).hits]
