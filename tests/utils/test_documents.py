import json

import pytest

from tests.helpers import ROOT
from tools._reproduce_table import read_table
from utils.attributes import read_attributes
from utils.config import read_preset
from utils.documents import load_yaml, read_json_file
from utils.errors import UserError
from utils.tokenizer import text_problem


def test_a_duplicate_key_in_a_preset_is_refused_with_both_lines(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("lr: 0.1\nseed: 1\nlr: 0.2\n")
    with pytest.raises(UserError, match=r"p.yaml: not readable as YAML: the key 'lr' appears twice \(lines 1 and 3\)"):  # fmt: skip
        read_preset(path)
    path.write_text("title: t\nbase: b.yaml\nrows: []\nrows: []\n")
    with pytest.raises(UserError, match="p.yaml: .* the key 'rows' appears twice"):
        read_table(str(path))
    path.write_text("base: q.yaml\nlr: 0.2\n")
    (tmp_path / "q.yaml").write_text("lr: 0.1\nseed: 3\n")
    assert read_preset(path) == {"lr": 0.2, "seed": 3}  # a preset may override its base


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_preset_is_read_with_and_without_a_byte_order_mark(encoding, tmp_path):
    (tmp_path / "p.yaml").write_bytes("name: é\n".encode(encoding))
    assert read_preset(tmp_path / "p.yaml") == {"name": "é"}


def test_keys_are_compared_as_values_within_one_mapping():
    assert load_yaml(b"{a: {x: 1}, b: {x: 2}}") == {"a": {"x": 1}, "b": {"x": 2}}
    assert load_yaml(b"b: &b {x: 1, y: 2}\nc:\n  <<: *b\n  x: 3")["c"] == {"x": 3, "y": 2}
    assert load_yaml(b"t: !!python/tuple [1, 2]") == {"t": [1, 2]}
    assert load_yaml(b"{1: a, '1': b}") == {1: "a", "1": "b"}
    with pytest.raises(Exception, match="the key 1 appears twice"):
        load_yaml(b"{1: a, 0x1: b}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"), ("  \n", "has no words"), ("&nbsp;", "has no words"), ("\t\x00", "has no words"),
        ("&amp;nbsp;", "has no words"), ("\x1b[36m", "has no words"), ("<start_of_text>", "has no words"),
        ("\ufeff", "has no words"), (3, "is 3, not text"), (None, "is None, not text"),
        ("a man \udc80", "contains half a character"), ("a man", ""), ("男", ""), ("!", ""), ("&", ""),
        ("a \N{GRINNING FACE}", ""), ("<b>", ""),
    ],
)  # fmt: skip
def test_a_text_that_is_no_sentence_is_described(text, problem):
    assert (problem in text_problem(text)) if problem else text_problem(text) == ""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("is male.", "is male.\n      - '&nbsp;'", r"attribute 1 .gender.: class male: the sentence '&nbsp;' has no words"),
        ("is male.", "is male.\n      - ' '", "class male: the sentence ' ' has no words"),
        ("is male.", "is male.\n      - 3", "class male: the sentence is 3, not text"),
        ("is male.", "is female.", "classes male and female have the same sentence"),
        ("attribute: age", "attribute: gender", r"attribute 2 .gender.: an attribute before it has the same name"),
    ],
)  # fmt: skip
def test_empty_sentences_and_duplicates_are_refused(old, new, message, tmp_path):
    text = (ROOT / "configs/attributes.yaml").read_text()
    assert old in text
    (tmp_path / "a.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        read_attributes(tmp_path / "a.yaml")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_is_read_with_and_without_a_byte_order_mark(encoding, tmp_path):
    (tmp_path / "a.json").write_bytes(json.dumps({"é": ["a"]}, ensure_ascii=False).encode(encoding))
    assert read_json_file(tmp_path / "a.json") == {"é": ["a"]}


def test_a_repeated_key_in_one_object_is_refused_with_its_name(tmp_path):
    path = tmp_path / "a.json"
    for text in ('[{"id": 1, "split": "train", "id": 1}]', '{"a": {"id": 1, "id": 2}}'):
        path.write_text(text)
        with pytest.raises(
            UserError, match=r"a.json: malformed JSON: the key 'id' appears twice in .'id"
        ):
            read_json_file(path)
    path.write_text('[{"id": 1}, {"id": 1}]')
    assert read_json_file(path) == [{"id": 1}, {"id": 1}]
