"""The recipe of a data set: every decision of its construction, read from YAML and checked.

configs/construction/ has recipes to start from. An unknown key, or a value out of range, is an
error that names it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from construction.records import View
from utils.documents import read_yaml_file
from utils.errors import UserError, suggest

N = TypeVar("N", int, float)


def _ordered(pair: tuple[N, N]) -> tuple[N, N]:
    if pair[0] > pair[1]:
        raise ValueError(f"{pair[0]} is over {pair[1]}: give the lowest first")
    return pair


Ordered = Annotated[tuple[N, N], AfterValidator(_ordered)]
Share = Annotated[float, Field(ge=0, le=1)]
Origin = Literal["annotation", "view", "brightness", "model", "clip"]


# Of the data set's own files.
RESERVED = {
    "construction", "attrs.json", "dataset.jsonl", "card.md", "card.html", "manifest.sha256",
}  # fmt: skip


class Strict(BaseModel):
    """A part of the recipe. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(Strict):
    """One source of pictures."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="its folder")
    reader: Literal["ag_reid", "g2aps", "table"]
    # Of a table: the cameras of the aerial view, if it has no column `view`.
    aerial_cameras: tuple[str, ...] = ()
    model_config = ConfigDict(coerce_numbers_to_str=True)

    @field_validator("name")
    @classmethod
    def _free(cls, name: str) -> str:
        if name in RESERVED:
            raise ValueError(f"{name} is a file or folder of the data set; take another name")
        return name


class Limit(Strict):
    """The smallest sharpness of a view: a value, or the quantile of the view's pictures."""

    at_least: Annotated[float, Field(ge=0)] | None = None
    quantile: Share | None = None

    @model_validator(mode="after")
    def _one(self) -> Limit:
        if (self.at_least is None) == (self.quantile is None):
            raise ValueError("give at_least or quantile, one of them")
        return self


class Quality(Strict):
    """Which pictures are good enough."""

    min_width: int = Field(24, ge=1)
    min_height: int = Field(48, ge=1)
    sharpness: dict[View, Limit] = {}
    brightness: Ordered[float] = (0, 255)  # mean grey level, lowest and highest
    clipped: Share = 1.0  # largest share of pixels that are nearly black or nearly white
    # Largest distance of two perceptual hashes (64 bits) that counts as a repetition; none: keep.
    repeated: Annotated[int, Field(ge=0, le=64)] | None = None


class Balance(Strict):
    """Which pictures of the view with more of them stay."""

    ratio: float | None = Field(1.0, ge=1)  # larger view by smaller view; none: keep all
    keep: Literal["sharpest", "spread"] = "sharpest"
    pairing: Literal["round_robin", "nearest_time"] = "round_robin"


class Splits(Strict):
    """Which persons are in train, val and test."""

    by: Literal["person", "source"] = "person"
    val: Share = 0.05  # of the persons; of the persons of train if `by` is source
    test: Share = 0.3

    @model_validator(mode="after")
    def _rest(self) -> Splits:
        if self.val + self.test >= 1:
            raise ValueError("val and test leave nobody for train")
        return self


class Attribute(Strict):
    """Where the labels of one attribute come from: the first origin that has one."""

    origins: tuple[Origin, ...] = ()
    default: str | None = None  # the class if no origin has one
    # For "annotation": by column of the source, the class of each value that tells one.
    columns: dict[str, dict[str | int, str]] = {}
    dim_below: float = 70.0  # for "brightness": the mean grey level

    @field_validator("columns", mode="before")
    @classmethod
    def _no_booleans(cls, columns: Any) -> Any:
        for column, values in columns.items() if isinstance(columns, dict) else ():
            if isinstance(values, dict) and any(isinstance(value, bool) for value in values):
                raise ValueError(f"{column}: YAML reads yes, no, true and false as booleans; quote")
        return columns

    @model_validator(mode="after")
    def _columns(self) -> Attribute:
        if "annotation" in self.origins and not self.columns:
            raise ValueError("annotation needs columns")
        return self


class Endpoint(Strict):
    """A server that speaks OpenAI's protocol (chat completions)."""

    url: str = Field(pattern="^https?://")  # such as http://127.0.0.1:8000/v1
    model: str
    key: str = ""  # name of the environment variable with the API key
    at_once: int = Field(8, ge=1)  # requests in flight
    per_minute: int | None = Field(None, ge=1)
    price: tuple[float, float] = (0.0, 0.0)  # of a million tokens read, and written
    timeout: float = Field(60, gt=0)  # seconds


