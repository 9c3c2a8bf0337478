"""`search.py index`, `info` and `delete`, from pictures to a gallery and through its changes."""

import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image as PILImage
from pymilvus import MilvusClient
from pymilvus.exceptions import MilvusException

import search
from gallery import engine_torch, indexing
from gallery.copies import Copy
from gallery.index import INDEX
from gallery.indexing import ProgressLines
from gallery.manifest import MANIFEST, NEXT
from gallery.parts import part_file
from gallery.records import id_of
from gallery.store import Gallery, writing
from tests.gallery.made import path_of
from tests.gallery.test_frames import make_video, picture
from tests.helpers import ROOT, run
from tests.reliability.runs import train_small_run
from utils.errors import StoppedBySignal, UserError


@pytest.fixture(scope="module")
def folder(mini_root, tmp_path_factory):
    return train_small_run(mini_root, tmp_path_factory.mktemp("logs"))


@pytest.fixture
def photos(tmp_path):
    """Six pictures, two of them in a folder within."""
    (tmp_path / "photos/more").mkdir(parents=True)
    for n in range(6):
        picture(tmp_path / "photos" / ("more" if n > 3 else "") / f"{n}.jpg", seed=n)
    return tmp_path / "photos"


@pytest.fixture
def index(folder, tmp_path, monkeypatch):
    """Index into tmp_path/gallery, with the run unless other words name an encoder."""

    def call(*words, encoder=("--config_file", folder / "configs.yaml")):
        common = ("--gallery", tmp_path / "gallery", "--num_workers", 0, "--test_batch_size", 4)
        run(search.main, monkeypatch, "index", *common, *encoder, *words)
        return Gallery.open(tmp_path / "gallery")

    return call


@pytest.fixture
def read_files(monkeypatch):
    """The paths of the files that are read to be encoded, by run."""
    runs = []
    loader = engine_torch.chunk_loader

    def counted(jobs, *rest):
        runs.append(sorted(job.path for job in jobs))
        return loader(jobs, *rest)

    monkeypatch.setattr(engine_torch, "chunk_loader", counted)
    return runs


def by_path(gallery):
    """By path, the rows (id, and bytes of the features)."""
    rows = {}
    for n, (path, number) in enumerate(
        zip(gallery.items["path"].to_pylist(), gallery.items["id"].to_pylist(), strict=True)
    ):
        rows.setdefault(path, []).append((number, gallery.features[n].tobytes()))
    return rows


def test_a_second_run_encodes_only_what_is_new_or_changed_and_drops_what_is_gone(
    index, photos, read_files
):
    first = index("--images", photos)
    assert first.manifest["root"] == str(photos) and len(first.items) == 6
    index("--images", photos)
    (photos / "1.jpg").unlink()
    picture(photos / "2.jpg", seed=77)  # another picture
    os.utime(photos / "3.jpg", ns=(5, 5))  # the same picture, copied
    picture(photos / "more/7.jpg", seed=7)
    second = index("--images", photos)
    everything = ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "more/4.jpg", "more/5.jpg"]
    assert read_files == [everything, [], ["2.jpg", "more/7.jpg"]]
    before, after = by_path(first), by_path(second)
    assert sorted(after) == ["0.jpg", "2.jpg", "3.jpg", "more/4.jpg", "more/5.jpg", "more/7.jpg"]
    same = [path for path in after if before.get(path) == after[path]]
    assert sorted(same) == ["0.jpg", "3.jpg", "more/4.jpg", "more/5.jpg"]
    times = dict(zip(second.items["path"].to_pylist(), second.items["mtime_ns"].to_pylist(), strict=True))  # fmt: skip
    assert times["3.jpg"] == 5
    index("--images", photos)
    assert read_files[-1] == []


