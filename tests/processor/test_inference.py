"""Features of `load_run` are those of the evaluation."""

import shutil
import textwrap

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image as PILImage

from datasets.transforms import read_image
from processor import inference
from processor.inference import load_run
from tests.helpers import options
from tests.reliability.runs import train_small_run
from utils.errors import UserError


@pytest.fixture(scope="module")
def folder(mini_root, tmp_path_factory):
    return train_small_run(mini_root, tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def trained(folder):
    return load_run(folder, device="cpu")


@pytest.fixture(scope="module")
def expected(trained):
    """The test split and its features, from the evaluator."""
    evaluator = trained.evaluator("test")
    return evaluator.split, evaluator.encode(trained.model)


@pytest.mark.parametrize("workers", [0, 2])
def test_features_equal_the_evaluators_to_the_last_bit(folder, expected, workers):
    split, features = expected
    trained = load_run(folder, device="cpu", num_workers=workers)
    assert torch.equal(trained.encode_text(split.captions, normalize=False), features.captions)
    for view, gallery in split.galleries.items():
        paths = [image.path for image in gallery.images]
        assert len(paths) > trained.args.test_batch_size  # several batches
        found = trained.encode_image(paths, normalize=False)
        assert torch.equal(found, features.views[view])
    assert found.dtype == torch.float32 and found.device.type == "cpu" and not found.requires_grad
    assert not trained.notes and trained.epoch and not trained.model.training


def test_features_have_unit_length_so_that_products_are_cosines(trained, expected):
    split, features = expected
    paths = [image.path for image in split.galleries["aerial"].images]
    scores_QG = trained.encode_text(split.captions) @ trained.encode_image(paths).T
    cosines_QG = F.cosine_similarity(features.captions[:, None], features.views["aerial"], dim=2)
    torch.testing.assert_close(scores_QG, cosines_QG, rtol=0, atol=1e-6)


def test_a_pil_image_gives_the_features_of_its_file_upright_and_resized(
    trained, expected, tmp_path
):
    image = PILImage.open(expected[0].galleries["ground"].images[0].path).convert("RGB")
    exif = image.getexif()
    exif[274] = 6  # to be turned by a quarter
    for name, more in {"a.png": {}, "b.jpg": {}, "turned.jpg": {"exif": exif}}.items():
        path = tmp_path / name
        image.resize((24, 48)).save(path, **more)  # too small to be decoded smaller
        given = [path, str(path), PILImage.open(path), read_image(path)]
        found = trained.encode_image(given)
        assert len(found) == 4 and (found == found[0]).all(), name
        torch.testing.assert_close(trained.encode_image(PILImage.open(path)), found[:1])


def test_the_example_of_the_module_runs(folder, expected, capsys):
    code = textwrap.dedent(inference.__doc__.split("\n", 2)[2].split("Shapes:")[0])
    paths = [image.path for image in expected[0].galleries["aerial"].images[:3]]
    code = code.replace("logs/AGDataAttr/<run>", str(folder))
    for number, path in enumerate(paths, 1):
        code = code.replace(f"000{number}.jpg", path)
    exec(code)
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split("  ")[1] for line in lines) == sorted(paths)
    assert lines == sorted(lines, key=lambda line: -float(line.split()[0]))


def test_nothing_gives_no_features_and_a_single_caption_one(trained):
    empty = trained.encode_text([])
    assert empty.shape == trained.encode_image([]).shape == (0, 64)
    assert (empty @ trained.encode_image([]).T).shape == (0, 0)
    assert trained.encode_text("a man with a bag").shape == (1, 64)


def test_a_broken_image_is_told_with_its_path(trained, tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"no image")
    for name, reason in ((path, "it is none of JPEG"), (tmp_path / "gone.jpg", "No such file")):
        with pytest.raises(UserError, match=f"{name}: the image cannot be read: {reason}"):
            trained.encode_image([name])


def test_a_cache_and_attributes_named_by_a_run_of_elsewhere_are_not_used(folder, tmp_path):
    run = shutil.copytree(folder, tmp_path / "run")
    values = yaml.safe_load((run / "configs.yaml").read_text())
    theirs = tmp_path / "theirs"
    values |= {"image_cache": str(theirs), "attributes_file": str(theirs / "a.yaml"), "foo": 1}
    (run / "configs.yaml").write_text(yaml.safe_dump(values))
    trained = load_run(run, device="cpu")
    features = trained.evaluator().encode(trained.model).views["aerial"]
    assert not theirs.exists() and trained.args.image_cache == ""
    assert len(trained.notes) == 3 and "unknown here: foo" in trained.notes[0]
    assert "its image_cache is not trusted" in trained.notes[1]
    mine = load_run(
        run, device="cpu", image_cache=tmp_path / "mine", attributes_file=options().attributes_file
    )
    assert torch.equal(mine.evaluator().encode(mine.model).views["aerial"], features)
    assert list((tmp_path / "mine").glob("*.npy")) and len(mine.notes) == 1


def test_options_may_be_others_than_recorded(folder, trained, mini_copy):
    other = load_run(str(folder), "last.pth", device="cpu", root_dir=mini_copy, batch_size=3, precision="fp64")  # fmt: skip
    assert other.data().root == str(mini_copy) != trained.data().root
    assert other.args.test_batch_size == 3 and other.encode_text("a man").dtype == torch.float64
    with pytest.raises(UserError, match="load_run: precision is 'int8'; choose one of: auto, fp32"):
        load_run(folder, precision="int8")


@pytest.mark.parametrize("gone", ["configs.yaml", "best.pth"])
def test_a_folder_without_a_run_is_told_in_one_line(folder, gone, tmp_path):
    run = shutil.copytree(folder, tmp_path / "run")
    (run / gone).unlink()
    with pytest.raises(UserError, match=rf"{run / gone}: no such file; load_run takes the folder of a run .*$"):  # fmt: skip
        load_run(run)
