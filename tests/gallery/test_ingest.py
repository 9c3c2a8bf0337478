"""What there is to index: folders, lists, boxes and data sets."""

import json

import pytest

from gallery.ingest import Found, Person, add_boxes, add_dataset, add_pictures, add_videos
from tests.helpers import options, read
from utils.attributes import read_attributes
from utils.errors import UserError

ATTRIBUTES_FILE = options().attributes_file


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def boxes(path, *folders, view=None, min_score=0.5):
    found = Found()
    add_boxes(found, path, folders, view, min_score)
    return found


def test_pictures_come_from_folders_files_and_lists_and_hidden_ones_stay_out(tmp_path):
    touch(tmp_path / "a", "1.jpg", "deep/2.PNG", "._1.jpg", ".cache/3.jpg", "notes.txt", "v.mp4")
    touch(tmp_path / "b", "4.jpg", "5.jpg", "6.jpg")
    (tmp_path / "list.txt").write_text("b/4.jpg\n\nb/6.jpg\n")
    found = Found()
    given = [str(tmp_path / "a"), f"@{tmp_path / 'list.txt'}", str(tmp_path / "b/5.jpg")]
    add_pictures(found, given, "aerial")
    names = ["a/1.jpg", "a/deep/2.PNG", "b/4.jpg", "b/6.jpg", "b/5.jpg"]
    assert list(found.files) == [str(tmp_path / name) for name in names]
    people = [file.people for file in found.files.values()]
    assert people == [(Person(view="aerial", source=name[0]),) for name in names]
    assert found.base() == str(tmp_path) and not found.broken
    videos = Found()
    add_videos(videos, [str(tmp_path / "a")], None)
    assert [(f.file, f.is_video) for f in videos.files.values()] == [(f"{tmp_path}/a/v.mp4", True)]


def test_links_to_folders_are_followed_and_each_folder_comes_once(tmp_path):
    touch(tmp_path, "top/z/1.jpg", "disk/2.jpg", "disk/deep/3.jpg", "4.jpg")
    for link, folder in (
        ("top/a", "z"), ("top/b", "../disk"), ("top/c", "../disk/deep"), ("top/z/loop", ".."),
        ("disk/loop", "."), ("top/up", "../.."), ("top/lost", "nowhere"), ("top/.hidden", "../disk"),
    ):  # fmt: skip
        (tmp_path / link).symlink_to(folder)
    found = Found()
    add_pictures(found, [str(tmp_path / "top")], None)
    names = ["z/1.jpg", "b/2.jpg", "b/deep/3.jpg"]
    assert list(found.files) == [f"{tmp_path}/top/{name}" for name in names]
    assert not found.broken


def test_boxes_of_a_csv_file_with_view_camera_and_identity(tmp_path):
    touch(tmp_path, "in/1.jpg", "in/2.jpg")
    (tmp_path / "boxes.csv").write_text(
        "path,left,top,width,height,view,camera,identity\n"
        "1.jpg,1,2,30,40,ground,c1,anna\n1.jpg,5.4,6.6,7.2,8.2,,,\n2.jpg,-3,0,9,9,,c2,\n"
    )
    found = boxes(tmp_path / "boxes.csv", tmp_path / "in", view="aerial")
    first, second = found.files[f"{tmp_path}/in/1.jpg"].people
    assert first == Person((1, 2, 30, 40), "ground", "c1", "in", "anna")
    assert second == Person((5, 7, 8, 8), "aerial", None, "in")  # both edges are rounded
    assert found.files[f"{tmp_path}/in/2.jpg"].people[0].box == (-3, 0, 9, 9)
    assert found.roots == [f"{tmp_path}/in"]


def test_two_people_at_one_place_are_one(tmp_path):
    text = (
        "path,left,top,width,height,identity\n1.jpg,1,2,3,4,a\n1.jpg,1,2,3,5,b\n1.jpg,1,2,3,4,c\n"
    )
    (tmp_path / "boxes.csv").write_text(text)
    touch(tmp_path, "1.jpg")
    (file,) = boxes(tmp_path / "boxes.csv").files.values()
    assert [person.identity for person in file.people] == ["a", "b"]


