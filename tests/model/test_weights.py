"""Weights by name: downloaded from a server on this machine, or put into the cache by hand."""

import hashlib
import http.server
import io
import json
import threading

import open_clip
import pytest
import safetensors.torch
import torch
from open_clip import pretrained

import model.weights as module
from model.backbone import load_backbone
from model.build import build_evaluation_model
from model.weights import config_from_name, parse_choice
from tests.helpers import golden_clip, noise, options
from utils.errors import UserError

# The golden CLIP's shapes, but with two heads of 32 channels in the text encoder and plain GELU.
TINY = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16},
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2,
    },
}  # fmt: skip
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A model `tiny-clip` in open_clip's registry, with the tag `here`, and an empty cache."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/tiny-clip.json").write_text(json.dumps(TINY))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))  # fmt: skip
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    open_clip.add_model_config(tmp_path / "configs")
    entry = {"url": "", "hf_hub": "", "mean": MEAN, "std": STD}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-clip", {"here": entry})
    monkeypatch.setattr(module, "WEIGHTS_CACHE", tmp_path / "cache")
    return entry


class Server:
    """Serves bytes by path on this machine, and records the requested paths."""

    def __init__(self) -> None:
        self.files, self.requested = {}, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                content = outer.files.get(self.path)
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
                self.send_header("X-Repo-Commit", "0" * 40)
                self.end_headers()
                return content

            def do_GET(self):
                outer.requested.append(self.path)
                self.wfile.write(self.do_HEAD() or b"")

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def as_bytes(weights) -> bytes:
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


def test_weights_are_downloaded_once_and_their_checksum_is_verified(tiny, server, tmp_path):
    content = as_bytes(golden_clip())
    digest = hashlib.sha256(content).hexdigest()
    path = f"/openaipublic/{digest}/tiny.pt"
    tiny["url"] = server.url + path
    server.files[path] = content
    for _ in range(2):
        loaded = load_backbone("tiny-clip/here", (96, 32)).state_dict()
        assert torch.equal(loaded["visual.proj"], golden_clip()["visual.proj"])
    assert server.requested == [path]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["tiny.pt"]


def test_a_download_with_a_wrong_checksum_is_refused(tiny, server):
    path = f"/openaipublic/{'0' * 64}/tiny.pt"
    tiny["url"] = server.url + path
    server.files[path] = as_bytes(golden_clip())
    with pytest.raises(UserError, match="could not be downloaded .*SHA256 checksum does not"):
        load_backbone("tiny-clip/here", (96, 32))


def test_a_hugging_face_tag_is_downloaded_as_safetensors(tiny, server, monkeypatch):
    import huggingface_hub.constants as constants

    tiny["hf_hub"] = "someone/tiny/"
    content = safetensors.torch.save(golden_clip())
    path = "/someone/tiny/resolve/main/open_clip_model.safetensors"
    server.files[path] = content
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE",
        server.url + "/{repo_id}/resolve/{revision}/{filename}",
    )  # fmt: skip
    loaded = load_backbone("tiny-clip/here", (96, 32)).state_dict()
    assert torch.equal(loaded["visual.proj"], golden_clip()["visual.proj"])
    assert server.requested.count(path) == 1
    server.http.shutdown()  # a downloaded file needs no network
    server.http.server_close()
    reloaded = load_backbone("tiny-clip/here", (96, 32)).state_dict()
    assert torch.equal(reloaded["visual.proj"], loaded["visual.proj"])


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@torch.no_grad()
def test_a_tagged_model_equals_open_clips_and_keeps_its_input_statistics(tiny, suffix, tmp_path):
    (tmp_path / "cache").mkdir()
    path = tmp_path / f"cache/tiny-clip-here.{suffix}"
    if suffix == "pt":
        torch.save(golden_clip(), path)
    else:
        safetensors.torch.save_file(golden_clip(), path)
    backbone = load_backbone("tiny-clip/here", (64, 64)).eval()
    assert (backbone.config.image_mean, backbone.config.image_std) == (MEAN, STD)
    reference = open_clip.create_model("tiny-clip").eval()
    reference.load_state_dict(golden_clip(), strict=False)
    weights = reference.state_dict()
    # open_clip resizes no position embedding here: 64 / 16 is the golden grid, 4 x 4.
    assert weights["visual.positional_embedding"].shape[0] == 17
    backbone.load_state_dict({n: v for n, v in weights.items() if n in backbone.state_dict()})
    assert_equal_encoders(backbone, reference)


