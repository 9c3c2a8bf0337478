"""The JSON files of the layouts other than TBAGPR's, from the records of the rendered pairs."""

from __future__ import annotations

from typing import Any, NamedTuple

from datasets.aerial_pedes import AERI, AERI_TEST, FILES, TAG
from datasets.pedes import CUSTOM, PEDES
from utils.attributes import Attribute, read_attributes

SPLITS = ("train", "val", "test")
LAYOUTS = ("TBAGPR", AERI, TAG, *PEDES, "custom")
WITHOUT_VAL = (AERI, TAG)
FIRST_ID = {"CUHK-PEDES": 1, AERI: 1}  # of the others: 0


class Record(NamedTuple):
    """A rendered pair."""

    split: str
    identity: int  # of all splits together
    files: tuple[str, str]  # aerial and ground image, in the data set's folder; "" for none
    captions: list[str]  # three
    labels: list[list[int]]  # of the aerial and of the ground image


def json_files(layout: str, records: list[Record]) -> dict[str, list[dict[str, Any]]]:
    """By file name its entries."""
    if layout == "custom":
        return {CUSTOM: _custom(records)}
    if layout in PEDES:
        return {PEDES[layout][0]: _pedes(layout, records)}
    entries = {AERI: _aeri, TAG: _tag}[layout]
    return {
        file: entries(split, [r for r in records if r.split == split])
        for split, file in FILES[layout].items()
    }


def _pedes(layout: str, records: list[Record]) -> list[dict[str, Any]]:
    _, image_key = PEDES[layout]
    return [
        {"split": r.split, "id": r.identity, "captions": r.captions[:2],
         image_key: r.files[1].removeprefix("imgs/")}
        for r in records
        if layout != "ICFG-PEDES" or r.split != "val"  # published without val
    ]  # fmt: skip


def _custom(records: list[Record]) -> list[dict[str, Any]]:
    attributes = read_attributes("configs/attributes.yaml")
    entries = []
    for r in records:
        (aerial, ground), classes = r.files, class_names(attributes, r.labels)
        entries.append(
            {"split": r.split, "id": r.identity, "captions": r.captions[:2], "image": aerial,
             "pair_image": ground, "attributes": classes[0], "pair_attributes": classes[1]}
        )  # fmt: skip
    return entries


def _aeri(split: str, records: list[Record]) -> list[dict[str, Any]]:
    """A row for each pair of train, and for each identity of test."""
    if split == "train":
        return [
            {"pid": r.identity, "split": split, "aerial_img": f"{AERI}/{r.files[0]}",
             "ground_img": f"{AERI}/{r.files[1]}", "caption": r.captions[0]}
            for r in records
        ]  # fmt: skip
    rows: dict[int, dict[str, Any]] = {}
    for r in records:
        # One caption more than images: equal numbers would hide mistakes in evaluation.
        captions = r.captions[: 1 if r.identity in rows else 2]
        lists: dict[str, list[str]] = {key: [] for key in AERI_TEST[2:]}
        row = rows.setdefault(r.identity, {"pid": r.identity, "split": split, **lists})
        row["captions"] += captions
        row["file_paths"].append(r.files[0])
        row["ground_file_paths"].append(r.files[1])
    return list(rows.values())


def _tag(split: str, records: list[Record]) -> list[dict[str, Any]]:
    """A row for each image."""
    return [
        {"id": r.identity, "file_path": path, "captions": r.captions[k : k + 2], "cam_id": k}
        for r in records
        for k, path in enumerate(r.files)
    ]


def class_names(attributes: list[Attribute], labels: list[list[int]]) -> list[dict[str, str]]:
    """For each image, the name of its class by the name of the attribute."""
    return [
        {a.name: a.classes[value] for a, value in zip(attributes, values, strict=True)}
        for values in labels
    ]
