"""`load_run` gives the features of the evaluation."""

import shutil
import textwrap

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image as PILImage

from datasets.images import read_image
from processor import inference
from processor.inference import load_run
from tests.helpers import ROOT, options
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
def test_features_are_bit_identical_to_the_evaluators(folder, expected, workers):
    split, features = expected
    trained = load_run(folder, device="cpu", num_workers=workers)
    assert torch.equal(trained.encode_text(split.captions, normalize=False), features.captions)
    for view, gallery in split.galleries.items():
        paths = [image.path for image in gallery.images]
        assert len(paths) > trained.args.test_batch_size  # several batches
        images = trained.encode_image(paths, normalize=False)
        assert torch.equal(images, features.views[view])
    assert images.dtype == torch.float32 and images.device.type == "cpu"
    assert not images.requires_grad
    assert not trained.notes and trained.epoch and not trained.model.training


def test_a_caption_with_any_punctuation_has_the_same_features_in_any_batch(trained):
    captions = [
        "a man wears a coat with the word 'go!'.",
        "a man with a bag " * 8,
        "her shirt: 'Hey!'.",
    ]
    alone = torch.cat([trained.encode_text(caption) for caption in captions])
    torch.testing.assert_close(trained.encode_text(captions), alone, rtol=0, atol=1e-5)
    assert (alone @ alone.T).tril(-1).max() < 0.9999  # three different features


def test_loading_leaves_the_random_numbers_of_the_caller(folder):
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    load_run(folder, device="cpu")
    assert torch.equal(torch.rand(3), expected)


def test_features_have_unit_length_so_products_are_cosines(trained, expected):
    split, features = expected
    paths = [image.path for image in split.galleries["aerial"].images]
    scores_QG = trained.encode_text(split.captions) @ trained.encode_image(paths).T
    cosines_QG = F.cosine_similarity(features.captions[:, None], features.views["aerial"], dim=2)
    torch.testing.assert_close(scores_QG, cosines_QG, rtol=0, atol=1e-6)


def test_a_pil_image_is_rotated_by_exif_and_gives_the_features_of_its_file(
    trained, expected, tmp_path
):
    image = PILImage.open(expected[0].galleries["ground"].images[0].path).convert("RGB")
    exif = image.getexif()
    exif[274] = 6  # orientation: rotate by 90 degrees
    for name, values in {"a.png": {}, "b.jpg": {}, "rotated.jpg": {"exif": exif}}.items():
        path = tmp_path / name
        image.resize((24, 48)).save(path, **values)  # small, so a JPEG is decoded at its size
        features = trained.encode_image([path, str(path), PILImage.open(path), read_image(path)])
        assert len(features) == 4 and (features == features[0]).all(), name
        torch.testing.assert_close(trained.encode_image(PILImage.open(path)), features[:1])


def test_the_example_in_the_modules_docstring_runs(folder, expected, capsys):
    code = textwrap.dedent(inference.__doc__.split("\n", 2)[2].split("Shapes:")[0])
    paths = [image.path for image in expected[0].galleries["aerial"].images[:3]]
    code = code.replace("logs/AGDataAttr/<run>", str(folder))
    for number, path in enumerate(paths, 1):
        code = code.replace(f"000{number}.jpg", path)
    exec(code)
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split("  ")[1] for line in lines) == sorted(paths)
    assert lines == sorted(lines, key=lambda line: -float(line.split()[0]))


def test_an_empty_list_gives_no_features_and_a_single_caption_one(trained):
    empty = trained.encode_text([])
    assert empty.shape == trained.encode_image([]).shape == (0, 64)
    assert (empty @ trained.encode_image([]).T).shape == (0, 0)
    assert trained.encode_text("a man with a bag").shape == (1, 64)


def test_a_broken_image_is_reported_with_its_path(trained, tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"no image")
    for name, reason in ((path, "it is not one of JPEG"), (tmp_path / "gone.jpg", "No such file")):
        with pytest.raises(UserError, match=f"{name}: the image cannot be read: {reason}"):
            trained.encode_image([name])


def test_a_cache_and_attributes_named_in_an_untrusted_config_are_not_used(folder, tmp_path):
    run = shutil.copytree(folder, tmp_path / "run")
    values = yaml.safe_load((run / "configs.yaml").read_text())
    untrusted = tmp_path / "untrusted"
    values |= {
        "image_cache": str(untrusted),
        "attributes_file": str(untrusted / "a.yaml"),
        "foo": 1,
    }
    (run / "configs.yaml").write_text(yaml.safe_dump(values))
    trained = load_run(run, device="cpu")
    features = trained.evaluator().encode(trained.model).views["aerial"]
    assert not untrusted.exists() and trained.args.image_cache == ""
    assert len(trained.notes) == 2 and "unknown here: foo" in trained.notes[0]
    assert "its attributes_file is not trusted" in trained.notes[1]  # it uses no cache
    cache, attributes_file = tmp_path / "cache", options().attributes_file
    trusted = load_run(run, device="cpu", image_cache=cache, attributes_file=attributes_file)
    assert torch.equal(trusted.evaluator().encode(trusted.model).views["aerial"], features)
    assert list(cache.glob("*.npy")) and len(trusted.notes) == 1


def test_an_evaluation_refuses_sentences_of_other_attributes_than_the_labels(folder, tmp_path):
    """Otherwise the accuracies would compare one attribute's labels with another's predictions."""
    attributes = yaml.safe_load((ROOT / "configs/attributes.yaml").read_text())
    (tmp_path / "attributes.yaml").write_text(yaml.safe_dump(attributes[::-1], sort_keys=False))
    trained = load_run(folder, device="cpu", attributes_file=tmp_path / "attributes.yaml")
    with pytest.raises(UserError, match="the labels of AGDataAttr are gender .*; give --attrib"):
        trained.evaluator("test")


def test_options_may_differ_from_configs_yaml(folder, trained, mini_copy):
    other = load_run(str(folder), "last.pth", device="cpu", root_dir=mini_copy, batch_size=3, precision="fp64")  # fmt: skip
    assert other.data().root == str(mini_copy) != trained.data().root
    assert other.args.test_batch_size == 3 and other.encode_text("a man").dtype == torch.float64
    with pytest.raises(UserError, match="load_run: precision is 'int8'; choose one of: auto, fp32"):
        load_run(folder, precision="int8")


@pytest.mark.parametrize("missing", ["configs.yaml", "best.pth"])
def test_a_folder_without_a_run_is_refused_in_one_line(folder, missing, tmp_path):
    run = shutil.copytree(folder, tmp_path / "run")
    (run / missing).unlink()
    with pytest.raises(UserError, match=rf"{run / missing}: no such file; give the folder of a run .*$"):  # fmt: skip
        load_run(run)