def assert_equal_encoders(backbone, reference):
    images, ids = noise((2, 3, 64, 64), 1), open_clip.tokenize(["a man", "a woman in red"])
    torch.testing.assert_close(backbone.encode_images(images)[0], reference.encode_image(images))
    torch.testing.assert_close(backbone.encode_captions(ids)[0], reference.encode_text(ids))


def as_checkpoint(backbone):
    return {"model": {f"base_model.{n}": v for n, v in backbone.state_dict().items()}}


@torch.no_grad()
def test_a_checkpoint_of_a_tagged_model_evaluates_without_its_weights_file(tiny, tmp_path):
    """Shapes do not show heads and activation; the name in configs.yaml gives them."""
    path = tmp_path / "cache/tiny-clip-here.pt"
    path.parent.mkdir()
    torch.save(golden_clip(), path)
    backbone = load_backbone("tiny-clip/here", (96, 32)).eval()
    path.unlink()
    checkpoint, ids = as_checkpoint(backbone), open_clip.tokenize(["a man with a bag"])
    expected = backbone.encode_captions(ids)[0]
    args = options(pretrain_choice="tiny-clip/here")
    named = build_evaluation_model(args, checkpoint, "best.pth").eval()
    assert torch.equal(named.encode_text(ids), expected)
    unnamed = build_evaluation_model(options(), checkpoint, "best.pth").eval()
    assert not torch.equal(unnamed.encode_text(ids), expected)


