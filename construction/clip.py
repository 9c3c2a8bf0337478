"""CLIP in the construction: the cosine of a caption and its picture, and zero-shot classes.

The encoders are vanilla weights (`--pretrain_choice`) or those of a run. What is kept in the store
(store.py) is one number for a caption and a picture, and one class and number for each attribute of
a picture; features would take a hundred times as much.

Shapes: B pictures, C classes, D width of the features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from easydict import EasyDict
from torch import Tensor
from tqdm import tqdm

from construction.recipe import Clip
from construction.store import Store, key_of
from datasets.loaders import caption_batches
from datasets.transforms import load_image, normalise
from model.backbone import Backbone
from model.build import build_backbone, build_evaluation_model
from utils.attributes import Attribute
from utils.checkpoint import load_checkpoint
from utils.command_line import options_of_run
from utils.config import resolve
from utils.devices import at_least_float32, choose_device
from utils.errors import UserError
from utils.files import expand
from utils.machine import cores
from utils.runs import CONFIG

BATCH = 64  # pictures that are encoded at once
LOGIT_SCALE = 100.0  # of OpenAI's weights, by which the softmax of cosines is a confidence
SCORE, CLASSES = "score", "zero_shot"  # kinds in the store


class Encoder:
    """Image and text encoder, in evaluation mode.

    Attributes:
        name: a hash of the weights and of what else the features depend on.

    Args:
        args: options, of which it reads the input's sizes and the device.
    """

    def __init__(self, backbone: Backbone, args: EasyDict) -> None:
        self.args, self.device = args, choose_device(args.device)
        digest = hashlib.sha256()
        for name, value in sorted(backbone.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        inputs = (repr(backbone.config), backbone.input, args.text_length)
        self.name = key_of(digest.hexdigest(), *inputs)
        self.backbone = backbone.to(self.device).eval()

    def encode_images(self, files: Sequence[str]) -> Tensor:
        """Features [B, D] of pictures, of unit length, on the CPU. Raises BrokenImage."""
        load = partial(load_image, size=tuple(self.args.img_size))
        config = self.backbone.config
        with ThreadPoolExecutor(cores()) as pool:
            images_BCHW = torch.stack(list(pool.map(load, files))).to(self.device)
        images_BCHW = normalise(images_BCHW, config.image_mean, config.image_std)
        return self._encode(self.backbone.encode_images, images_BCHW)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Features [B, D] of texts, of unit length, on the CPU."""
        batches = caption_batches(texts, self.args)
        encode = partial(self._encode, self.backbone.encode_captions)
        return torch.cat([encode(ids_BL.to(self.device)) for ids_BL in batches])

    def cosines(self, files: Sequence[str], texts: Sequence[str]) -> list[float]:
        """The cosine of each picture with its text. A picture that is repeated is encoded once."""
        one = list(dict.fromkeys(files))
        rows = [one.index(file) for file in files]
        image_BD, text_BD = self.encode_images(one)[rows], self.encode_texts(texts)
        return [round(cosine, 5) for cosine in (image_BD * text_BD).sum(dim=1).tolist()]

    @torch.no_grad()
    def _encode(self, encode: Callable[[Tensor], tuple[Tensor, Tensor]], batch: Tensor) -> Tensor:
        feature_BD, _ = encode(batch)
        return F.normalize(at_least_float32(feature_BD)).cpu()


def load_encoder(clip: Clip, device: str = "auto") -> Encoder:
    """The encoders that the recipe names. Raises UserError if they cannot be had.

    They compute in float32, so that another machine keeps the same captions.
    """
    given = {"device": device, "precision": "fp32"}
    if clip.run:
        folder = Path(expand(clip.run))
        config, path = folder / CONFIG, folder / "best.pth"
        for file in (config, path):
            if not file.is_file():
                raise UserError(f"{file}: no such file; clip.run takes the folder of a run")
        args, _ = options_of_run(config, given)
        model = build_evaluation_model(args, load_checkpoint(path), str(path))
        return Encoder(model.base_model, args)
    if clip.pretrain_choice == "scratch":
        raise UserError("clip.pretrain_choice: scratch has no weights; name pretrained ones")
    values = {"pretrain_choice": clip.pretrain_choice, "img_size": list(clip.img_size)}
    args = resolve({**values, **given})
    return Encoder(build_backbone(args), args)


def scores(
    items: Sequence[tuple[tuple[str, str], str]], encoder: Encoder, store: Store
) -> list[float]:
    """The cosine of each picture with its text, from the store as far as it has them.

    Args:
        items: ((sha256, file) of a picture, text).
    """
    keys = [key_of(encoder.name, sha256, text) for (sha256, _), text in items]
    found = {key: store.get(SCORE, key) for key in keys}
    new = {key: item for key, item in zip(keys, items, strict=True) if found[key] is None}
    for start in range(0, len(new), BATCH):
        batch = list(new.items())[start : start + BATCH]
        files, texts = zip(*((file, text) for _, ((_, file), text) in batch), strict=True)
        values = list(zip((k for k, _ in batch), encoder.cosines(files, texts), strict=True))
        store.put(SCORE, values)
        found.update(values)
    return [found[key] for key in keys]


class ZeroShot:
    """Classes of attributes by the nearest sentences (`--attributes_file`).

    The feature of a class is the mean of its sentences' features; a confidence is the softmax over
    the classes.
    """

    def __init__(self, attributes: Sequence[Attribute], encoder: Encoder, store: Store) -> None:
        self.attributes, self.encoder, self.store = attributes, encoder, store
        self.sentences = [[a.name, a.classes, a.sentences] for a in attributes]
        self.class_features = [
            torch.stack([self.encoder.encode_texts(s).mean(dim=0) for s in a.sentences])
            for a in attributes
        ]

    def prepare(self, pictures: Iterable[tuple[str, str]], total: int | None = None) -> None:
        """Classify the (sha256, file) pictures that the store does not have."""
        bar = tqdm(pictures, total=total, desc="zero-shot", unit="picture", disable=None)
        new = (
            (k, file) for sha, file in bar if self.store.get(CLASSES, k := self._key(sha)) is None
        )
        for batch in _batches(new, BATCH):
            image_BD = self.encoder.encode_images([file for _, file in batch])
            found: list[dict[str, tuple[str, float]]] = [{} for _ in batch]
            for attribute, class_CD in zip(self.attributes, self.class_features, strict=True):
                logits_BC = LOGIT_SCALE * image_BD @ F.normalize(class_CD).T
                confidence_B, class_B = logits_BC.softmax(dim=1).max(dim=1)
                for labels, number, share in zip(
                    found, class_B.tolist(), confidence_B.tolist(), strict=True
                ):
                    labels[attribute.name] = attribute.classes[number], round(share, 4)
            keys = (key for key, _ in batch)
            self.store.put(CLASSES, zip(keys, found, strict=True))

    def label(self, sha256: str, attribute: str) -> tuple[str, float]:
        """Class and confidence of a picture that `prepare` has had."""
        value, confidence = self.store.get(CLASSES, self._key(sha256))[attribute]
        return value, confidence

    def _key(self, sha256: str) -> str:
        return key_of(self.encoder.name, self.sentences, sha256)


def _batches(items: Iterable[tuple[str, str]], size: int) -> Iterator[list[tuple[str, str]]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
