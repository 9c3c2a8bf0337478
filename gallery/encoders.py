"""The encoder that asks a gallery: the one that made it, where it is now."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gallery.manifest import check_encoder
from gallery.onnx import OnnxEncoder, is_export
from utils.errors import UserError

if TYPE_CHECKING:
    from gallery.encode import Encoder


def encoder_of(
    manifest: Mapping[str, Any], run: str | Path | None, onnx: str | Path | None, device: str
) -> Encoder | OnnxEncoder:
    """The encoder that asks a gallery: where `run` or `onnx` say, or else where the manifest does.
    Raises UserError, also if it is not the one that made the gallery."""
    about = manifest["encoder"]
    if run and is_export(run):
        raise UserError(f"--encoder {run}: an export in ONNX; give it with --onnx instead")
    folder = onnx or (None if run else about.get("onnx"))
    if not onnx:
        _check_place(about, run)
    if not folder:
        from gallery.encode import load_encoder  # not above: it needs torch

        return load_encoder(manifest, run=run, device=device)
    encoder = OnnxEncoder(folder, device)
    check_encoder(encoder.about, about, str(folder))
    return encoder


def _check_place(about: Mapping[str, Any], run: str | Path | None) -> None:
    """Raise UserError if the encoder is no longer where it was, or not at `run`."""
    model, at, file = about["pretrain_choice"].rpartition("@")
    if about["kind"] == "weights":
        place, mend = file, f"--encoder {model}{at}FILE"
        if run or not os.path.isabs(file):  # OpenAI's or open_clip's, which are downloaded
            return
    elif run or not about.get("onnx"):
        place, mend = os.fspath(run or about["folder"]), "--encoder FOLDER"
    else:
        place, mend = about["onnx"], "--onnx FOLDER"
    if place and not os.path.exists(place):
        if run:
            raise UserError(
                f"--encoder {run}: no such file or folder; {about['name']} made the gallery"
            )
        raise UserError(
            f"{place}: the encoder was moved; say where the gallery's encoder is now: {mend}"
        )
