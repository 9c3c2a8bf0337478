"""Features of the construction are those of the model; scores and classes are kept."""

import pytest
import torch
import torch.nn.functional as F

from construction.clip import ZeroShot, load_encoder, scores
from construction.recipe import Clip
from construction.store import Store
from datasets.text import tokenize
from datasets.transforms import load_image, normalise
from model.backbone import load_backbone
from processor.inference import load_run
from tests.construction.helpers import candidate
from tests.reliability.runs import train_small_run
from utils.attributes import Attribute
from utils.errors import UserError

TEXTS = ["a man in a grey shirt with a black backpack", "a woman in a red dress and white shoes"]


@pytest.fixture
def encoder(clip_file):
    return load_encoder(Clip(pretrain_choice=str(clip_file), img_size=(96, 32)), "cpu")


@pytest.fixture
def pictures(tmp_path):
    measures = [candidate(tmp_path, n).measure for n in range(5)]
    return [(m.sha256, m.file) for m in measures]


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store") as store:
        yield store


def test_features_are_those_of_the_vanilla_weights(encoder, pictures, clip_file):
    files = [file for _, file in pictures]
    backbone = load_backbone(str(clip_file), (96, 32)).eval()
    images = normalise(torch.stack([load_image(file, (96, 32)) for file in files]))
    with torch.no_grad():
        image_BD = F.normalize(backbone.encode_images(images)[0])
        text_BD = F.normalize(backbone.encode_captions(tokenize(TEXTS, 77))[0])
    torch.testing.assert_close(encoder.encode_images(files), image_BD, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), text_BD, rtol=0, atol=1e-5)
    repeated = [files[0], files[1], files[0]]
    expected = (image_BD[[0, 1, 0]] * text_BD[[0, 1, 1]]).sum(dim=1).tolist()
    assert encoder.cosines(repeated, [*TEXTS, TEXTS[1]]) == pytest.approx(expected, abs=1e-4)


def test_features_of_a_run_are_those_of_load_run(mini_root, tmp_path, pictures):
    folder = train_small_run(mini_root, tmp_path / "logs")
    files = [file for _, file in pictures]
    encoder, run = load_encoder(Clip(run=str(folder)), "cpu"), load_run(folder, device="cpu")
    torch.testing.assert_close(encoder.encode_images(files), run.encode_image(files))
    torch.testing.assert_close(encoder.encode_texts(TEXTS), run.encode_text(TEXTS))


def test_another_input_or_other_weights_have_another_name(encoder, clip_file, tmp_path):
    weights = torch.load(clip_file)
    weights["text_projection"] += 1
    torch.save(weights, tmp_path / "other.pt")
    size = Clip(pretrain_choice=str(clip_file), img_size=(64, 32))
    other = Clip(pretrain_choice=str(tmp_path / "other.pt"), img_size=(96, 32))
    same = Clip(pretrain_choice=str(clip_file), img_size=(96, 32))
    names = {load_encoder(clip, "cpu").name for clip in (size, other, same)}
    assert len(names) == 3 and encoder.name in names


def test_scores_are_kept(encoder, pictures, store, monkeypatch):
    items = [(picture, text) for picture in pictures for text in TEXTS]
    monkeypatch.setattr("construction.clip.BATCH", 3)
    found = scores(items, encoder, store)
    assert found == pytest.approx(
        encoder.cosines([f for (_, f), _ in items], [t for _, t in items])
    )
    monkeypatch.setattr(type(encoder), "cosines", None)  # it would fail if it were called
    assert scores(items[::-1], encoder, store) == found[::-1]


def test_a_class_is_that_of_the_nearest_sentences(encoder, pictures, store, monkeypatch):
    attributes = [
        Attribute(
            "light", ("bright", "dim"), (("It is bright.", "It is light."), ("It is dark.",))
        ),
        Attribute("gender", ("male", "female"), (("A man.",), ("A woman.",))),
    ]
    monkeypatch.setattr("construction.clip.BATCH", 2)
    zero_shot = ZeroShot(attributes, encoder, store)
    zero_shot.prepare(pictures)
    for sha256, file in pictures:
        image_1D = encoder.encode_images([file])
        bright_D = F.normalize(
            encoder.encode_texts(["It is bright.", "It is light."]).mean(0), dim=0
        )
        class_2D = torch.stack([bright_D, encoder.encode_texts(["It is dark."])[0]])
        share, number = (100 * image_1D @ class_2D.T).softmax(dim=1).max(dim=1)
        value, confidence = zero_shot.label(sha256, "light")
        assert value == ("bright", "dim")[number] and confidence == pytest.approx(
            share.item(), abs=1e-3
        )
        assert zero_shot.label(sha256, "gender")[0] in ("male", "female")
    monkeypatch.setattr(type(encoder), "encode_images", None)
    zero_shot.prepare(pictures)


def test_weights_that_cannot_be_had_are_an_error(tmp_path):
    with pytest.raises(UserError, match="configs.yaml: no such file; clip.run takes"):
        load_encoder(Clip(run=str(tmp_path)))
    with pytest.raises(UserError, match="scratch has no weights"):
        load_encoder(Clip(pretrain_choice="scratch"))
    with pytest.raises(UserError, match="neither a file nor one of"):
        load_encoder(Clip(pretrain_choice="ViT-B/61"))