def test_only_what_is_gone_below_the_indexed_folders_is_dropped(index, photos):
    index("--images", photos)
    (photos / "0.jpg").unlink()
    (photos / "more/4.jpg").unlink()
    assert "0.jpg" in by_path(index("--images", photos / "more"))
    assert "more/4.jpg" not in by_path(index("--images", photos / "more"))
    assert "0.jpg" not in by_path(index("--images", photos.parent))  # also from above the root


def test_a_folder_that_is_missing_or_cannot_be_listed_loses_nobody(
    index, photos, tmp_path, monkeypatch
):
    before = by_path(index("--images", photos))
    photos.rename(tmp_path / "away")
    with pytest.raises(UserError, match="photos: No such file or directory; .* delete --path"):
        index("--images", photos)
    with pytest.raises(UserError, match="--images .*/gone: No such file or directory$"):
        index("--images", tmp_path / "gone")  # nobody of it is in the gallery
    photos.mkdir()  # the place of a disk that is not mounted
    with pytest.raises(UserError, match="--images .*photos: no .jpg .* is in this folder"):
        index("--images", photos)
    assert by_path(Gallery.open(tmp_path / "gallery")) == before
    photos.rmdir()
    (tmp_path / "away").rename(photos)
    (photos / "0.jpg").unlink()
    scandir, lstat = os.scandir, os.lstat

    def denied(call):
        def called(path, *rest, **options):
            if "/photos/more" in os.fspath(path):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return call(path, *rest, **options)

        return called

    monkeypatch.setattr(os, "scandir", denied(scandir))
    monkeypatch.setattr(os, "lstat", denied(lstat))
    after = by_path(index("--images", photos))
    assert sorted(set(before) - set(after)) == ["0.jpg"]
    (entry,) = json.loads((tmp_path / "gallery/broken.json").read_text())
    assert entry == {"path": str(photos / "more"), "reason": "Permission denied"}


@pytest.mark.parametrize("is_missing", [False, True], ids=["empty", "missing"])
def test_people_of_a_folder_without_pictures_stay_with_a_line_until_they_are_deleted(
    is_missing, index, photos, tmp_path, monkeypatch, capsys
):
    (photos / "more/deep").mkdir()
    picture(photos / "more/deep/8.jpg", seed=8)
    before = by_path(index("--images", photos))
    (photos / "more").rename(tmp_path / "away")
    if not is_missing:
        (photos / "more/deep").mkdir(parents=True)  # where nothing is mounted
    (photos / "0.jpg").unlink()
    capsys.readouterr()
    after = by_path(index("--images", photos))
    assert sorted(set(before) - set(after)) == ["0.jpg"]
    shown = capsys.readouterr().out
    assert shown.count("stay") == 1 and "3 people stay though their folders" in shown
    assert f"delete --gallery {tmp_path / 'gallery'} --path {photos / 'more'}\n" in shown
    run(search.main, monkeypatch, "delete", "--gallery", tmp_path / "gallery", "--path", photos / "more")  # fmt: skip
    capsys.readouterr()
    assert len(index("--images", photos).items) == 3
    assert "stay" not in capsys.readouterr().out


def test_a_folder_that_is_there_again_is_unchanged_and_loses_single_pictures(
    index, photos, tmp_path, read_files
):
    before = by_path(index("--images", photos))
    (photos / "more").rename(tmp_path / "away")
    index("--images", photos)
    (tmp_path / "away").rename(photos / "more")
    (photos / "more/4.jpg").unlink()
    after = by_path(index("--images", photos))
    assert sorted(set(before) - set(after)) == ["more/4.jpg"] and read_files[1:] == [[], []]


def test_people_of_boxes_stay_while_the_folder_of_their_pictures_is_away(index, photos, tmp_path):
    (tmp_path / "b.csv").write_text("path,left,top,width,height\n0.jpg,0,0,30,40\nmore/4.jpg,0,0,9,9\n")  # fmt: skip
    words = ("--images", photos, "--boxes", tmp_path / "b.csv")
    before = by_path(index(*words))
    (photos / "more").rename(tmp_path / "away")
    assert by_path(index(*words)) == before
    (tmp_path / "b.csv").write_text("path,left,top,width,height\n0.jpg,0,0,30,40\n")
    assert sorted(by_path(index(*words))) == ["0.jpg"]


