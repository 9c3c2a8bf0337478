"""Encoding: pictures to features and attributes, by a run or by vanilla weights.

    encoder = load_encoder("logs/AGDataAttr/<run>")     # or: load_encoder(gallery.manifest)
    text_QD = encoder.encode_text(["a man in a grey shirt"])

Shapes: G images, Q captions, B batch size, D width of the features, A attributes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gallery.frames import Chunk
from gallery.manifest import check_encoder
from gallery.records import SURE, Guesses
from model.weights import find_weights, parse_choice
from processor.evaluator import encode_images
from processor.inference import Picture, Run, load_pretrained, load_run, run_files
from utils.attributes import read_attributes
from utils.devices import autocast
from utils.errors import UserError
from utils.files import expand, file_hash


class Encoded(NamedTuple):
    """Features [B, D] float16 of unit length; for each attribute classes and scores [B]."""

    features: Tensor
    classes: Tensor  # [B, A] int64
    scores: Tensor  # [B, A] float32


class Encoder:
    """A model that encodes captions and images into one space.

    Attributes:
        about: what a manifest says of it: kind ("run" or "weights"), name, folder, checkpoint,
            sha256, pretrain_choice, img_size, stride_size, text_length, embed_dim, precision.
        attributes: the classes of each attribute that FIRM's head tells; {} without that head.
    """

    def __init__(self, run: Run, about: dict[str, Any]) -> None:
        args, self.run, self.device = run.args, run, run.device
        self.about = about | {
            "pretrain_choice": args.pretrain_choice, "img_size": list(args.img_size),
            "stride_size": args.stride_size, "text_length": args.text_length,
            "embed_dim": run.model.feature_dim, "precision": args.precision,
        }  # fmt: skip
        self.attributes: dict[str, tuple[str, ...]] = {}
        self._sentences: Tensor | None = None
        if run.model.sentences is not None:
            known = read_attributes(args.attributes_file)
            columns = run.model.sentences.columns.tolist()
            self.attributes = {known[c].name: known[c].classes for c in columns}

    def encode_text(self, captions: str | Sequence[str]) -> Tensor:
        """Features [Q, D] of captions, float32 of unit length on the CPU."""
        return self.run.encode_text(captions).float()

    def encode_image(self, pictures: Picture | Sequence[Picture]) -> Tensor:
        """The same of paths or PIL images, [G, D]. Raises UserError for a broken image."""
        return self.run.encode_image(pictures).float()

    def classify(self, feature_GD: Tensor) -> Guesses:
        """FIRM's class of each attribute, and its score below 1. {} without FIRM's head.

        Args:
            feature_GD: unnormalised, as the head was trained (`Run.encode_image` with
                `normalize=False`).
        """
        classes, scores = (part.cpu() for part in self._guess(feature_GD.to(self.device)))
        return self.named(classes, scores)

    def named(self, class_GA: Tensor, score_GA: Tensor) -> Guesses:
        """Guesses by the attributes' names."""
        return {
            name: ([names[c] for c in class_GA[:, a].tolist()], score_GA[:, a].tolist())
            for a, (name, names) in enumerate(self.attributes.items())
        }

    @torch.no_grad()
    def encode_bytes(self, images_BCHW: Tensor) -> Encoded:
        """Features and attributes of images as bytes, on the device, without waiting for it."""
        with autocast(self.run.args.precision, self.device):
            images = images_BCHW.to(self.device, non_blocking=True)
            feature_BD = encode_images(self.run.model, images)
        return Encoded(F.normalize(feature_BD).half(), *self._guess(feature_BD))

    @torch.no_grad()
    def _guess(self, feature_GD: Tensor) -> tuple[Tensor, Tensor]:
        """Class and score [G, A] of each attribute: a softmax over its classes of how well their
        sentences match."""
        model = self.run.model
        if model.sentences is None:
            empty = feature_GD.new_zeros((len(feature_GD), 0))
            return empty.long(), empty
        if self._sentences is None:
            self._sentences = model.encode_text(model.sentences.ids)  # as in the evaluation
        logits_GS2 = model.match_sentences(feature_GD, self._sentences)
        match_GS = F.log_softmax(logits_GS2, dim=-1)[..., 1]
        best = [s.softmax(dim=1).max(dim=1) for s in model.sentences.class_scores(match_GS)]
        scores = torch.stack([b.values.float() for b in best], dim=1)
        below = torch.nextafter(torch.tensor(SURE), torch.tensor(0.0)).item()
        return torch.stack([b.indices for b in best], dim=1), scores.clamp(max=below)


