import json
import shutil

import pytest
from PIL import Image as PILImage

import tools.check_dataset as tool
from tests.helpers import run


def check(monkeypatch, name, root, *more):
    """Exit status of the tool."""
    with pytest.raises(SystemExit) as stopped:
        run(tool.main, monkeypatch, "--dataset_name", name, "--root_dir", root, "--num_workers", 0, *more)  # fmt: skip
    return stopped.value.code


@pytest.fixture
def copy(rendered, tmp_path):
    return shutil.copytree(rendered("CUHK-PEDES"), tmp_path / "set")


def change(root, alter):
    entries = json.loads((root / "reid_raw.json").read_text())
    alter(entries)
    (root / "reid_raw.json").write_text(json.dumps(entries))
    return entries


def test_a_good_data_set_passes_with_its_counts(mini_root, monkeypatch, capsys):
    assert check(monkeypatch, "AGDataAttr", mini_root) == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith("| train"))
    assert [cell.strip() for cell in row.split("|")[2:6]] == ["8", "16", "16", "16"]
    assert "| gender    | male" in shown and "pass" in shown and "numbered per split" in shown


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("AERI-PEDES", ["8", "16", "16", "16"], ["6", "12", "12", "18"]),
        ("TAG-PEDES", ["8", "32", "16", "16", "64"], ["6", "24", "12", "12", "48"]),
    ],
)
def test_images_of_both_views_are_counted_by_view(name, train, test, rendered, monkeypatch, capsys):
    assert check(monkeypatch, name, rendered(name)) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[c.strip() for c in x.split("|")] for x in lines if x.startswith(("| train", "| test"))]
    assert [row[2 : 2 + len(train)] for row in rows] == [train, test]


def test_an_image_that_cannot_be_read_fails(copy, monkeypatch, capsys):
    broken = next((copy / "imgs").iterdir())
    broken.write_bytes(broken.read_bytes()[:200])
    assert check(monkeypatch, "CUHK-PEDES", copy) == 1
    assert f"FAIL: images that cannot be read: 1\n    {broken}" in capsys.readouterr().out


def test_a_picture_in_two_splits_fails_even_under_another_name(copy, monkeypatch, capsys):
    entries = change(copy, lambda e: None)
    train, test = (next(e for e in entries if e["split"] == s) for s in ("train", "test"))
    shutil.copy(copy / "imgs" / train["file_path"], copy / "imgs" / test["file_path"])
    assert check(monkeypatch, "CUHK-PEDES", copy) == 1
    same = f"{copy}/imgs/{train['file_path']} = {copy}/imgs/{test['file_path']}"
    assert f"FAIL: pictures in both train and test: 1\n    {same}\n" in capsys.readouterr().out


def test_the_faults_of_the_real_splits_are_reported(like_real, monkeypatch, capsys):
    """Pictures of test in val are a failure; a person with an identity in two splits is a warning."""
    assert check(monkeypatch, "AGDataAttr", like_real) == 1
    shown = capsys.readouterr().out
    assert "FAIL: pictures in both val and test; choose by --val_dataset heldout: 8\n" in shown
    people = "by their number in AG-ReID's file names"
    assert f"warning: people in both train and test, {people}: 1\n    person P0001\n" in shown
    assert f"warning: people in both val and test, {people}; choose by" in shown
    assert "pictures in both train" not in shown
    assert check(monkeypatch, "AGTBPR", like_real) == 0


def test_an_identity_in_train_and_test_fails(copy, monkeypatch, capsys):
    change(copy, lambda e: next(x for x in e if x["split"] == "test").update(id=1))
    assert check(monkeypatch, "CUHK-PEDES", copy) == 1
    assert "FAIL: identities in both train and test: 1\n    1" in capsys.readouterr().out


def test_warnings_pass_unless_strict(copy, monkeypatch, capsys):
    def alter(entries):
        entries[0]["captions"] = ["def caption(x): return x", "Мужчина в куртке", "a man"]
        entries[1]["captions"] = ["a man in a red coat " * 20]
        entries[2]["captions"] = entries[-1]["captions"] = ["A woman in a blue dress."]

    entries = change(copy, alter)
    PILImage.new("RGB", (8, 40)).save(copy / "imgs" / entries[3]["file_path"])
    assert check(monkeypatch, "CUHK-PEDES", copy) == 0
    shown = capsys.readouterr().out
    assert "pass, with warnings" in shown and "FAIL" not in shown
    assert "warning: images with a side under 16 pixels: 1" in shown
    assert "warning: captions over 77 tokens" in shown and "entry 1: 122 tokens" in shown
    assert "warning: captions that may not describe a person: 3" in shown
    assert "'def' looks like code" in shown and "letters of another script" in shown
    assert "warning: captions with more than one identity: 1" in shown
    assert check(monkeypatch, "CUHK-PEDES", copy, "--strict") == 1


def test_a_warning_of_the_reader_is_a_warning(copy, monkeypatch, capsys):
    change(copy, lambda e: e.append(e[-1]))
    assert check(monkeypatch, "CUHK-PEDES", copy) == 0
    shown = capsys.readouterr().out
    assert (
        "warning: unusual entries in the files: 2\n    repeated: 1 images of test, which count"
        in shown
    )
    assert check(monkeypatch, "CUHK-PEDES", copy, "--strict") == 1


def test_attributes_that_training_would_refuse_are_a_warning(
    mini_copy, tmp_path, monkeypatch, capsys
):
    (tmp_path / "a.yaml").write_text("- {attribute: gender, classes: {a: [x], b: [y]}}")
    assert (
        check(monkeypatch, "AGDataAttr", mini_copy, "--attributes_file", tmp_path / "a.yaml") == 0
    )
    shown = capsys.readouterr().out
    assert "warning: not fit for the loss match2: 1" in shown and "give --attributes_file" in shown


def test_a_class_without_a_training_image_is_a_warning(mini_copy, monkeypatch, capsys):
    rows = json.loads((mini_copy / "attrs.json").read_text())
    rows = [{key: [*labels[:6], 1] for key, labels in row.items()} for row in rows]
    (mini_copy / "attrs.json").write_text(json.dumps(rows))
    assert check(monkeypatch, "AGDataAttr", mini_copy) == 0
    shown = capsys.readouterr().out
    assert "warning: classes without a training image" in shown and "altitude: level" in shown


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A man in a grey shirt, with a black backpack.", ""),
        ("The woman's coat is navy-blue; she wears café-coloured shoes.", ""),
        ("A man in a white t-shirt with a black print.", ""),
        ("{'caption': 'a man'}", "looks like code"),
        ("see https://example.org for this man", "looks like code"),
        ("这个男人 wears a black coat today", "another script"),
        ("nan", "looks like code"),
        ("man", "fewer than three words"),
    ],
)
def test_a_caption_that_hardly_describes_a_person_is_suspicious(text, reason):
    assert reason in tool.suspicious(text) and bool(reason) == bool(tool.suspicious(text))
