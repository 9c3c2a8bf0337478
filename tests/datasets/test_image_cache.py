import os

import numpy as np
import pytest
import torch

from datasets.image_cache import ImageFiles
from datasets.loaders import image_loader, train_loader
from tests.helpers import options, read
from utils.errors import UserError

CPU = torch.device("cpu")


def files(root, size=(96, 32)) -> ImageFiles:
    paths = [s.image.path for s in read("AGData", root).train]
    return ImageFiles([*paths, paths[0]], size)  # one image twice


def all_of(images: ImageFiles) -> torch.Tensor:
    return torch.stack([images[i] for i in range(len(images))])


def test_cached_images_equal_decoded_ones_and_are_stored_once(mini_root, tmp_path):
    plain, cached = files(mini_root), files(mini_root)
    cached.use_cache(tmp_path / "cache")
    assert torch.equal(all_of(plain), all_of(cached))
    (path,) = (tmp_path / "cache").glob("*.npy")
    assert np.load(path).shape == (len(cached) - 1, 3, 96, 32)


def test_a_cache_is_made_once_and_again_for_another_size_or_a_changed_file(mini_copy, tmp_path):
    files(mini_copy).use_cache(tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*.npy")
    made = path.stat().st_mtime_ns
    files(mini_copy).use_cache(tmp_path / "cache")
    assert path.stat().st_mtime_ns == made
    files(mini_copy, (64, 32)).use_cache(tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2
    changed = files(mini_copy)
    with open(changed.paths[1], "rb") as source:
        data = source.read()
    with open(changed.paths[0], "wb") as target:
        target.write(data)
    os.utime(changed.paths[0], ns=(1, 1))
    changed.use_cache(tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 3
    assert torch.equal(changed[0], changed[1])


def test_loaders_give_the_same_batches_with_a_cache_and_with_processes(mini_root, tmp_path):
    data = read("AGDataAttr", mini_root)

    def batches(**values):
        args = options(root_dir=str(mini_root), **values)
        train = train_loader(data, args, CPU)
        test = image_loader(data.splits["test"].galleries["aerial"].images, args, CPU)
        return [b["pair_images"] for b in train] + list(test)

    plain = batches()
    for workers in (2, 0):
        cached = batches(image_cache=str(tmp_path / f"{workers}"), num_workers=workers)
        assert all(torch.equal(a, b) for a, b in zip(plain, cached, strict=True))


def test_a_broken_image_is_an_error_and_leaves_no_cache_file(mini_copy, tmp_path):
    images = files(mini_copy)
    with open(images.paths[2], "wb") as file:
        file.write(b"no image")
    with pytest.raises(UserError, match=f"{images.paths[2]}.*the image cannot be read"):
        images.use_cache(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_a_truncated_cache_and_a_folder_that_is_a_file_are_refused(mini_root, tmp_path):
    images = files(mini_root)
    images.use_cache(tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*.npy")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=f"{path}: the cache cannot be read: .*; delete it"):
        files(mini_root).use_cache(tmp_path / "cache")
    with pytest.raises(UserError, match="could not be written"):
        files(mini_root).use_cache(path)
