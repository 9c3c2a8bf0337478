import pytest

from tests.helpers import ROOT
from utils.attributes import check_labels, read_attributes
from utils.errors import UserError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- attribute: x", "attribute 1: expected the keys"),
        ("[]", "expected a list of attributes"),
        ("- attribute: x\n  classes: {a: [s]}", "x.: needs two classes"),
        ("- attribute: x\n  classes: {a: [s], b: []}", "class b has no sentences"),
        ("- attribute: [", "not readable as YAML"),
    ],
)
def test_a_bad_sentence_file_names_its_entry(text, message, tmp_path):
    path = tmp_path / "attributes.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_attributes(path)


def test_the_shipped_file_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_attributes("configs/attributes.yaml")[0].name == "gender"


def test_labels_without_sentences_are_refused():
    attributes = read_attributes(ROOT / "configs/attributes.yaml")
    classes = {a.name: len(a.classes) for a in attributes}
    check_labels(attributes, classes, "AGDataAttr", "a.yaml")
    for wrong in ({**classes, "age": 4}, {"gender": 2}, dict(reversed(classes.items()))):
        with pytest.raises(UserError, match="a.yaml: has sentences for gender .2 classes., age"):
            check_labels(attributes, wrong, "AGDataAttr", "a.yaml")
