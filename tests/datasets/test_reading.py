"""Image folders as other systems write them: spellings of paths, permissions."""

import os
import unicodedata

import pytest

from datasets.reading import ImageFolder, exists
from utils.errors import UserError


@pytest.fixture
def folder(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD"))
    for path in (
        "a/1.jpg",
        f"a/{composed}",
        "über/b/2.jpg",
        f"decomposed/{decomposed}",
        "back\\slash.jpg",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    return tmp_path


def test_images_are_found_by_the_paths_of_other_systems(folder):
    images = ImageFolder(folder)
    decomposed = unicodedata.normalize("NFD", "é")
    for asked, path in {
        "a/1.jpg": "a/1.jpg", "a\\1.jpg": "a/1.jpg", "./a//1.jpg": "a/1.jpg", ".\\a\\1.jpg": "a/1.jpg",
        f"a/{decomposed}.jpg": "a/é.jpg", f"a\\{decomposed}.jpg": "a/é.jpg",
        "decomposed/é.jpg": f"decomposed/{decomposed}.jpg",
        unicodedata.normalize("NFD", "über\\b\\2.jpg"): "über/b/2.jpg",
        "back\\slash.jpg": "back\\slash.jpg",
    }.items():  # fmt: skip
        assert images.find(asked, "x") == str(folder / path)


def test_an_exact_name_is_preferred_to_another_spelling(folder):
    decomposed = unicodedata.normalize("NFD", "é")
    (folder / f"a/{decomposed}.jpg").touch()
    for name in ("é", decomposed):
        assert ImageFolder(folder).find(f"a/{name}.jpg", "x") == str(folder / f"a/{name}.jpg")


@pytest.mark.parametrize("path", ["a/2.jpg", "a", "", "no/1.jpg", "a/1.jpg/2", "\0", "a/\ud800"])  # fmt: skip
def test_a_missing_image_is_refused(path, folder):
    with pytest.raises(UserError, match="entry 3: image .* is missing in"):
        ImageFolder(folder).find(path, "entry 3")


@pytest.mark.parametrize(
    "path", ["../a/1.jpg", "a/../1.jpg", "..\\a\\1.jpg", "a\\..\\..\\x", "/etc/x"]
)
def test_a_path_that_leaves_the_folder_is_refused(path, folder):
    with pytest.raises(UserError, match="leaves the data set's folder"):
        ImageFolder(folder / "a").find(path, "entry 3")


def test_a_folder_without_access_is_not_reported_as_missing(folder, monkeypatch):
    scandir, stat = os.scandir, os.stat

    def without_access(call):
        def refuse(path, *args, **kwargs):
            if "a" in os.fspath(path).split("/")[-2:]:
                raise PermissionError(13, "Permission denied", path)
            return call(path, *args, **kwargs)

        return refuse

    monkeypatch.setattr(os, "scandir", without_access(scandir))
    with pytest.raises(
        UserError, match="entry 3: image a.1.jpg: .*a cannot be read: Permission den"
    ):
        ImageFolder(folder).find("a/1.jpg", "entry 3")
    assert ImageFolder(folder).find("über/b/2.jpg", "x")
    monkeypatch.setattr(os, "stat", without_access(stat))
    with pytest.raises(UserError, match="a/x: Permission denied"):
        exists(folder / "a/x")
    monkeypatch.undo()
    assert exists(folder / "a") and not exists(folder / "a/x") and not exists(folder / "a/1.jpg/x")
