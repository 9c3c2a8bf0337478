"""Images in tar files: the right bytes from any place, and never those of another image."""

import io
import json
import os
import random
import resource
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from datasets import shards
from datasets.image_cache import ImageFiles
from datasets.images import BrokenImage, read_image
from datasets.reading import ImageFolder, same_content
from datasets.shards import image_status, open_image, split_member
from tests.helpers import read
from tools._shard_index import index_shard
from utils.errors import UserError

NAMES = [
    "0.jpg", "folder/1.jpg", f"{'n' * 130}.jpg", f"{'f' * 90}/{'g' * 90}.jpg", "männer/2.jpg",
    f"{'男' * 60}.jpg", f"{'l' * 300}.jpg", "./3.jpg",
]  # fmt: skip
FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}
SIZE = (24, 8)


def picture(number, size=(20, 30)):
    """The bytes of a small image, of a fixed length."""
    values = np.random.RandomState(number).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PILImage.fromarray(values).save(buffer, "BMP")
    return buffer.getvalue()


def write_tar(path, members, form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def paths_in(tar):
    """The path of each image of a tar, in order."""
    lines = index_shard(tar.parent, tar.name, "train").lines
    return [f"{tar.parent}/{json.loads(line)['image']}" for line in lines]


def with_captions(members):
    texts = {f"{os.path.splitext(name)[0]}.txt": b"a man" for name in members}
    return {**members, **texts}


@pytest.fixture
def tar(tmp_path):
    """A tar of eight images, each with a caption."""
    return write_tar(tmp_path / "a.tar", with_captions({f"{i}.bmp": picture(i) for i in range(8)}))


@pytest.mark.parametrize("form", FORMATS)
def test_a_member_of_any_name_and_format_has_the_bytes_of_its_file(form, tmp_path):
    names = NAMES[:2] + NAMES[3:5] if form == "ustar" else NAMES
    members = {name: picture(i) for i, name in enumerate(names)}
    paths = paths_in(write_tar(tmp_path / "a.tar", with_captions(members), FORMATS[form]))
    assert [split_member(path).name for path in paths] == names
    assert [os.path.basename(path) for path in paths] == [os.path.basename(n) for n in names]
    for i in random.Random(0).sample(range(len(paths)), len(paths)):
        with open_image(paths[i]) as file:
            assert file.read() == members[names[i]]


def test_a_name_that_a_writer_put_into_the_header_in_another_form_is_taken_from_there(tmp_path):
    """Go's writer drops characters outside ASCII from the header of a PAX member."""
    info = tarfile.TarInfo("män.bmp")
    info.size = len(picture(0))
    extended = info.tobuf(tarfile.PAX_FORMAT)[:-512]
    info.name = "mn.bmp"
    rest = write_tar(tmp_path / "b.tar", {"män.txt": b"a man"}).read_bytes()
    content = picture(0) + bytes(-len(picture(0)) % 512)
    header = info.tobuf(tarfile.USTAR_FORMAT)
    (tmp_path / "a.tar").write_bytes(extended + header + content + rest)
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames() == ["män.bmp", "män.txt"]
    (path,) = paths_in(tmp_path / "a.tar")
    with open_image(path) as file:
        assert path.endswith("/mn.bmp") and file.read() == picture(0)


def test_a_tar_that_was_written_anew_is_refused_and_never_read_as_another_image(tar):
    path = paths_in(tar)[3]
    message = r"a.tar@.*/3.bmp \(line 7\): the image cannot be read: .* no longer has this member.* Index the shards again: python tools/make_shards.py --index"
    others = [
        {"0.bmp": b"x", **{f"{i}.bmp": picture(i) for i in range(1, 8)}},  # all are elsewhere
        {f"{i + (i > 2)}.bmp": picture(i) for i in range(8)},  # another image of the same size
        {f"{i}.bmp": picture(i, (20, 31) if i == 3 else (20, 30)) for i in range(8)},
        {"0.bmp": bytes(len(tar.read_bytes()))},
    ]
    for members in others:
        write_tar(tar, members)
        with pytest.raises(BrokenImage, match=message):
            read_image(path, "line 7")


def test_a_tar_that_is_cut_short_or_missing_is_refused(tar):
    paths = paths_in(tar)
    read_image(paths[7])
    os.truncate(tar, split_member(paths[7]).offset + 100)
    with pytest.raises(BrokenImage, match="7.bmp: the image cannot be read: the tar no longer has"):
        read_image(paths[7])
    read_image(paths[6])
    tar.unlink()
    shards._opened.cache_clear()
    with pytest.raises(BrokenImage, match="7.bmp: the image cannot be read: No such file"):
        read_image(paths[7])


def test_a_tar_that_replaces_another_is_read_without_a_restart(tar, tmp_path):
    read_image(paths_in(tar)[0])  # keeps it open
    write_tar(tmp_path / "b.tar", with_captions({"x.bmp": picture(99), "y.bmp": picture(98)}))
    os.replace(tmp_path / "b.tar", tar)
    with open_image(paths_in(tar)[1]) as file:
        assert file.read() == picture(98)


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])  # fmt: skip
def test_a_member_that_is_not_a_plain_file_is_refused(kind, tmp_path):
    info = tarfile.TarInfo("0.jpg")
    info.type, info.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(info)
        tar.addfile(tarfile.TarInfo("1.txt"))
    with pytest.raises(BrokenImage, match="no longer has this member"):
        read_image(f"{tmp_path}/a.tar@512+0/0.jpg")
    if kind == tarfile.DIRTYPE:
        assert not index_shard(tmp_path, "a.tar", "train").lines
    else:
        with pytest.raises(UserError, match="member 0.jpg: a link, a sparse or a special file"):
            index_shard(tmp_path, "a.tar", "train")