def test_a_folder_that_was_renamed_below_the_named_one_is_not_there_twice(index, photos, capsys):
    index("--images", photos)
    (photos / "more").rename(photos / "renamed")
    capsys.readouterr()
    after = by_path(index("--images", photos))
    assert sorted(after)[-2:] == ["renamed/4.jpg", "renamed/5.jpg"] and len(after) == 6
    shown = capsys.readouterr().out
    assert "2 gone" in shown and "stay" not in shown


def test_pictures_that_have_moved_out_of_what_is_named_are_told(index, photos, tmp_path, capsys):
    index("--images", photos)
    moved = tmp_path / "elsewhere"
    shutil.copytree(photos, moved)
    index("--images", moved)  # the old ones are there too
    assert "have the content" not in capsys.readouterr().out
    shutil.rmtree(moved)
    photos.rename(tmp_path / "again")
    assert len(index("--images", tmp_path / "again").items) == 18
    shown = capsys.readouterr().out
    assert "6 new files have the content of files that are gone" in shown
    assert "give --root" in shown and "delete --path" in shown


def test_nothing_to_index_leaves_no_gallery(index, photos, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.md").write_text("mine")
    for words in (
        ("--images", tmp_path / "gone"),
        ("--images", photos, "--config_file", photos / "gone.yaml"),
        ("--images", photos, "--checkpoint", "gone.pth"),  # found missing in the gallery's folder
        ("--images", photos, "--gallery", tmp_path / "docs"),
    ):
        with pytest.raises(UserError, match=r"gone.*no such file|No such file|no gallery, but"):
            index(*words)
    assert not (tmp_path / "gallery").exists()
    assert [path.name for path in (tmp_path / "docs").iterdir()] == ["a.md"]


def test_other_facts_of_a_picture_change_its_rows_and_not_its_features(
    index, mini_root, read_files
):
    plain = index("--images", mini_root / "AG-ReID", "--root", mini_root)
    assert all(score < 1 for score in plain.items["gender_score"].to_pylist())
    dataset = ("--dataset_name", "AGDataAttr", "--root_dir", mini_root)
    labelled = index(*dataset)
    assert not set(read_files[1]) & set(by_path(plain))  # only the other source is read
    one = dict(zip(labelled.items["path"].to_pylist(), labelled.items.to_pylist(), strict=True))
    before, after = by_path(plain), by_path(labelled)
    for path in before:
        assert before[path] == after[path]
        assert one[path]["identity"] and one[path]["view"] and one[path]["gender_score"] == 1


def test_broken_files_are_skipped_listed_and_tried_again(index, photos, tmp_path, capsys):
    (photos / "0.jpg").write_bytes(b"no picture")
    (photos / "link.jpg").symlink_to("nowhere.jpg")
    (photos / "9.jpg").write_bytes(b"")
    gallery = index("--images", photos)
    assert len(gallery.items) == 5
    listed = json.loads((tmp_path / "gallery/broken.json").read_text())
    assert [entry["path"] for entry in listed] == ["link.jpg", "0.jpg", "9.jpg"]
    assert "No such file" in listed[0]["reason"] and "not one of JPEG" in listed[1]["reason"]
    assert "it is empty" in listed[2]["reason"]
    shown = capsys.readouterr().out
    assert "skipped 3 that cannot be read" in shown
    assert shown.count(str(photos / "0.jpg")) == 1 and "/9.jpg: the image cannot" in shown
    (photos / "9.jpg").unlink()
    (photos / "link.jpg").unlink()
    picture(photos / "0.jpg", seed=0)
    assert len(index("--images", photos).items) == 6
    assert not (tmp_path / "gallery/broken.json").exists()
    (photos / "1.jpg").write_bytes(b"broken by now")  # its old row shows what no longer is
    assert "1.jpg" not in by_path(index("--images", photos))


def test_boxes_of_a_picture_replace_each_other(index, photos, tmp_path, read_files):
    header = "path,left,top,width,height,identity\n"
    (tmp_path / "b.csv").write_text(
        header + "0.jpg,0,0,30,40,a\n0.jpg,20,30,30,40,b\n1.jpg,0,0,9,9,a\n"
    )
    words = ("--images", photos, "--boxes", tmp_path / "b.csv")
    first = index(*words)
    assert sorted(first.items["identity"].to_pylist()) == ["a", "a", "b"]
    (tmp_path / "b.csv").write_text(
        header + "0.jpg,0,0,30,40,c\n0.jpg,20,30,30,41,b\n1.jpg,0,0,9,9,d\n"
    )
    second = index(*words)
    assert sorted(second.items["identity"].to_pylist()) == ["b", "c", "d"]
    assert read_files[1] == ["0.jpg"]  # only an identity has changed in 1.jpg
    assert by_path(first)["1.jpg"] == by_path(second)["1.jpg"]
    assert sorted(zip(second.items["width"].to_pylist(), second.items["height"].to_pylist(), strict=True)) == [(9, 9), (30, 40), (30, 41)]  # fmt: skip


def test_boxes_that_are_no_longer_in_their_file_leave_the_gallery(index, photos, tmp_path):
    index("--images", photos / "2.jpg", "--root", photos)  # it has no boxes
    rows = ["0.jpg,0,0,30,40", "1.jpg,0,0,9,9", "more/4.jpg,0,0,9,9"]
    for count in (3, 1):
        text = "\n".join(["path,left,top,width,height", *rows[:count]])
        (tmp_path / "b.csv").write_text(text)
        gallery = index("--images", photos, "--boxes", tmp_path / "b.csv")
        assert len(gallery.items) == count + 1
    assert sorted(by_path(gallery)) == ["0.jpg", "2.jpg"]


def test_videos_are_indexed_by_time_and_again_with_another_step(index, tmp_path, read_files):
    (tmp_path / "videos").mkdir()
    make_video(tmp_path / "videos/v.mp4")
    first = index("--videos", tmp_path / "videos", "--view", "aerial")
    assert first.items["frame_time"].to_pylist() == [0, 1, 2]
    assert index("--videos", tmp_path / "videos", "--view", "ground").items["view"].to_pylist() == ["ground"] * 3  # fmt: skip
    second = index("--videos", tmp_path / "videos", "--every", 1.5)
    assert sorted(second.items["frame_time"].to_pylist()) == [0, 1.5]
    assert read_files == [["v.mp4"], [], ["v.mp4"]]


def test_a_video_that_was_not_read_to_its_end_is_read_again(index, tmp_path, monkeypatch):
    """A kill after a part in the middle of a video."""
    (tmp_path / "videos").mkdir()
    make_video(tmp_path / "videos/v.mp4", seconds=9)
    monkeypatch.setattr(indexing, "ROWS", 4)
    commit, calls = indexing._commit, []

    def killed(*args):
        commit(*args)
        calls.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(indexing, "_commit", killed)
        with pytest.raises(KeyboardInterrupt):
            index("--videos", tmp_path / "videos")
    partial = Gallery.open(tmp_path / "gallery")
    assert partial.items["frame_time"].to_pylist() == [0, 1, 2, 3]
    times = index("--videos", tmp_path / "videos").items["frame_time"].to_pylist()
    assert sorted(times) == list(range(9))


def test_another_encoder_is_refused_and_reencode_replaces_all_at_once(
    index, photos, clip_file, tmp_path
):
    index("--images", photos)
    vanilla = ("--pretrain_choice", clip_file, "--img_size", 96, 32)
    with pytest.raises(UserError, match=r"made by another encoder \(weights of \S+ best.pth \([0-9a-f]{8}\), not .*--reencode"):  # fmt: skip
        index("--images", photos, encoder=vanilla)
    old = (tmp_path / "gallery" / MANIFEST).read_text()
    gallery = index("--images", photos / "more", "--reencode", encoder=vanilla)
    assert gallery.manifest["encoder"]["kind"] == "weights" and len(gallery.items) == 2
    assert gallery.manifest["root"] == json.loads(old)["root"]
    assert not (tmp_path / "gallery" / NEXT).exists()
    assert len(list((tmp_path / "gallery/parts").iterdir())) == 3 * len(gallery.manifest["parts"])


def test_a_stopped_run_keeps_what_it_has_and_the_next_one_goes_on(
    index, photos, tmp_path, monkeypatch, read_files
):
    class Stopping(indexing.StopRequest):
        def __enter__(self):
            super().__enter__()
            self.name = "SIGTERM"
            return self

    for words in ((), ("--reencode",)):
        with monkeypatch.context() as patch:
            patch.setattr(indexing, "StopRequest", Stopping)
            with pytest.raises(StoppedBySignal, match="what is encoded is kept"):
                index("--images", photos, *words)
        assert len(index("--images", photos, *words).items) == 6
        assert len(read_files[-1]) == 2  # a batch of four was encoded before


def test_a_broken_manifest_needs_a_gallery_made_anew_as_the_message_says(index, photos, tmp_path):
    before, folder = by_path(index("--images", photos)), tmp_path / "gallery"
    (folder / "manifest.json").write_text("{")
    for more in ((), ("--repair",), ("--reencode",)):
        with pytest.raises(UserError, match="if .*/gallery is a gallery, delete the whole folder"):
            index("--images", photos, *more)
    shutil.rmtree(folder)
    assert by_path(index("--images", photos)) == before


def test_damage_is_repaired_by_encoding_again(index, photos, tmp_path, read_files):
    gallery = index("--images", photos)
    (part,) = gallery.manifest["parts"]
    part_file(tmp_path / "gallery", part["name"], "features").write_bytes(b"damaged")
    with pytest.raises(UserError, match="features.parquet: corrupted"):
        index("--images", photos)
    assert by_path(index("--images", photos, "--repair")) == by_path(gallery)
    assert len(read_files[-1]) == 6


def test_a_copy_follows_the_gallery_and_one_that_does_not_is_named(
    index, photos, tmp_path, capsys, clip_file
):
    store = f"milvus:{tmp_path / 'milvus.db'}#campus"
    gallery = index("--images", photos, "--store", store)
    assert f"{store}: 6 people put" in capsys.readouterr().out
    (photos / "0.jpg").unlink()
    gallery = index("--images", photos)
    assert f"{store}: not brought up to date" in capsys.readouterr().out
    assert Copy(gallery.folder, store).is_behind(gallery.manifest["parts"])
    index("--store", store, encoder=())  # the gallery as it is
    for words in (("--store", store, "--images", photos), ("--store", store, "--images", photos / "more", "--reencode")):  # fmt: skip
        vanilla = ("--pretrain_choice", clip_file, "--img_size", 96, 32)
        gallery = index(*words, **({"encoder": vanilla} if "--reencode" in words else {}))
        copy = Copy(gallery.folder, store)
        ids = gallery.items["id"].to_pylist()
        assert sorted(copy.milvus.others([])) == sorted(ids)
        assert not copy.is_behind(gallery.manifest["parts"])
    assert len(ids) == 2


def test_a_store_that_fails_leaves_the_gallery_and_says_how_to_go_on(
    index, photos, tmp_path, monkeypatch
):
    store = f"milvus:{tmp_path / 'milvus.db'}"

    def fails(*words, **options):
        raise MilvusException(message="no space left")

    with monkeypatch.context() as patch:
        patch.setattr(MilvusClient, "upsert", fails)
        with pytest.raises(UserError, match="no space left; .* is up to date, its copy is not: .*#gallery goes on"):  # fmt: skip
            index("--images", photos, "--store", store)
    gallery = index("--store", store, encoder=())
    assert (
        len(gallery.items) == len(Copy(gallery.folder, f"{store}#gallery").milvus.others([])) == 6
    )


def test_pictures_that_have_moved_are_found_by_their_new_root(index, photos, tmp_path, read_files):
    first = index("--images", photos)
    shutil.move(photos, tmp_path / "elsewhere")
    second = index("--images", tmp_path / "elsewhere", "--root", tmp_path / "elsewhere")
    assert read_files[1] == [] and by_path(first) == by_path(second)
    assert path_of(second, 0).startswith(str(tmp_path / "elsewhere"))


def test_pictures_indexed_below_an_old_root_are_not_there_twice(
    index, photos, tmp_path, read_files
):
    first = index("--images", photos)
    moved = tmp_path / "elsewhere"
    shutil.move(photos, moved)
    index("--images", moved / "more")  # without its root: by absolute paths
    assert len(Gallery.open(tmp_path / "gallery").items) == 8
    picture(moved / "more/8.jpg", seed=8)
    index("--images", moved / "more")
    gallery = index("--images", moved, "--root", moved)
    assert sorted(by_path(gallery)) == sorted([*by_path(first), "more/8.jpg"])
    assert len(gallery.items) == 7 and read_files[-1] == []
    known = dict(zip(gallery.items["path"].to_pylist(), gallery.items["id"].to_pylist(), strict=True))  # fmt: skip
    assert all(id_of(path, None, None) == number for path, number in known.items())


def test_info_counts_by_source_and_view(index, photos, monkeypatch, tmp_path, capsys):
    index("--images", photos, "--view", "aerial")
    capsys.readouterr()
    run(search.main, monkeypatch, "info", "--gallery", tmp_path / "gallery")
    shown = capsys.readouterr().out
    assert "6 people in 6 files, 1 parts" in shown and "| photos | aerial |      6 |" in shown
    assert "encoder: run" in shown and "32x16, fp32, 64 numbers" in shown


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (("--identity", "a"), ["b"]),
        (("--where", "identity = 'a' and left < 10"), ["b"]),
        (("--path", "1.jpg"), ["a", "b"]),
        (("--path", "."), None),
        (("--id",), ["a", "b"]),
    ],
)
def test_deleted_people_are_gone_from_the_disk_and_stay_out(
    words, left, index, photos, tmp_path, monkeypatch, read_files
):
    (tmp_path / "b.csv").write_text("path,left,top,width,height,identity\n0.jpg,0,0,30,40,a\n0.jpg,20,30,30,40,b\n1.jpg,0,0,9,9,a\n")  # fmt: skip
    index_words = ("--images", photos, "--boxes", tmp_path / "b.csv")
    gallery = index(*index_words)
    if words == ("--id",):
        words = ("--id", by_path(gallery)["1.jpg"][0][0])
    if words == ("--path", "."):
        words = ("--path", photos)
    index_of = tmp_path / "gallery" / INDEX
    index_of.mkdir()
    (index_of / "1.faiss").write_bytes(b"features in short codes")
    run(search.main, monkeypatch, "delete", "--gallery", tmp_path / "gallery", *words)
    assert not index_of.exists()
    after = Gallery.open(tmp_path / "gallery")
    assert sorted(after.items["identity"].to_pylist()) == (left or [])
    kept = {row for rows in by_path(after).values() for row in rows}
    content = b"".join(path.read_bytes() for path in (tmp_path / "gallery/parts").iterdir())
    for rows in by_path(gallery).values():
        for row in rows:
            assert (row in kept) == (row[1] in content)
    index(*index_words)
    assert read_files[-1] == []
    with pytest.raises(UserError, match="has nobody of these"):
        run(search.main, monkeypatch, "delete", "--gallery", tmp_path / "gallery", "--identity", "x")  # fmt: skip


