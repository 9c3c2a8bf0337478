"""search.py find: from a sentence or a picture to a table or JSON."""

import json
import shutil

import numpy as np
import pytest

import search
from gallery import where
from gallery.encoders import encoder_of
from gallery.find import INDEX
from gallery.index import Approximate, open_index
from gallery.query import combine
from gallery.store import Gallery
from processor.inference import load_run
from tests.gallery.made import path_of
from tests.helpers import run
from tests.reliability.runs import train_small_run
from utils.errors import UserError


@pytest.fixture(scope="module")
def trained(mini_root, tmp_path_factory):
    return train_small_run(mini_root, tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def folder(trained, mini_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("galleries") / "mini"
    with pytest.MonkeyPatch.context() as patch:
        run(search.main, patch, "index", "--config_file", trained / "configs.yaml", "--gallery", folder,
            "--dataset_name", "AGDataAttr", "--root_dir", mini_root, "--split", "test",
            "--device", "cpu", "--num_workers", "0")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def gallery(folder):
    return Gallery.open(folder)


@pytest.fixture
def find(folder, monkeypatch, capsys):
    """Calls the command; the lines that it prints."""

    def call(*words):
        capsys.readouterr()
        run(search.main, monkeypatch, "find", *words, "--gallery", folder, "--device", "cpu")
        printed = capsys.readouterr()
        call.told = printed.err
        return printed.out.splitlines()

    return call


@pytest.fixture
def as_json(find):
    return lambda *words: [json.loads(line) for line in find(*words, "--json")]


SENTENCE = "a man in a grey shirt with a black backpack"


def ranking(gallery, query_D, mask=None):
    scores = gallery.features.astype(np.float32) @ query_D
    rows = np.argsort(-scores, kind="stable")
    return [int(row) for row in rows if mask is None or mask[row]]


def test_a_sentence_gives_the_ranking_of_the_run(as_json, gallery, trained):
    query_D = load_run(trained, device="cpu").encode_text(SENTENCE).numpy()[0]
    found = as_json(SENTENCE, "--collapse", "off", "--top", "7")
    assert [hit["row"] for hit in found] == ranking(gallery, query_D)[:7]
    assert [hit["rank"] for hit in found] == [*range(1, 8)]
    for hit in found:
        assert hit["item"]["id"] == gallery.items["id"][hit["row"]].as_py()
        assert abs(hit["score"] - gallery.features[hit["row"]].astype(np.float32) @ query_D) < 1e-5


def test_the_table_says_where_hits_are_and_how_much_the_first_stands_out(find, gallery):
    lines = find(SENTENCE, "--top", "3")
    assert [cell.strip() for cell in lines[1].split("|")[1:-1]] == [
        "rank", "score", "id", "path", "view", "source", "pictures"
    ]  # fmt: skip
    assert len(lines) == 8 and "the first hit" in lines[-1]
    assert lines[-1] == find(SENTENCE)[-1]  # whatever --top
    assert any(path in lines[3] for path in gallery.items["path"].to_pylist())
    assert "pictures" not in find(SENTENCE, "--collapse", "off")[1]


def test_weights_minus_and_pictures_make_one_query(as_json, gallery, trained, mini_root):
    model = load_run(trained, device="cpu")
    picture = path_of(gallery, 3)
    texts = model.encode_text(["a man in red", "with a dog", "a bag"]).numpy()
    features = np.concatenate([texts, model.encode_image([picture]).numpy()])
    words = (
        "a man in red",
        "with a dog",
        "--minus",
        "a bag",
        "--like",
        picture,
        "--collapse",
        "off",
    )
    expected = ranking(gallery, combine(features, [1, 1, -0.5, 1]))
    assert [hit["row"] for hit in as_json(*words)] == expected[:20]
    expected = ranking(gallery, combine(features, [1, 0.5, -0.25, 2]))
    assert [hit["row"] for hit in as_json(*words, "--weight", "1", "0.5", "0.25", "2")] == expected[:20]  # fmt: skip


def test_more_like_an_item_leaves_it_out_and_can_ask_for_the_other_view(as_json, gallery):
    items = gallery.items.to_pylist()
    item = next(item for item in items if item["view"] == "aerial")
    found = as_json("--like", str(item["id"]), "--collapse", "off", "--top", "100")
    assert sorted(hit["item"]["id"] for hit in found) == sorted(i["id"] for i in items if i != item)
    other = as_json("--like", str(item["id"]), "--other_view", "--top", "100", "--collapse", "off")
    assert [h["item"]["id"] for h in other] == [h["item"]["id"] for h in found if h["item"]["view"] == "ground"]  # fmt: skip


def test_a_filter_keeps_the_ranking_of_those_that_it_keeps(as_json, gallery, trained):
    text = "view = 'aerial' and not source = 'AG-ReID'"
    mask = where.to_mask(where.parse(text, gallery.items.schema), gallery.items)
    assert 0 < mask.sum() < len(mask)
    query_D = load_run(trained, device="cpu").encode_text(SENTENCE).numpy()[0]
    found = as_json(SENTENCE, "--where", text, "--collapse", "off", "--top", "100")
    assert [hit["row"] for hit in found] == ranking(gallery, query_D, mask)


def test_nobody_is_found_if_the_filter_keeps_nobody(find):
    assert find(SENTENCE, "--where", "view = 'x'") == ["no hits: the filter keeps nobody"]
    assert find.told == "--where: no view is 'x'; there are aerial, ground\n"


def test_a_sheet_of_pictures_that_were_moved_says_so(folder, tmp_path, monkeypatch, capsys):
    gallery = shutil.copytree(folder, tmp_path / "mini")
    path = gallery / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"root": "/gone"}))
    words = ("find", SENTENCE, "--top", "3", "--sheet", tmp_path / "a.html", "--gallery", gallery)
    run(search.main, monkeypatch, *words)
    told = capsys.readouterr().err
    assert "3 of 3 hits have no picture there: /gone/" in told
    assert "cannot be read: No such file or directory; if the pictures were moved, give --r" in told


