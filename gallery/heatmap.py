"""Where in a picture a sentence is seen: heat maps, by gradients of the similarity.

    text_1D = run.encode_text([about("a woman in a yellow dress with a black bag", "dress")])
    maps = heat_maps(run.model, ["0001.jpg", "0002.jpg"], text_1D[0])
    overlay(read_image("0001.jpg"), maps[0]).save("why.png")

For a ViT this is Grad-ECLIP (Zhao et al., ICML 2024), summed over all blocks: a patch is as hot as
its value in the class token's attention raises the cosine of picture and sentence, weighted by how
similar its key is to the class token's query. For a ResNet it is Grad-CAM (Selvaraju et al., ICCV
2017) on the last feature map. docs/search.md compares methods.

Shapes: B copies of a picture, N patches of the grid [R, C], E width of a block, D joint space.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from torch import Tensor, nn

from datasets.transforms import convert_image, normalise
from gallery.pictures import Picture, opened
from model.aeafirm import AEAFIRM
from model.backbone import Backbone
from utils.errors import UserError

# What stands between the things that a caption names.
BETWEEN = re.compile(
    r"[.,;:!?]|\b(?:an?|the|this|that|and|or|but|with|without|in|on|of|over|at|to|from|by|as|is|are"
    r"|was|were|has|have|having|wear(?:s|ing)?|wore|dressed|carr(?:y|ies|ying)|hold(?:s|ing)?|also"
    r"|he|she|they|his|her|their|him|them|its?|who|which|while|pair)\b",
    re.IGNORECASE,
)
WARM = np.array([(255, 214, 0), (255, 120, 0), (214, 0, 40)], np.float32)  # by rising heat
OPAQUE = 0.7  # of the colour where it is hottest


def phrases(sentence: str) -> list[str]:
    """The things that a sentence names, with their adjectives: "yellow dress", "black bag"."""
    return [part for part in map(str.strip, BETWEEN.split(sentence)) if re.search(r"\w", part)]


def about(sentence: str, word: str) -> str:
    """A sentence about only that thing in `sentence` to which a word of it, or several, belong.

    A word alone says little: "dress" is in many captions, "yellow dress" in few. Words of several
    things are taken as they are. Raises UserError for words that the sentence does not have.
    """
    word = " ".join(word.split())
    whole = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
    if not word or not whole.search(" ".join(sentence.split())):
        raise UserError(
            f"the word '{word}' is not in the sentence '{sentence}'; choose one that is"
        )
    return f"A person with {next(filter(whole.search, phrases(sentence)), word)}."


def heat_maps(
    model: AEAFIRM, pictures: Sequence[Picture], text_D: Tensor, *, fine: bool = True
) -> list[np.ndarray]:
    """How much each pixel speaks for a sentence: for each picture [h, w] float32, of its size.

    The hottest pixel of a picture has 1; a map without any heat is 0 everywhere. So maps say where,
    not how much: compare similarities for that.

    Args:
        model: in evaluation mode.
        pictures: paths, or PIL images; crops of persons, as the model is trained on.
        text_D: the sentence's feature.
        fine: take the mean of four copies that are moved by a quarter of a patch; False takes a
            quarter of the time.

    Raises UserError for a broken picture.
    """
    backbone = model.base_model
    shifts, weight = _shifts(backbone) if fine else [(0, 0)], backbone.visual.conv1.weight
    maps = []
    for image in map(opened, pictures):
        bytes_CHW = convert_image(image, backbone.image_size).to(weight.device)
        moved = torch.stack([_moved(bytes_CHW, *shift) for shift in shifts])
        images_BCHW = normalise(moved, backbone.config.image_mean, backbone.config.image_std)
        heat_BRC = heat(backbone, images_BCHW, text_D.to(weight.device)).unflatten(1, backbone.grid)
        heat_BHW = _resized(heat_BRC, backbone.image_size)
        back = [_moved(map_HW, -y, -x) for map_HW, (y, x) in zip(heat_BHW, shifts, strict=True)]
        mean_HW = torch.stack(back).mean(dim=0)
        map_HW = _resized(mean_HW[None], (image.height, image.width))[0].cpu().numpy()
        maps.append(map_HW / (map_HW.max() or 1))
    return maps


def heat(backbone: Backbone, images_BCHW: Tensor, text_D: Tensor) -> Tensor:
    """How much each patch (for a ResNet, each place of the last feature map) raises the cosine of
    its picture and a sentence: [B, N] float32, 0 or more.

    Args:
        images_BCHW: normalised.
        text_D: the sentence's feature.
    """
    resnet = backbone.config.is_resnet
    visual = backbone.visual
    layers = [visual.layer4] if resnet else [block.attn for block in visual.transformer.resblocks]
    with torch.enable_grad(), _recorded(layers) as records:
        image_BD, _ = backbone.encode_images(images_BCHW)
        text_1D = text_D.float()[None, : image_BD.shape[1]]  # features for the ranking may follow
        cosine_B = F.cosine_similarity(image_BD.float(), text_1D)
        outputs = [output for _, output in records]
        gradients = torch.autograd.grad(cosine_B.sum(), outputs)
    with torch.no_grad():
        if resnet:
            features, gradient = outputs[0].float(), gradients[0].float()
            weight_BC = gradient.mean(dim=(2, 3))
            return torch.einsum("bc,bchw->bhw", weight_BC, features).relu().flatten(1)
        blocks = zip(layers, records, gradients, strict=True)
        return torch.stack([_grad_eclip(a, into, grad) for a, (into, _), grad in blocks]).sum(0)


def overlay(image: PILImage.Image, map_HW: np.ndarray) -> PILImage.Image:
    """The picture in grey, with warm colours where its map is hot: so every colour means heat.

    Args:
        map_HW: 0..1, of the picture's size.
    """
    stops = np.linspace(0, 1, len(WARM))
    colour_HWC = np.stack([np.interp(map_HW, stops, channel) for channel in WARM.T], axis=-1)
    opaque_HW1 = OPAQUE * map_HW[..., None]
    mixed = np.asarray(image.convert("L"))[..., None] * (1 - opaque_HW1) + colour_HWC * opaque_HW1
    return PILImage.fromarray(mixed.round().astype(np.uint8))


def _grad_eclip(attention: nn.MultiheadAttention, into_BLE: Tensor, gradient_BLE: Tensor) -> Tensor:
    """The heat of a block's patches, [B, N].

    Args:
        attention: the block's.
        into_BLE: what it got, the class token first.
        gradient_BLE: of the cosine, with regard to what it gave.
    """
    packed = F.linear(into_BLE, attention.in_proj_weight, attention.in_proj_bias).float()
    query_BLE, key_BLE, value_BLE = packed.chunk(3, dim=-1)
    # Before the output projection, where values are.
    weight_BE = (gradient_BLE[:, 0] @ attention.out_proj.weight).float()
    alike_BN = F.cosine_similarity(query_BLE[:, :1], key_BLE[:, 1:], dim=-1)
    low_B1, high_B1 = alike_BN.amin(1, keepdim=True), alike_BN.amax(1, keepdim=True)
    near_BN = (alike_BN - low_B1) / (high_B1 - low_B1).clamp_min(1e-12)
    return (torch.einsum("be,bne->bn", weight_BE, value_BLE[:, 1:]) * near_BN).relu()


@contextmanager
def _recorded(layers: Sequence[nn.Module]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What each layer gets and gives, in the order in which they run."""
    records: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, into: tuple[Tensor, ...], output: Any) -> None:
        records.append((into[0], output[0] if isinstance(output, tuple) else output))

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _shifts(backbone: Backbone) -> list[tuple[int, int]]:
    """Pixels down and right by which the picture is moved, a quarter of a patch each way: the mean
    of these maps is finer than the grid, and depends less on where its lines are."""
    stride = backbone.input["stride_size"] or 32
    quarter = stride // 4
    return [(y, x) for y in (-quarter, quarter) for x in (-quarter, quarter)]


def _moved(image: Tensor, down: int, right: int) -> Tensor:
    """An image [..., H, W] moved by pixels; its border is repeated where nothing is left."""
    height, width = image.shape[-2:]
    rows = (torch.arange(height, device=image.device) - down).clamp(0, height - 1)
    columns = (torch.arange(width, device=image.device) - right).clamp(0, width - 1)
    return image[..., rows[:, None], columns]


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [B, r, c] at another size."""
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
