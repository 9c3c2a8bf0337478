"""export.py --onnx: both encoders of a run for ONNX Runtime, checked against PyTorch.

`FOLDER/` receives

    image.onnx          images [B, 3, H, W] uint8 (RGB, resized) -> features [B, D] of unit length,
                        and with FIRM's head attributes [B, classes of all attributes]: each
                        attribute's probabilities
    text.onnx           ids [B, L] int64 (0 after the end token) -> features [B, D] of unit length
    the tokenizer's file of merges
    encoder.json        what a program needs to know, and of which weights it is; it is written last

B is any number of images or captions, and L any number of tokens up to `text_length`. Mean and std
are in the graph, so images are bytes: they are a quarter of the size, and nothing can be forgotten.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gallery.onnx import ABOUT, IMAGE, TEXT, VERSION, import_onnxruntime
from model.aeafirm import AEAFIRM
from utils.attributes import Attribute
from utils.bpe import MERGES, merges_file
from utils.errors import UserError
from utils.files import write_atomically
from utils.tokenizer import END, START

OPSET = 18
LARGEST_ERROR = 1e-4  # of a feature's element, in the check
BATCHES = (1, 2, 5)  # of the check
Input = tuple[str, Tensor]


class ImageEncoder(nn.Module):
    """Bytes to features of unit length, and to each attribute's probabilities."""

    scale: Tensor  # [3, 1, 1]
    shift: Tensor
    means_SC: Tensor  # [S, classes of all attributes]: its product with scores is each class's mean
    sentence_SD: Tensor

    def __init__(self, model: AEAFIRM) -> None:
        super().__init__()
        self.model, config = model, model.base_model.config
        self.classes: list[int] = []
        # As `normalise`, which keeps its numbers in a cache that an export must not fill.
        mean, std = (torch.tensor(v)[:, None, None] for v in (config.image_mean, config.image_std))
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", mean / std)
        if model.sentences is not None:
            with torch.no_grad():
                sentence_SD = model.encode_text(model.sentences.ids)
            means = model.sentences.class_scores(torch.eye(len(sentence_SD)))
            self.classes = [mean.shape[1] for mean in means]
            self.register_buffer("sentence_SD", sentence_SD)
            self.register_buffer("means_SC", torch.cat(means, dim=1))

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        feature_BD = self.model.encode_image(images_BCHW.float() * self.scale - self.shift)
        if not self.classes:
            return (F.normalize(feature_BD),)
        logits_BS2 = self.model.match_sentences(feature_BD, self.sentence_SD)
        score_BC = logits_BS2.log_softmax(dim=-1)[..., 1] @ self.means_SC
        probable = [part.softmax(dim=1) for part in score_BC.split(self.classes, dim=1)]
        return F.normalize(feature_BD), torch.cat(probable, dim=1)


class TextEncoder(nn.Module):
    """Token ids to features of unit length."""

    def __init__(self, model: AEAFIRM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BL: Tensor) -> tuple[Tensor, ...]:
        return (F.normalize(self.model.encode_text(ids_BL)),)


def export_onnx(
    model: AEAFIRM,
    folder: Path,
    text_length: int,
    attributes: Sequence[Attribute],
    about: dict[str, Any],
) -> str:
    """Write a float32 model into a folder, and return a line about the check. Raises UserError if
    a package is missing, or ONNX Runtime computes something else than PyTorch.

    Args:
        attributes: those of FIRM's head, in its order.
        about: more entries of encoder.json, such as `sha256`; `gallery.onnx.TYPES` has all.
    """
    import_onnxruntime()
    try:
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed; pip install -r requirements-search.txt"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    backbone, errors = model.base_model, []
    encoders: list[tuple[str, nn.Module, str, dict[int, Any], Iterator[Tensor]]] = [
        (IMAGE, ImageEncoder(model), "images", {}, _images(backbone.image_size)),
        (TEXT, TextEncoder(model), "ids",
         {1: torch.export.Dim("length", min=2, max=text_length)}, _ids(text_length)),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as unfinished:
        for name, encoder, given, dynamic, examples in encoders:
            path = Path(unfinished, name)
            _write(encoder.eval(), given, dynamic, next(examples), path)
            errors += [_error(encoder, given, example, path) for example in examples]
            if max(errors) > LARGEST_ERROR:
                raise UserError(
                    f"{folder / name}: not written: its features differ by {max(errors):.1e} from "
                    f"PyTorch's, more than {LARGEST_ERROR:g}; try another version of onnxruntime"
                )
        shutil.copyfile(merges_file(), Path(unfinished, MERGES))
        (folder / ABOUT).unlink(missing_ok=True)  # it marks a complete export
        for file in os.listdir(unfinished):
            os.replace(Path(unfinished, file), folder / file)
    content = {
        "version": VERSION,
        "img_size": list(backbone.image_size),
        "mean": list(backbone.config.image_mean),  # for information: in the graph already
        "std": list(backbone.config.image_std),
        "text_length": text_length,
        "tokenizer": f"CLIP's byte pairs ({MERGES}), start {START}, end {END}",
        "embed_dim": model.feature_dim,
        "attributes": {a.name: list(a.classes) for a in attributes},
        **about,
    }
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(folder / ABOUT, lambda file: file.write(text.encode()))
    return (
        f"wrote {IMAGE}, {TEXT} and {ABOUT} into {folder}; ONNX Runtime gives PyTorch's features "
        f"to {max(errors):.0e}, for batches of {', '.join(map(str, BATCHES))}"
    )


def _write(
    encoder: nn.Module, given: str, dynamic: dict[int, Any], example: Tensor, path: Path
) -> None:
    outputs = ["features", "attributes"][: len(encoder(example))]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own code
        program = torch.onnx.export(
            encoder, (example,), dynamo=True, opset_version=OPSET, verbose=False,
            input_names=[given], output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1), **dynamic},),
        )  # fmt: skip
    assert program is not None, "the dynamo exporter returns a program"
    program.save(path)


@torch.no_grad()
def _error(encoder: nn.Module, given: str, example: Tensor, path: Path) -> float:
    """The largest difference of an element between PyTorch and ONNX Runtime."""
    runtime = import_onnxruntime()
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {given: example.numpy()})
    expected = encoder(example)
    return max(
        (torch.from_numpy(o) - e).abs().max().item() for o, e in zip(outputs, expected, strict=True)
    )


def _images(size: tuple[int, int]) -> Iterator[Tensor]:
    """Random bytes: first of two images for the export, then the batches of the check."""
    generator = torch.Generator().manual_seed(0)
    for batch in (2, *BATCHES):
        shape = (batch, 3, *size)
        yield torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def _ids(text_length: int) -> Iterator[Tensor]:
    """Random captions of several lengths, likewise."""
    generator = torch.Generator().manual_seed(0)
    for batch in (2, *BATCHES):
        for length in (text_length,) if batch == 2 else (2, text_length // 2 + 1, text_length):
            ids_BL = torch.randint(1, START, (batch, length), generator=generator)
            ids_BL[:, 0], ids_BL[:, -1] = START, END
            if length > 3:
                ids_BL[0, -2:] = torch.tensor([END, 0])  # padded
            yield ids_BL