def test_more_like_the_path_that_the_table_shows(as_json, gallery):
    item = gallery.items.slice(5, 1).to_pylist()[0]
    by_path = as_json("--like", item["path"], "--other_view")
    assert by_path == as_json("--like", str(item["id"]), "--other_view") != []


@pytest.mark.parametrize("command", [("find", SENTENCE), ("serve", "--port", "0")])
def test_an_encoder_that_was_moved_is_asked_for_by_its_option(
    folder, trained, tmp_path, monkeypatch, capsys, command
):
    gallery, gone = shutil.copytree(folder, tmp_path / "mini"), tmp_path / "gone"
    path = gallery / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["encoder"]["folder"] = str(gone)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="gone: .*the gallery's encoder is now: --encoder FOLDER"):
        run(search.main, monkeypatch, *command, "--gallery", gallery)
    name = manifest["encoder"]["name"]
    with pytest.raises(UserError, match=f"--encoder {gone}: no such .*; {name} made the gallery$"):
        run(search.main, monkeypatch, *command, "--gallery", gallery, "--encoder", gone)
    gone.mkdir()
    (gone / "encoder.json").write_text("{}")
    with pytest.raises(UserError, match=f"--encoder {gone}: an export in ONNX; .* with --onnx"):
        run(search.main, monkeypatch, *command, "--gallery", gallery, "--encoder", gone)
    with pytest.raises(UserError, match=f"--config_file {gone}: an export in ONNX; .* with --onnx"):
        run(search.main, monkeypatch, "index", "--images", "x", "--config_file", gone, "--gallery", gallery)  # fmt: skip
    if command[0] == "find":
        run(search.main, monkeypatch, *command, "--encoder", trained, "--gallery", gallery)
        assert "the first hit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("choice", "mend"),
    [("/gone/clip.pt", "--encoder FILE"), ("ViT-B-16@/gone/a.pt", "--encoder ViT-B-16@FILE")],
)
def test_weights_that_were_moved_are_asked_for_by_their_option(choice, mend):
    about = {"kind": "weights", "pretrain_choice": choice, "folder": ""}
    with pytest.raises(UserError, match=f"/gone/.*pt: the encoder was moved; .*: {mend}$"):
        encoder_of({"encoder": about}, None, None, "cpu")


def test_reranking_keeps_the_hits_and_changes_their_order(as_json):
    changed = 0
    for sentence in (SENTENCE, "a woman", "a red coat", "a tall man with a hat", "a bag"):
        words = (sentence, "--collapse", "off", "--top", "100")
        raw, again = ([h["row"] for h in as_json(*words, *w)] for w in ([], ["--rerank"]))
        assert sorted(raw) == sorted(again)
        changed += raw != again
    assert changed


def test_a_sheet_shows_the_hits_and_where_the_sentence_is_seen(find, tmp_path):
    plain, heat = tmp_path / "plain.html", tmp_path / "heat.html"
    lines = find(SENTENCE, "--top", "3", "--sheet", str(plain), "--json")
    assert find.told == f"wrote {plain}\n"
    assert [json.loads(line)["rank"] for line in lines] == [1, 2, 3]  # and nothing else
    find(SENTENCE, "--top", "3", "--sheet", str(heat), "--heat")
    pictures = [page.read_text().count("data:image/jpeg") for page in (plain, heat)]
    assert pictures[0] == 3 and pictures[1] == 6 and SENTENCE in heat.read_text()