def test_boxes_of_coco_are_people_with_a_sufficient_score(tmp_path):
    annotations = [
        {"image_id": 7, "category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.9},
        {"image_id": 7, "category_id": 1, "bbox": [0, 0, 5, 5], "score": 0.4},
        {"image_id": 7, "category_id": 2, "bbox": [0, 0, 6, 6], "score": 0.9},
        {"image_id": 8, "category_id": 1, "bbox": [0, 0, 7.5, 7]},
    ]
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "car"}]
    images = [{"id": 7, "file_name": "x/1.jpg"}, {"id": 8, "file_name": "2.jpg"}]
    content = {"images": images, "categories": categories, "annotations": annotations}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"none of its pictures is there: .*x/1.jpg .* --images"):
        boxes(tmp_path / "boxes.json")
    touch(tmp_path, "x/1.jpg")
    found = boxes(tmp_path / "boxes.json")
    shown = {path: [person.box for person in f.people] for path, f in found.files.items()}
    assert shown == {
        f"{tmp_path}/x/1.jpg": [(1, 2, 30, 40)],
        f"{tmp_path}/2.jpg": [(0, 0, 8, 7)],
    }
    content["annotations"] = annotations[:3]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="nobody is in it with a score of at least 0.95"):
        boxes(tmp_path / "boxes.json", min_score=0.95)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("b.csv", "path,left,top,width\n", "the column height is missing"),
        ("b.csv", "path;left;top;width;height\n", "separator must be a comma"),
        ("b.csv", "path,left,top,width,height\n", "nobody is in it"),
        ("b.csv", "path,left,top,width,height\n1.jpg,1,2,3\n", "line 2: not as many values"),
        ("b.csv", "path,left,top,width,height\n1.jpg,1,2,0,3\n", "line 2: the box 1, 2, 0, 3 needs"),
        ("b.csv", "path,left,top,width,height\n1.jpg,1,nan,4,3\n", "line 2: the box 1, nan, 4, 3"),
        ("b.csv", "path,left,top,width,height,view\n1.jpg,1,1,4,3,sky\n", "the view is 'sky'"),
        ("b.json", "[]", "expected an object"),
        ("b.json", '{"images": []}', "not COCO's form, .*; missing: categories, annotations$"),
        ("b.json", '{"images": [], "categories": [], "annotations": []}', "no category person"),
        ("b.json", '{"images": [], "categories": [{"id": 1, "name": "person"}], "annotations": [{"category_id": 1}]}', "annotation 1: image_id, category_id and bbox"),
        ("b.json", '{"images": [], "categories": [{"id": 1, "name": "person"}], "annotations": [{"category_id": 1, "image_id": 99, "bbox": []}]}', "annotation 1: its image_id 99 is not"),
        ("b.json", "{", "malformed JSON"),
        ("gone.csv", None, "No such file"),
    ],
)  # fmt: skip
def test_a_wrong_file_of_boxes_is_refused_with_its_place(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        boxes(tmp_path / name)
    assert str(error.value).startswith(f"--boxes {tmp_path / name}")


def test_a_data_set_brings_identity_view_source_and_labels(mini_root):
    found = Found()
    add_dataset(found, "AGDataAttr", str(mini_root), "test", ATTRIBUTES_FILE, None)
    split = read("AGDataAttr", mini_root).splits["test"]
    classes = {a.name: a.classes for a in read_attributes(ATTRIBUTES_FILE)}
    assert found.attributes == classes and found.roots == [str(mini_root)]
    count = 0
    for view, gallery in split.galleries.items():
        for image, pid, source in zip(gallery.images, gallery.pids, gallery.sources, strict=True):
            (person,) = found.files[image.path].people
            assert (person.view, person.source) == (view, split.sources[source])
            assert person.identity == f"test-{pid}"
            labels = zip(classes.items(), image.attributes, strict=True)
            assert dict(person.labels) == {name: names[i] for (name, names), i in labels}
            count += 1
    assert len(found.files) == count  # nothing else
    everything = Found()
    add_dataset(everything, "AGDataAttr", str(mini_root), "all", ATTRIBUTES_FILE, "aerial")
    assert set(everything.files) > set(found.files)
    assert {f.people[0].view for f in everything.files.values()} == {"aerial"}
    with pytest.raises(UserError, match="--split dev: AGDataAttr has train, val, test"):
        add_dataset(found, "AGDataAttr", str(mini_root), "dev", ATTRIBUTES_FILE, None)


def test_ids_of_a_data_set_that_names_its_people_are_kept(rendered):
    root = rendered("custom")
    found = Found()
    add_dataset(found, "custom", str(root), "all", ATTRIBUTES_FILE, None)
    data = read("custom", root)
    known = {str(n) for ids in data.ids.values() for n in ids}
    assert {file.people[0].identity for file in found.files.values()} <= known


def test_a_gallery_of_both_views_gives_each_picture_its_own(rendered):
    root, found = rendered("TAG-PEDES"), Found()
    add_dataset(found, "TAG-PEDES", str(root), "test", ATTRIBUTES_FILE, None)
    views = {path: file.people[0].view for path, file in found.files.items()}
    assert views == {path: path.split("/")[-2] for path in views} and len(views) == 24


def test_a_list_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"--images @.*gone.txt: not readable as a list of paths"):
        add_pictures(Found(), [f"@{tmp_path / 'gone.txt'}"], None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gone", "--images .*/gone: No such file or directory$"),
        ("a/*.jpg", r"--images .*a/\*.jpg: No such file or directory; leave out the quotes"),
        ("empty", "--images .*/empty: no .jpg .* is in this folder"),
        ("notes.txt", "--images .*/notes.txt: none of .jpg .*; @FILE is a list"),
        ("v.mp4", "--images .*/v.mp4: none of .jpg .*; give it with --videos"),
        ("@a/1.jpg", "--images @.*/a/1.jpg: not a text in UTF-8; after @ comes a list of paths"),
        ("@list.txt", "--images @.*/list.txt: .*/gone.jpg: No such file"),
    ],
)
def test_what_is_missing_or_has_no_pictures_is_an_error(given, message, tmp_path, monkeypatch):
    touch(tmp_path, "a/1.jpg", "empty/notes.txt", "notes.txt", "v.mp4")
    (tmp_path / "list.txt").write_text("a/1.jpg\ngone.jpg\n")
    (tmp_path / "a/1.jpg").write_bytes(b"\xff\xd8\xff")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        add_pictures(Found(), ["a", given], None)
