"""The table of losses: what each computes, what it needs, and what `--loss_names` may combine.

To add a loss, write one file here with a function of `Inputs`, one row in LOSSES and one test;
docs/extending.md has examples. Validation, messages and the documentation's table use the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

from torch import Tensor, nn

from model.losses import (
    aea,
    cfan,
    firm,
    irra,
    mlm,
    rde,
    tbps,
)
from model.losses.inputs import BeforeEpoch, Encoded, Inputs, ModuleConfig, PartialMean
from utils.errors import UserError, suggest
from utils.options import OPTIONS


@dataclass(frozen=True)
class Loss:
    """A row of the table. Some names only modify another loss; they have no `compute`."""

    meaning: str
    compute: Callable[[Inputs], Tensor | PartialMean] | None = None
    pairs: bool = False  # needs an aerial and a ground image per sample
    attributes: bool = False  # needs attribute labels and the features of FIRM's sentences
    masked: bool = False  # needs masked captions, and the tokens of captions and images
    images: tuple[str, ...] = ()  # more images of the first view (datasets/augmentation.py)
    attention: bool = False  # `outputs` and `feature` need `Encoded.attention_BL`
    autocast: bool = False  # runs in the precision of the encoders instead of float32
    any_of: tuple[str, ...] = ()  # needs at least one of these names
    one_of: tuple[str, ...] = ()  # needs exactly one of these names
    weight: str = ""  # the option that the loss is multiplied by
    # builds the loss's modules, by their names in checkpoints
    modules: Callable[[ModuleConfig], dict[str, nn.Module]] | None = None
    # what it keeps of each encoder's batch by name, [B, ...]: with several processes, and with
    # --accum_steps, the loss gets it of all samples
    outputs: Callable[[Encoded], dict[str, Tensor]] | None = None
    after: Callable[[Inputs], None] | None = None  # runs after all losses of a step
    # runs before each epoch, and gives values of the training samples [N] by name; of the further
    # images and FIRM's sentences it sees those that its own row needs
    before_epoch: Callable[[BeforeEpoch], dict[str, Tensor]] | None = None
    # a second feature [B, E] for the ranking, and the option that is E: a model's score is the mean
    # of the cosines of its features
    feature: Callable[[Encoded], Tensor] | None = None
    feature_width: str = ""
    at_test: str = ""  # a weight of its modules, if the evaluation needs them
    library: str = ""  # of requirements-methods.txt, which it imports


# fmt: off
LOSSES: dict[str, Loss] = {
    "supkl": Loss("AEA, the paper's alignment over both views", aea.supkl, pairs=True),
    "supitc": Loss("AEA's targets with cross-entropy instead of KL", aea.supitc, pairs=True),
    "queue": Loss("adds past features to AEA's keys", any_of=("supkl", "supitc"),
                  modules=aea.queue_modules, after=aea.push_to_queue),
    "match2": Loss("FIRM, attribute sentence-image matching", firm.match2, attributes=True,
                   one_of=("dot", "cat"), weight="match_loss_weight", modules=firm.match2_modules,
                   at_test=firm.AT_TEST),
    "dot": Loss("match2 on the product of sentence and image", any_of=("match2",),
                at_test=firm.AT_TEST),
    "cat": Loss("match2 on their concatenation", any_of=("match2",), at_test=firm.AT_TEST),
    "sdm": Loss("similarity distribution matching; mean of all pairs of views", irra.sdm_of_views),
    "bisdm": Loss("sdm of text-aerial and text-ground",
                  partial(irra.sdm_of_views, all_pairs=False), pairs=True),
    "itc": Loss("InfoNCE; mean of all pairs of views", irra.itc_of_views),
    "biitc": Loss("itc of text-aerial and text-ground",
                  partial(irra.itc_of_views, all_pairs=False), pairs=True),
    "cmpm": Loss("cross-modal projection matching", irra.cmpm_of_views),
    "tal": Loss("RDE's triplet alignment; sum of the batch, mean of text-image pairs",
                rde.tal_of_views),
    "trl": Loss("tal with the hardest negative alone", rde.trl_of_views),
    "tse": Loss("RDE's tal of selected tokens' features, whose cosine is half of the score",
                rde.tse, attention=True, outputs=rde.tse_outputs, modules=rde.tse_modules,
                feature=rde.tse_feature, feature_width="tse_dim",
                at_test="head_tse_text.linear.weight"),
    "ccd": Loss("RDE's consensus division: pairs whose losses look noisy do not count in tal, trl "
                "and tse", any_of=("tal",), before_epoch=rde.divide, library="sklearn.mixture"),
    "nitc": Loss("TBPS-CLIP's InfoNCE with soft labels; mean of text-image pairs",
                 tbps.nitc_of_views),
    "mvs": Loss("makes nitc the mean of it and nitc of another augmentation of the first view",
                any_of=("nitc",), images=("second",)),
    "ritc": Loss("TBPS-CLIP's reverse KL, sdm with bounded negatives; mean of text-image pairs",
                 tbps.ritc_of_views),
    "citc": Loss("TBPS-CLIP's cyclic loss, equal geometry of text and images; "
                 "mean of text-image pairs", tbps.citc_of_views, weight="citc_loss_weight"),
    "simclr": Loss("SimCLR of two strong augmentations of the first view", tbps.simclr_of_images,
                   images=("strong_1", "strong_2"), weight="simclr_loss_weight",
                   modules=tbps.simclr_modules),
    "cda": Loss("CFAN's sdm of text and aerial image, directly or by way of the ground image",
                cfan.cda_of_views, pairs=True),
    "fta": Loss("CFAN's fuzzy alignment of token summaries; mean of text-image pairs",
                cfan.fta_of_views, outputs=cfan.fta_outputs, modules=cfan.fta_modules,
                weight="fta_loss_weight"),
    "id": Loss("identity classification of every feature", irra.identity,
               weight="id_loss_weight", modules=irra.identity_modules),
    "mlm": Loss("masked language modelling from the image tokens of all views", mlm.mlm,
                masked=True, autocast=True, weight="mlm_loss_weight", modules=mlm.mlm_modules),
}
# fmt: on


def parse_loss_names(text: str) -> list[str]:
    """Split `--loss_names` and check the names against the table.

    Raises UserError with the reason if the losses cannot work together.
    """
    names = [name.strip() for name in text.split("+")]
    for name in names:
        if name not in LOSSES:
            hint = suggest(name.lower(), LOSSES)
            if not name.isidentifier():  # such as "sdm,id,mlm", or nothing after a +
                hint = " Names are joined by +, as in sdm+id+mlm."
            raise UserError(
                f"--loss_names {text}: unknown loss '{name}'.{hint} Known: {', '.join(LOSSES)}"
            )
        if names.count(name) > 1:
            raise UserError(f"--loss_names {text}: '{name}' is named twice")
    for name in names:
        row = LOSSES[name]
        if row.weight and row.weight not in OPTIONS:
            raise UserError(f"loss '{name}': utils/options.py has no option '{row.weight}'")
        if row.any_of and not set(row.any_of) & set(names):
            raise UserError(f"--loss_names {text}: '{name}' needs {' or '.join(row.any_of)} too")
        if row.one_of and len(set(row.one_of) & set(names)) != 1:
            raise UserError(
                f"--loss_names {text}: '{name}' needs exactly one of {', '.join(row.one_of)}"
            )
    return names


def needs_masked(names: Sequence[str]) -> bool:
    """Whether any of these losses needs masked captions."""
    return any(LOSSES[name].masked for name in names)


def more_images(names: Sequence[str]) -> tuple[str, ...]:
    """The augmentations that these losses need besides the ordinary one, each once."""
    return tuple(dict.fromkeys(image for name in names for image in LOSSES[name].images))


def check_losses(names: Sequence[str], dataset: str, pairs: bool, attributes: bool) -> None:
    """Raise UserError if a loss needs something that the data set does not have, or a library.

    Args:
        dataset: the data set's name, for messages.
        pairs: whether its samples have both views.
        attributes: whether its samples have attribute labels.
    """
    fitting = [n for n, row in LOSSES.items() if row.compute and (attributes or not row.attributes)]
    one_view = [name for name in fitting if not LOSSES[name].pairs]
    for name in names:
        package = LOSSES[name].library.split(".")[0]
        if package and find_spec(package) is None:
            raise UserError(
                f"--loss_names: '{name}' needs {package}, which is not installed: "
                "pip install -r requirements-methods.txt"
            )
        if LOSSES[name].pairs and not pairs:
            raise UserError(
                f"--loss_names: '{name}' needs an aerial and a ground image per caption; "
                f"the samples of {dataset} have one image. For one view: {', '.join(one_view)}"
            )
        if LOSSES[name].attributes and not attributes:
            raise UserError(
                f"--loss_names: '{name}' needs attribute labels; {dataset} has none "
                "(AGDataAttr has them, and a custom data set may)"
            )


def check_backbone(names: Sequence[str], choice: str, is_resnet: bool) -> None:
    """Raise UserError if a loss needs something that the backbone of `--pretrain_choice` lacks."""
    for name in names:
        if LOSSES[name].attention and is_resnet:
            raise UserError(
                f"--loss_names: '{name}' needs a class token that attends to patches, which the "
                f"ResNet of --pretrain_choice {choice} does not have; give a ViT, such as "
                f"--pretrain_choice ViT-B/16, or leave {name} out"
            )


def losses_table() -> str:
    """The table of losses in Markdown, for docs/training.md."""
    lines = ["| name | what it is | needs |", "|---|---|---|"]
    for name, row in LOSSES.items():
        needs = ["both views"] * row.pairs + ["attributes"] * row.attributes
        needs += ["a ViT"] * row.attention
        needs += [" or ".join(f"`{n}`" for n in row.any_of)] if row.any_of else []
        needs += ["one of " + ", ".join(f"`{n}`" for n in row.one_of)] if row.one_of else []
        lines.append(f"| `{name}` | {row.meaning} | {', '.join(needs)} |")
    return "\n".join(lines)