@pytest.mark.parametrize("words", [(), ("--where", "view = 'aerial' and left is null"), ("--rerank",)])  # fmt: skip
def test_a_copy_in_milvus_gives_the_same_hits(folder, tmp_path, monkeypatch, capsys, words):
    gallery, store = shutil.copytree(folder, tmp_path / "mini"), f"milvus:{tmp_path}/milvus.db"
    run(search.main, monkeypatch, "index", "--gallery", gallery, "--store", store)
    capsys.readouterr()
    found = []
    for place in ((), ("--store", store)):
        run(search.main, monkeypatch, "find", SENTENCE, *words, *place, "--gallery", gallery, "--device", "cpu", "--json")  # fmt: skip
        printed = capsys.readouterr()
        assert not printed.err
        found.append([json.loads(line) for line in printed.out.splitlines()])
    here, there = found
    assert [h["row"] for h in here] == [h["row"] for h in there]
    np.testing.assert_allclose([h["score"] for h in here], [h["score"] for h in there], atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a", "man", "in", "red"), 'a man in red: 4 sentences of one word each; put quotes around a sentence: "a man in red"'),
        (("a man", "--minus", "a", "hat"), '--minus a hat: 2 sentences of one word each'),
        ((), "nobody is looked for: give a sentence, or --like"),
        (("--minus", "a hat"), "nobody is looked for: put sentences before --minus"),
        (("a man", " "), "a sentence is empty"),
        (("a man", "--top", "0"), "--top 0: at least 1"),
        (("a man", "--weight", "1", "2"), "--weight: 2 weights, but the query has 1 sentences and pictures"),
        (("a man", "--weight", "-1"), "--weight -1: must be above 0; what is not wanted goes to --minus"),
        (("a man", "--collapse", "2"), "2 is neither off nor a cosine above 0 and at most 1"),
        (("a man", "--collapse", "no"), "--collapse: no is neither off nor a cosine"),
        (("a man", "--where", "veiw = 'a'"), "filter, character 1, at 'veiw': no such column. Did you mean 'view'?"),
        (("--like", "12345"), "--like 12345: neither a file, nor an id or a path of somebody in"),
        (("--like", "gone.jpg"), "--like gone.jpg: neither a file, nor"),
        (("a man", "--sheet", "hits.jpg"), "--sheet hits.jpg: give a name that ends in .png or .html"),
        (("a man", "--sheet", "/nowhere/to/hits.png"), "--sheet /nowhere/to/hits.png: no such folder: /nowhere/to"),
        (("a man", "--heat"), "--heat: needs --sheet and a sentence"),
        (("a man", "--other_view"), "--other_view: give --like the id or path of a person"),
        (("a man", "--store", "milvus:/nowhere/x.db"), "--store milvus:/nowhere/x.db#gallery: has no copy of"),
        (("a man", "--store", "chroma:x"), "--store chroma:x: not of the form milvus:URI[#NAME]"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(find, words, message):
    with pytest.raises(UserError) as error:
        find(*words)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("find", "a man", "--galery", "x"), "--galery: no such option. Did you mean '--gallery'?"),
        (("find", "a man"), "the following arguments are required: --gallery"),
        (("info", "--gallery", "README.md"), "--gallery README.md: not the folder of a gallery"),
        (("find", "a man", "--gallery", "x", "--store", "milvus:"), "--store milvus:: not of the form"),
    ],
)  # fmt: skip
def test_a_mistake_before_the_gallery_is_read_names_the_option(monkeypatch, words, message):
    with pytest.raises(UserError) as error:
        run(search.main, monkeypatch, *words)
    assert message in str(error.value)


def test_info_lists_what_a_filter_can_name(folder, monkeypatch, capsys):
    run(search.main, monkeypatch, "info", "--gallery", folder)
    printed = capsys.readouterr().out
    assert "columns: id, path, frame_time, left," in printed
    assert "compressed index: none" in printed


def test_a_copy_that_does_not_exist_is_not_made_by_asking_it(find, tmp_path):
    with pytest.raises(UserError, match="has no copy of"):
        find(SENTENCE, "--store", f"milvus:{tmp_path}/none.db")
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_with_a_query_is_said_before_the_model_is_loaded(find, monkeypatch):
    def loads(*args):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("gallery.find.encoder_of", loads)
    with pytest.raises(UserError, match="has no copy of"):
        find(SENTENCE, "--store", "milvus:/nowhere/x.db")


def test_a_gallery_is_compressed_and_then_searched_by_its_index(
    folder, gallery, tmp_path, monkeypatch, capsys
):
    copy = shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.setattr("gallery.index.MIN_ROWS", 10)
    monkeypatch.setattr("gallery.index.LEAST", 0)
    run(search.main, monkeypatch, "compress", "--gallery", copy, "--memory", "1MiB")
    assert "IVF4,PQ32x4fs" in capsys.readouterr().out
    assert isinstance(open_index(gallery.items, gallery.features, copy / INDEX), Approximate)
    run(search.main, monkeypatch, "find", SENTENCE, "--gallery", copy, "--json", "--top", "3")
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("0.01MiB", "24 people need no index"),
        ("1GB", "'1GB' is not a size: a number and MiB or GiB, such as 800MiB"),
    ],
)
def test_an_index_that_cannot_be_is_refused(folder, monkeypatch, size, message):
    with pytest.raises(UserError, match=message):
        run(search.main, monkeypatch, "compress", "--gallery", folder, "--memory", size)