def test_a_place_outside_the_tar_is_refused_before_training(tar, tmp_path):
    folder, size = ImageFolder(tmp_path), tar.stat().st_size
    assert folder.find("a.tar@512+9/0.bmp", "line 1") == f"{tmp_path}/a.tar@512+9/0.bmp"
    for place in (f"{size - 8}+9", f"{10**17}+9", f"0+{10**17}", "511+9"):
        message = f"line 2: image a.tar@.*: {tar} has only {size} bytes: .* index it again: python"
        with pytest.raises(UserError, match=message):
            folder.find(f"a.tar@{place}/0.bmp", "line 2")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("b.tar@512+9/0.bmp", "line 2: image b.tar@512.9/0.bmp: its shard b.tar is missing in"),
        ("../a.tar@512+9/0.bmp", "its shard path ../a.tar leaves the data set's folder"),
        ("/etc/a.tar@512+9/0.bmp", "its shard path /etc/a.tar leaves the data set's folder"),
        ("x/..\\\\../a.tar@512+9/0.bmp", "leaves the data set's folder"),
        ("a.tar@512+9/../0.bmp", "image path .* leaves the data set's folder"),
        ("a.tar@-512+9/0.bmp", "image a.tar@-512.9/0.bmp is missing"),
        ("a.tar@512+9/", "image a.tar@512.9/ is missing"),
        ("folder.tar@512+9/0.bmp", "its shard folder.tar is missing"),
    ],
)
def test_a_path_that_leaves_the_folder_or_names_no_tar_is_refused(path, message, tar, tmp_path):
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(UserError, match=message):
        ImageFolder(tmp_path).find(path, "line 2")


def test_an_image_over_the_limit_is_refused_before_it_is_read(tar, tmp_path):
    for path in (f"{tar}@512+{10**12}/0.bmp", str(tar)):
        with pytest.raises(ValueError, match="are over the limit of 100"):
            open_image(path, limit=100)
    with pytest.raises(BrokenImage, match="over the limit"):
        read_image(f"{tar}@512+{10**12}/0.bmp")


def test_threads_read_from_more_tars_than_may_stay_open(tmp_path):
    paths = []
    for i in range(shards.MAX_OPEN + 20):
        members = with_captions({"0.bmp": picture(i, (2, 2))})
        paths += paths_in(write_tar(tmp_path / f"{i}.tar", members))

    def is_right(i):
        with open_image(paths[i]) as file:
            return file.read() == picture(i, (2, 2))

    with ThreadPoolExecutor(8) as pool:
        order = random.Random(0).choices(range(len(paths)), k=1000)
        assert all(pool.map(is_right, order))
    links = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    assert sum(str(tmp_path) in link for link in links) <= shards.MAX_OPEN
    # With fewer open files than tars: the kept ones give way.
    shards._opened.cache_clear()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        assert all(map(is_right, range(100)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        shards._opened.cache_clear()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loader_processes_read_what_this_process_reads(start, tar):
    files = ImageFiles(paths_in(tar), SIZE)
    expected = torch.stack([files[i] for i in range(8)])
    loader = DataLoader(files, 2, num_workers=2, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(loader)), expected)


def test_a_cache_of_images_in_a_tar_is_made_anew_when_the_tar_changes(tar, tmp_path):
    folder, files = tmp_path / "cache", ImageFiles(paths_in(tar), SIZE)
    expected = torch.stack([files[i] for i in range(8)])
    files.use_cache(folder)
    assert torch.equal(torch.stack([files[i] for i in range(8)]), expected)
    os.utime(tar, ns=(0, 10**9))
    files.use_cache(folder)
    assert len(list(folder.glob("images-*.npy"))) == 2


def test_equal_images_are_found_within_and_outside_tars(tmp_path):
    content = {"a.bmp": picture(1), "b.bmp": picture(2), "c.bmp": picture(1)}
    paths = paths_in(write_tar(tmp_path / "a.tar", with_captions(content)))
    (tmp_path / "d.bmp").write_bytes(picture(2))
    assert same_content([*paths, str(tmp_path / "d.bmp")]) == [0, 1, 0, 1]
    assert image_status(paths[0]).size == len(picture(1))


def test_a_stored_data_set_is_read_again_when_a_tar_changes_in_place(tar, tmp_path, caplog):
    root, cache = tmp_path / "set", str(tmp_path / "cache")
    (root / "shards").mkdir(parents=True)
    shutil.copy(tar, root / "shards")
    rows = [json.loads(line) for line in index_shard(root, "shards/a.tar", "train").lines]
    rows[-1] |= {"split": "test", "id": 1}
    (root / "dataset.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first = read("custom", root, image_cache=cache)
    assert str(root / "shards/a.tar") in first.folders and len(first.train) == 7
    assert list(read("custom", root, image_cache=cache).train) == list(first.train)
    assert "read again" not in caplog.text
    os.truncate(root / "shards/a.tar", 3000)
    message = "dataset.jsonl, line 2: image shards/a.tar@.* has only 3000 bytes"
    with pytest.raises(UserError, match=message):
        read("custom", root, image_cache=cache)
    assert "a.tar has changed" in caplog.text
