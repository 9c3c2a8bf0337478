"""The manifest of a gallery: its encoder, its attributes and its parts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gallery.parts import KINDS, ROWS
from gallery.records import VERSION
from utils.documents import load_json
from utils.errors import UserError
from utils.files import read_file

MANIFEST, NEXT = "manifest.json", "manifest.next.json"
NAME = re.compile(r"[0-9a-f]{16}")
LIBRARIES = ("pillow", "pyarrow")  # and those of the encoder:
OF_TORCH = ("torch", "torchvision", "open_clip_torch")
OF_ONNX = ("onnxruntime", "onnxruntime-gpu")  # one of them
# What an encoder is known by in a manifest; with other values, features cannot be compared.
IDENTITY = ("sha256", "img_size", "stride_size")


def new_manifest(
    encoder: Mapping[str, Any], attributes: Mapping[str, Sequence[str]], root: str
) -> dict[str, Any]:
    """The manifest of an empty gallery."""
    return {
        "version": VERSION,
        "encoder": dict(encoder),
        "attributes": {name: list(classes) for name, classes in attributes.items()},
        "root": root,
        "libraries": libraries(encoder),
        "parts": [],
    }


def libraries(encoder: Mapping[str, Any]) -> dict[str, str]:
    """The versions of the libraries that an encoder's features depend on."""
    found = {}
    for name in (*(OF_ONNX if encoder.get("onnx") else OF_TORCH), *LIBRARIES):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def check_encoder(encoder: Mapping[str, Any], made_by: Mapping[str, Any], place: str) -> None:
    """Raise UserError if an encoder cannot ask a gallery. Its precision may be another: scores then
    differ a little.

    Args:
        encoder: what a manifest says of it.
        made_by: what the gallery's manifest says.
        place: of the encoder, for the message.
    """
    for name in IDENTITY:
        if encoder[name] != made_by[name]:
            raise UserError(
                f"{place}: its {name} is {encoder[name]}, but the gallery was made with "
                f"{made_by[name]}; give the encoder that made the gallery"
            )


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any]:
    """The manifest of a gallery, checked. Raises UserError."""
    path = folder / name
    try:
        manifest = load_json(read_file(path))
        if not isinstance(manifest, dict):
            raise ValueError("not an object")
        if manifest.get("version") != VERSION:
            raise UserError(
                f"{path}: version {manifest.get('version')!r}, and this code reads version "
                f"{VERSION}; make the gallery anew"
            )
        if not isinstance(manifest["root"], str) or not isinstance(manifest["libraries"], dict):
            raise ValueError("its root or libraries")
        encoder = manifest["encoder"]
        if not isinstance(encoder["sha256"], str) or type(encoder["embed_dim"]) is not int:
            raise ValueError("its encoder")
        for attribute, classes in manifest["attributes"].items():
            if not all(isinstance(text, str) for text in (attribute, *classes)):
                raise ValueError("its attributes")
        for part in manifest["parts"]:
            hashes = [part["sha256"][kind] for kind in KINDS]
            if not NAME.fullmatch(part["name"]) or not all(map(_is_hash, hashes)):
                raise ValueError("its parts")
            if type(part["rows"]) is not int or not 0 <= part["rows"] <= ROWS:
                raise ValueError("its parts")
    except FileNotFoundError:
        raise UserError(
            f"--gallery {folder}: no gallery (no {name} in it); make one with search.py index"
        ) from None
    except NotADirectoryError:
        raise UserError(f"--gallery {folder}: not the folder of a gallery") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        mend = f"if {folder} is a gallery, delete the whole folder and index again"
        if name == NEXT:
            mend = "delete this file, and give index --reencode again"
        raise UserError(f"{path}: not the manifest of a gallery: {error}; {mend}") from None
    return manifest


def _is_hash(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text) is not None