def test_a_deletion_names_who_is_not_there_and_a_dry_run_deletes_nobody(
    index, photos, tmp_path, monkeypatch, capsys
):
    before = index("--images", photos).items["id"].to_pylist()
    words = ("--gallery", tmp_path / "gallery", "--path", "0.jpg", "gone.jpg", "caf\udce9.jpg")
    for more, left in ((("--dry_run",), 6), ((), 5)):
        run(search.main, monkeypatch, "delete", *words, *more)
        shown = capsys.readouterr().out
        assert "has nobody of gone.jpg" in shown and "has nobody of caf" in shown
        assert "nobody of 0.jpg" not in shown
        assert len(Gallery.open(tmp_path / "gallery").items) == left
        assert ("1 of 6 people would be deleted" in shown) == bool(more)
    assert before[0] not in Gallery.open(tmp_path / "gallery").items["id"].to_pylist()
    for more in ((), ("--dry_run",)):
        with pytest.raises(UserError, match="has nobody of these"):
            run(search.main, monkeypatch, "delete", *words[:2], "--identity", "caf\udce9", *more)


def test_progress_is_logged_where_there_is_no_terminal(caplog):
    log = logging.getLogger("a test")
    with caplog.at_level(logging.INFO), ProgressLines(9, log, seconds=0) as lines:
        lines.update(4)
        lines.update(5)
    assert caplog.messages == ["4 of 9 files encoded", "9 of 9 files encoded"]