def load_encoder(
    source: Mapping[str, Any] | str | Path,
    *,
    run: str | Path | None = None,
    device: str = "auto",
    precision: str | None = None,
    attributes_file: str | Path | None = None,
    batch_size: int | None = None,
    num_workers: int = 0,
) -> Encoder:
    """The encoder of a gallery or of a run.

    Args:
        source: the manifest of a gallery, or the folder or configs.yaml of a run.
        run: with a manifest, where the run (or the file of weights) is now, if it was moved.
        precision: None takes the manifest's, or that of configs.yaml.
        others: see `load_run`.

    Raises UserError, also if the weights are not those that made the gallery.
    """
    options: dict[str, Any] = {
        "device": device, "batch_size": batch_size, "num_workers": num_workers,
    }  # fmt: skip
    if not isinstance(source, Mapping):
        return run_encoder(source, precision=precision, attributes_file=attributes_file, **options)
    about = source["encoder"]
    precision = precision or about["precision"]
    place = os.fspath(run) if run else about["folder"]
    if not place and about.get("onnx"):
        raise UserError(
            f"the gallery was made with {about['onnx']}, an export of {about['name']}: give the "
            "folder of that run"
        )
    if about["kind"] == "run":
        made = run_encoder(
            place, about["checkpoint"], precision=precision, attributes_file=attributes_file,
            sha256=about["sha256"], **options,
        )  # fmt: skip
    else:
        choice = os.fspath(run) if run else about["pretrain_choice"]
        size = about["img_size"]
        made = weights_encoder(choice, size, precision=precision, sha256=about["sha256"], **options)
    check_encoder(made.about, about, place)
    return made


def run_encoder(
    folder: str | Path, checkpoint: str = "best.pth", *, sha256: str = "", **options: Any
) -> Encoder:
    """The encoder of a run, or of a folder of tools/export.py --hub. Raises UserError.

    Args:
        folder: or the configs.yaml or config.json in it.
        sha256: of the checkpoint; another one is refused. "": any.
    """
    config, weights = run_files(folder, checkpoint)
    with ThreadPoolExecutor(1) as thread:  # 0.6 s for ViT-B/16, while the weights are loaded
        hashed = thread.submit(_hash, weights, sha256)
        loaded = load_run(config, weights.name, **options)
    path = config.absolute().parent
    about = {"kind": "run", "name": path.name, "folder": str(path), "checkpoint": weights.name}
    return Encoder(loaded, about | {"sha256": hashed.result()})


def weights_encoder(
    choice: str, img_size: Sequence[int] | None = None, *, sha256: str = "", **options: Any
) -> Encoder:
    """The encoder of vanilla weights, as `--pretrain_choice` names them. Raises UserError."""
    file = "" if choice == "scratch" else parse_choice(choice).file
    if file and os.path.exists(expand(file)):  # the gallery may be used from another folder
        choice = choice.removesuffix(file) + os.path.abspath(expand(file))
    loaded = load_pretrained(choice, img_size=img_size, **options)
    about = {"kind": "weights", "name": choice, "folder": "", "checkpoint": ""}
    return Encoder(loaded, about | {"sha256": _hash(find_weights(choice), sha256)})


def encoded(
    chunks: Iterable[Chunk], encoder: Encoder
) -> Iterator[tuple[Chunk, np.ndarray, Guesses]]:
    """For each chunk: the chunk, its features [B, D] float16, and what is guessed of its people.

    One chunk ahead: while the GPU encodes a chunk, the CPU uses the features of the one before.
    """
    streams, ahead = torch.get_device_module(encoder.device), None
    for chunk in chunks:
        images = torch.as_tensor(chunk.images)
        found = encoder.encode_bytes(images) if len(images) else _nothing(encoder)
        on_cpu = [part.to("cpu", non_blocking=True) for part in found]
        copied = streams.current_stream().record_event()  # None on a CPU
        if ahead is not None:
            yield _arrived(encoder, *ahead)
        ahead = chunk, on_cpu, copied
    if ahead is not None:
        yield _arrived(encoder, *ahead)


def _arrived(
    encoder: Encoder, chunk: Chunk, parts: list[Tensor], copied: Any
) -> tuple[Chunk, np.ndarray, Guesses]:
    if copied is not None:
        copied.synchronize()
    features, classes, scores = parts
    return chunk, features.numpy(), encoder.named(classes, scores)


def _nothing(encoder: Encoder) -> Encoded:
    """The result for a chunk of broken files alone."""
    attributes = torch.zeros(0, len(encoder.attributes))
    features = torch.zeros(0, encoder.about["embed_dim"], dtype=torch.float16)
    return Encoded(features, attributes.long(), attributes)


def _hash(path: Path, expected: str) -> str:
    found = file_hash(path)
    if expected and found != expected:
        raise UserError(
            f"{path}: not the weights that made the gallery (other content); give the encoder that "
            "made it, or index again with --reencode"
        )
    return found