class Models(Strict):
    """How models are asked."""

    endpoints: tuple[Endpoint, ...] = ()
    budget: float | None = Field(None, gt=0)  # in the unit of `price`
    retries: int = Field(6, ge=0)  # of a request that fails (429, 500, time-out)
    temperature: float = Field(0.7, ge=0, le=2)
    max_tokens: int = Field(300, ge=1)
    picture_side: int = Field(768, ge=32)  # longer side of a picture that is sent, at most; pixels


class Captions(Strict):
    """How captions are made, and which are refused."""

    by: Literal["grammar", "text", "vision"] = "grammar"
    prompt: str = ""  # a file; default: prompts/<by>.txt beside the recipe
    view: Literal["aerial", "ground", "both"] = "ground"  # the picture that a model sees
    tries: int = Field(3, ge=1)  # answers until the pair is dropped
    words: Ordered[int] = (8, 120)


class Clip(Strict):
    """The encoders of zero-shot labels and of the filter."""

    run: str = ""  # a run's folder; or else vanilla weights:
    pretrain_choice: str = "ViT-B/16"
    img_size: tuple[int, int] = (384, 128)  # of vanilla weights; a run has its own
    at_least: float | None = Field(None, ge=-1, le=1)  # cosine of caption and picture
    quantile: Share | None = None

    @property
    def filters(self) -> bool:
        return self.at_least is not None or self.quantile is not None

    @model_validator(mode="after")
    def _one(self) -> Clip:
        if self.at_least is not None and self.quantile is not None:
            raise ValueError("give at_least or quantile, not both")
        return self


class Output(Strict):
    """The layout of the data set."""

    layout: Literal["TBAGPR", "custom"] = "TBAGPR"
    files: Literal["copy", "link"] = "copy"


class Recipe(Strict):
    """All of it."""

    seed: int = Field(0, ge=0, le=2**32 - 1)
    sources: tuple[Source, ...] = Field(min_length=1)
    quality: Quality = Quality()
    balance: Balance = Balance()
    splits: Splits = Splits()
    attributes: dict[str, Attribute] = {}
    attributes_file: str = "configs/attributes.yaml"
    models: Models = Models()
    captions: Captions = Captions()
    clip: Clip = Clip()
    output: Output = Output()

    @model_validator(mode="after")
    def _together(self) -> Recipe:
        if len({source.name for source in self.sources}) < len(self.sources):
            raise ValueError("sources: two have the same name")
        if len({source.reader for source in self.sources}) < len(self.sources):
            raise ValueError("sources: two have the same reader, but the command names one place")
        asks = self.captions.by != "grammar" or any(
            "model" in attribute.origins for attribute in self.attributes.values()
        )
        if asks and not self.models.endpoints:
            raise ValueError("models.endpoints: none, but captions or attributes ask a model")
        if self.output.layout == "TBAGPR":
            wrong = {source.name for source in self.sources} - {"AG-ReID", "G2APS-AG"}
            if wrong:
                raise ValueError(
                    f"the layout TBAGPR has the sources AG-ReID and G2APS-AG, not {wrong.pop()}; "
                    "rename it, or take the layout custom"
                )
            if not (self.splits.val and self.splits.test):
                raise ValueError("splits: the layout TBAGPR has val and test; give both a share")
        if not self.splits.test:
            raise ValueError("splits.test: a data set needs a test split; give it a share")
        return self


def read_recipe(path: Path) -> Recipe:
    """Read a recipe. Raises UserError that names the key."""
    try:
        content = read_yaml_file(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = _keys_at(first["loc"][:-1])
            reason = f"unknown key.{suggest(str(first['loc'][-1]), known)}"
        else:
            reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {where + ': ' if where else ''}{reason}") from None


def _keys_at(location: tuple[Any, ...]) -> list[str]:
    """The keys that the part of the recipe at this place may have."""
    part: Any = Recipe
    for step in location:
        field = part.model_fields.get(step) if isinstance(step, str) else None
        inner = [field.annotation] if field else []
        while inner and not (isinstance(inner[0], type) and issubclass(inner[0], Strict)):
            inner = [*getattr(inner[0], "__args__", ()), *inner[1:]]
        part = inner[0] if inner else part
    return list(part.model_fields)