def test_a_gallery_that_another_process_writes_is_refused(index, photos, tmp_path):
    code = (
        "import sys; from pathlib import Path; from utils.files import lock\n"
        "lock(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    (tmp_path / "gallery").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "gallery")]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match="another process is using this folder"):
            index("--images", photos)
        other.stdin.close()
        other.wait()
    assert len(index("--images", photos).items) == 6
    with writing(tmp_path / "gallery"):
        pass  # it is free again


def test_what_only_an_index_needs_is_not_ignored_next_to_a_store(index, tmp_path):
    with pytest.raises(UserError, match="give the encoder"):
        index("--store", "milvus:x.db", "--root", tmp_path, encoder=())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --images, --videos"),
        (("--store", "milvus:x.db"), "give --images, --videos"),  # with an encoder
        (("--images", "x", "--store", "milvus:x"), "--store milvus:x: neither a server"),
        (("--images", "x", "--img_size", "32", "16"), "--img_size: a run has its own"),
        (("--images", "x", "--boxes", "b.csv", "--detect", "y"), "are known already"),
        (("--images", "x", "--min_score", "5"), "--min_score 5: must be from 0 to 1"),
        (("--images", "x", "--every", "0"), "--every 0.0: must be a positive"),
        (
            ("--images", str(ROOT / "docs"), "--detect", "fasterrcnn"),
            "--detect fasterrcnn: neither a detector",
        ),
        (("--images", "x", "--view", "sky"), "invalid choice: 'sky'"),
        (("--images", "x", "--precision", "fp8"), "invalid choice: 'fp8'"),
    ],
)
def test_wrong_options_are_one_line(words, message, index):
    with pytest.raises(UserError, match=message):
        index(*words)


def test_an_unknown_command_is_one_line(monkeypatch):
    with pytest.raises(UserError, match="invalid choice: 'indx'"):
        run(search.main, monkeypatch, "indx")


def test_a_picture_without_a_unicode_name_is_reported(index, photos, tmp_path):
    name = os.fsencode(str(photos)) + b"/\xff.jpg"
    with open(name, "wb") as file:
        PILImage.new("RGB", (9, 9)).save(file, "JPEG")
    assert len(index("--images", photos).items) == 6
    (entry,) = json.loads((tmp_path / "gallery/broken.json").read_text())
    assert entry["reason"] == "its name is not Unicode"