def test_without_a_network_the_message_says_which_file_to_put_where(tiny, monkeypatch, tmp_path):
    def no_network(config, cache_dir):
        raise OSError("network unreachable")

    monkeypatch.setattr(module, "download_pretrained", no_network)
    monkeypatch.setattr(module, "_check_hub_reachable", lambda config: None)
    cache = tmp_path / "cache"
    for choice, file, source in (
        ("ViT-B/16", "ViT-B-16.pt", "https://openaipublic.*/ViT-B-16.pt"),
        ("RN50x4", "RN50x4.pt", "https://openaipublic.*/RN50x4.pt"),
        ("ViT-B-16/laion2b_s34b_b88k", "ViT-B-16-laion2b_s34b_b88k.safetensors", "huggingface.co/laion"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"not at {cache}/{file} .*unreachable.*{source}"):
            load_backbone(choice, (96, 32))


def test_an_unreachable_hub_is_an_error_at_once(tiny, server, monkeypatch):
    import huggingface_hub.constants as constants

    server.http.shutdown()
    server.http.server_close()
    tiny["hf_hub"] = "someone/tiny/"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(module.urllib.request, "getproxies", dict)
    monkeypatch.setattr(module, "download_pretrained", None)  # would be a TypeError
    with pytest.raises(
        UserError, match="Connection refused.*open_clip_model.safetensors .*someone/tiny"
    ):
        load_backbone("tiny-clip/here", (96, 32))


def test_every_plain_clip_of_open_clip_is_supported_and_other_models_are_refused():
    plain, refused = 0, 0
    for name in open_clip.list_models():
        for tag in pretrained.list_pretrained_tags_by_model(name):
            assert parse_choice(f"{name}/{tag}") == (name, tag, "")
            try:
                config = config_from_name(name, tag)
            except UserError as error:
                refused += 1
                assert "is not a plain CLIP" in str(error)
            else:
                plain += 1
                assert config.vocab_size == 49408
    assert plain > 60 and refused > 60
    large = config_from_name("ViT-L-14", "laion2b_s32b_b82k")
    assert large.image_mean == (0.5, 0.5, 0.5) and not large.quick_gelu
    assert config_from_name("ViT-L-14", "openai").quick_gelu
    assert config_from_name("ViT-H-14", "laion2b_s32b_b79k").head_width == 80


def test_an_unknown_tag_is_refused_with_a_suggestion():
    with pytest.raises(UserError, match="no weights 'laion2b_s34b' of ViT-B-16. Did you mean"):
        load_backbone("ViT-B-16/laion2b_s34b", (96, 32))


@pytest.mark.parametrize(
    ("choice", "parts"),
    [
        ("ViT-B/16", ("ViT-B-16", "openai", "")),
        ("ViT-L/14@336px", ("ViT-L-14-336", "openai", "")),
        ("ViT-B-16@a/b.pt", ("ViT-B-16", "", "a/b.pt")),
        ("ViT-B-16-quickgelu@a@b.pt", ("ViT-B-16-quickgelu", "", "a@b.pt")),
        ("ViT-L/14@336px@x.pt", ("ViT-L-14-336", "openai", "x.pt")),
        ("ViT-L-14/laion2b_s32b_b82k@x.pt", ("ViT-L-14", "laion2b_s32b_b82k", "x.pt")),
        ("runs@home/clip.pt", ("", "", "runs@home/clip.pt")),
        ("ViT-B-16", ("", "", "ViT-B-16")),
    ],
)
def test_a_choice_is_parsed_into_model_tag_and_file(choice, parts):
    assert parse_choice(choice) == parts


@pytest.mark.parametrize(("choice", "mean"), [("tiny-clip", None), ("tiny-clip/here", MEAN)])
@torch.no_grad()
def test_a_file_after_a_models_name_is_built_as_that_model(choice, mean, tiny, tmp_path):
    """Its heads and activation differ from those assumed for its shapes; also without the file."""
    path = tmp_path / "mine.pt"
    torch.save({"state_dict": {f"module.{n}": v for n, v in golden_clip().items()}}, path)
    backbone = load_backbone(f"{choice}@{path}", (64, 64)).eval()
    reference = open_clip.create_model("tiny-clip").eval()
    reference.load_state_dict(golden_clip(), strict=False)
    assert_equal_encoders(backbone, reference)
    assert backbone.config.image_mean == (mean or open_clip.OPENAI_DATASET_MEAN)
    assert not backbone.notes
    path.unlink()
    args = options(pretrain_choice=f"{choice}@{path}", img_size=[64, 64])
    model = build_evaluation_model(args, as_checkpoint(backbone), "best.pth").eval()
    ids = open_clip.tokenize(["a man", "a woman in red"])
    assert torch.equal(model.encode_text(ids), backbone.encode_captions(ids)[0])
    assert model.base_model.config == backbone.config


def test_the_assumptions_about_a_file_without_a_name_are_noted(tiny, clip_file, tmp_path):
    note = load_backbone(str(clip_file), (64, 64)).notes[0]
    assert note.startswith(
        f"{clip_file}: assumed to be an OpenAI CLIP, with heads of 64 channels, Quick"
    )
    assert note.endswith(f"--pretrain_choice MODEL@{clip_file}; its shapes are those of tiny-clip")


def test_mistakes_in_naming_a_file_are_refused_with_the_reason(tiny, clip_file):
    for choice, message in (
        ("ViT-B-16@none.pt", "ViT-B-16@none.pt: none.pt: no such file"),
        ("ViT-B-16@", "no file after the @"),
        ("ViT-B-61@x.pt", "neither a file nor one of .* MODEL@FILE. Did you mean 'ViT-B-16'"),
        ("ViT-B-16", "'ViT-B-16' is a model of open_clip: add /TAG or @FILE for its weights"),
        (f"ViT-B-16/here@{clip_file}", "open_clip has no weights 'here' of ViT-B-16"),
        (f"ViT-B-16@{clip_file}", "not a complete ViT-B-16: .*missing"),
    ):
        with pytest.raises(UserError, match=message):
            load_backbone(choice, (64, 64))
    checkpoint = {"model": {f"base_model.{n}": v for n, v in golden_clip().items()}}
    with pytest.raises(UserError, match="ViT-B-16@x.pt: the checkpoint has another architecture"):
        build_evaluation_model(options(pretrain_choice="ViT-B-16@x.pt"), checkpoint, "best.pth")


def test_a_checkpoint_with_base_model_names_is_refused_with_a_hint_to_finetune(tmp_path):
    path = tmp_path / "best.pth"
    torch.save({"model": {f"base_model.{n}": v for n, v in golden_clip().items()}}, path)
    with pytest.raises(UserError, match=r"use --finetune for weights named base_model.\*"):
        load_backbone(str(path), (64, 64))
