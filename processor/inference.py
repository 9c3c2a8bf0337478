"""A trained model in Python: captions and images to features.

    from processor.inference import load_run

    run = load_run("logs/AGDataAttr/<run>")  # best.pth, on the GPU if there is one
    images = ["0001.jpg", "0002.jpg", "0003.jpg"]  # paths, or PIL images
    text_QD = run.encode_text(["a man in a grey shirt with a black backpack"])
    image_GD = run.encode_image(images)
    scores_QG = text_QD @ image_GD.T  # cosines, since features have unit length
    for g in scores_QG[0].argsort(descending=True):
        print(f"{scores_QG[0, g]:.3f}  {images[g]}")

Shapes: Q captions, G images, B batch size, D width of the features.
"""

from __future__ import annotations

import utils  # noqa: F401  before torch is loaded

# isort: split

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from easydict import EasyDict
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets.loaders import caption_batches
from datasets.records import Data
from datasets.registry import read_for_test
from datasets.transforms import convert_image, load_image
from model.build import build_evaluation_model, build_model
from model.weights import find_weights, is_hub, recorded_input
from processor.best import epoch_and_best
from processor.evaluator import Evaluator, encode_images
from utils.attributes import check_labels, read_attributes
from utils.checkpoint import load_checkpoint
from utils.command_line import options_of_run
from utils.config import resolve
from utils.devices import autocast, choose_device, choose_precision
from utils.distributed import SINGLE_PROCESS, Processes
from utils.documents import read_json_file
from utils.errors import UserError
from utils.files import expand
from utils.options import OPTIONS
from utils.runs import BEST, CONFIG, HUB_CONFIG, best_checkpoint, options_file

Picture = str | os.PathLike | PILImage.Image


class Run:
    """A trained model and the options of its run.

    Attributes:
        args: the options; `precision` "auto" is replaced by the device's choice.
        model: in evaluation mode, on `device`.
        epoch: the checkpoint's, or None if the file has none.
        notes: lines about what was ignored or assumed.

    Args:
        checkpoint: the content of `path`, from `load_checkpoint`; None for the pretrained weights
            that `args.pretrain_choice` names.
    """

    def __init__(
        self,
        args: EasyDict,
        checkpoint: dict[str, Any] | None,
        path: Path,
        device: torch.device,
        notes: Sequence[str] = (),
    ) -> None:
        args.precision = choose_precision(args.precision, device)
        self.args, self.device = args, device
        if checkpoint is None:
            model = build_model(args, [], num_classes=0)
        else:
            model = build_evaluation_model(args, checkpoint, str(path))
        self.model = model.to(device).eval()
        self.epoch, _ = epoch_and_best(checkpoint or {})
        self.notes = [*notes, *self.model.base_model.notes]
        self._data: Data | None = None

    def data(self) -> Data:
        """The run's data set, read from `args.root_dir` at the first call. Raises UserError."""
        if self._data is None:
            data, notes = read_for_test(self.args)
            if self.model.sentences is not None and data.attribute_classes:
                file = self.args.attributes_file
                check_labels(read_attributes(file), data.attribute_classes, data.name, file)
            self._data = data
            self.notes += notes
        return self._data

    def evaluator(self, split: str = "test", processes: Processes = SINGLE_PROCESS) -> Evaluator:
        """An evaluator for a split of the data set."""
        return Evaluator(self.data(), split, self.args, self.device, processes=processes)

    def encode_text(
        self, captions: str | Sequence[str], *, normalize: bool = True, device: str = "cpu"
    ) -> Tensor:
        """Features [Q, D] of captions, float32 (float64 for an fp64 model), on `device`.

        They have unit length unless `normalize` is False. A caption of more than
        `args.text_length` tokens is truncated, as in training.
        """
        captions = [captions] if isinstance(captions, str) else list(captions)
        batches = caption_batches(captions, self.args)
        return self._encode(self.model.encode_text, batches, normalize, device)

    def encode_image(
        self, images: Picture | Sequence[Picture], *, normalize: bool = True, device: str = "cpu"
    ) -> Tensor:
        """Features [G, D] of images, like those of captions. Raises UserError for a broken image.

        Files are read as in the evaluation: a JPEG of more than four times the model's size is
        decoded at a fraction of its size. A PIL image is resized as it is, so its bytes may
        differ by a level or two.
        """
        images = [images] if isinstance(images, Picture) else list(images)
        batches = DataLoader(
            _Pictures(images, tuple(self.args.img_size)),
            batch_size=self.args.test_batch_size,
            num_workers=self.args.num_workers,
            generator=torch.Generator(),  # the default would advance the global generator
        )
        return self._encode(partial(encode_images, self.model), batches, normalize, device)

    @torch.no_grad()
    def _encode(
        self,
        encode: Callable[[Tensor], Tensor],
        batches: Iterable[Tensor],
        normalize: bool,
        device: str,
    ) -> Tensor:
        features = [torch.zeros((0, self.model.feature_dim), device=device)]
        for batch in batches:
            with autocast(self.args.precision, self.device):
                feature_BD = encode(batch.to(self.device))
            features.append((F.normalize(feature_BD) if normalize else feature_BD).to(device))
        return torch.cat(features)


class _Pictures(Dataset):
    """Files and PIL images as bytes [3, H, W]."""

    def __init__(self, images: Sequence[Picture], size: tuple[int, int]) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image = self.images[index]
        if isinstance(image, PILImage.Image):
            return convert_image(image, self.size)
        return load_image(os.fspath(image), self.size)


def run_files(place: str | Path, checkpoint: str = BEST) -> tuple[Path, Path]:
    """The file of options and the checkpoint of a run; arguments as for `load_run`.

    Raises UserError if they are missing.
    """
    config = options_file(Path(expand(str(place))))
    if config.is_file() and config.name not in (CONFIG, HUB_CONFIG):
        raise UserError(f"{config}: not the {CONFIG} of a run; give that, or the run's folder")
    path = best_checkpoint(config) if checkpoint == BEST else config.parent / checkpoint
    for file in (config, path):
        if not file.is_file():
            raise UserError(
                f"{file}: no such file; give the folder of a run and the name of a checkpoint in it"
            )
    return config, path


def load_run(
    folder: str | Path,
    checkpoint: str = BEST,
    *,
    device: str = "auto",
    precision: str | None = None,
    root_dir: str | Path | None = None,
    attributes_file: str | Path | None = None,
    image_cache: str | Path | None = None,
    batch_size: int | None = None,
    num_workers: int = 0,
) -> Run:
    """Load the model of a run.

    Args:
        folder: of the run, or that tools/export.py wrote, also with --hub; or the configs.yaml or
            config.json in it.
        checkpoint: a file in the folder.
        device: "cpu", "cuda", or "auto": CUDA if available.
        precision, root_dir: None takes the value in configs.yaml.
        attributes_file, image_cache: None takes the project's attributes and no cache, never the
            values in configs.yaml, which may be untrusted. Only `evaluator` uses a cache.
        batch_size: images or captions at a time; None takes `test_batch_size` in configs.yaml.
        num_workers: processes that load images.

    Raises UserError.
    """
    config, path = run_files(folder, checkpoint)
    values = {
        "device": device, "precision": precision, "root_dir": root_dir,
        "attributes_file": attributes_file, "image_cache": image_cache or "",
        "test_batch_size": batch_size, "num_workers": num_workers,
    }  # fmt: skip
    options = {n: OPTIONS[n].coerce(v, "load_run") for n, v in values.items() if v is not None}
    args, notes = options_of_run(config, options)
    return Run(args, load_checkpoint(path), path, choose_device(args.device), notes)


def load_pretrained(
    choice: str,
    *,
    img_size: Sequence[int] | None = None,
    device: str = "auto",
    precision: str | None = None,
    batch_size: int | None = None,
    num_workers: int = 0,
) -> Run:
    """A CLIP as it was pretrained, for use without any training.

    Args:
        choice: as `--pretrain_choice`; "scratch" has no weights and is refused.
        img_size: height and width of the images, to which positions are resized; None takes that
            of a folder of tools/export.py --hub, or else the default of training.
        others: as for `load_run`.

    Raises UserError.
    """
    if choice == "scratch":
        raise UserError("--pretrain_choice scratch: random weights find nobody; name trained ones")
    stride = None
    if is_hub(choice):
        config = read_json_file(find_weights(choice).with_name(HUB_CONFIG))
        recorded = recorded_input({"input": config}) or {}
        img_size, stride = img_size or recorded.get("img_size"), recorded.get("stride_size")
    values = {
        "pretrain_choice": choice, "img_size": img_size, "stride_size": stride, "device": device,
        "precision": precision,
        "test_batch_size": batch_size, "num_workers": num_workers,
    }  # fmt: skip
    options = {
        n: OPTIONS[n].coerce(v, "load_pretrained") for n, v in values.items() if v is not None
    }
    args = resolve(options)
    return Run(args, None, find_weights(args.pretrain_choice), choose_device(args.device))
