"""Captions: tokens, and what a caption goes through in training before the losses see it.

Shapes: L tokens of one caption, zeros behind its end.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from easydict import EasyDict
from torch import Tensor

from utils.text import tokenizer

MASK_ID = 49405  # stands for the mask; CLIP's vocabulary has the rare word "jekyll" there
MASK_RATE = 0.15  # of word tokens, BERT's and IRRA's
RDE_RATE, RDE_MASK, RDE_RANDOM = 0.2, 0.6, 0.2  # of word tokens; of those: mask, random id
DELETE_RATE = 0.05  # of words, TBPS-CLIP's
REMEMBERED = 50_000  # words; a data set of 100,000 captions has a third of them


def tokenize(captions: Sequence[str], length: int) -> Tensor:
    """CLIP token ids [captions, length] int32, zeros behind the end; a longer caption keeps its
    first `length - 1` tokens and the end token."""
    clip = tokenizer()
    ids = clip(list(captions), context_length=length).int()
    if len(clip.cache) > REMEMBERED:  # it keeps every word that it has met
        clip.cache = {word: word for word in ("<start_of_text>", "<end_of_text>")}
    return ids


def trim(ids_BL: Tensor) -> Tensor:
    """Cut the columns in which every caption has ended (0 is padding)."""
    return ids_BL[:, : int((ids_BL != 0).any(dim=0).sum())].long()


@dataclass(frozen=True)
class TextAugmentation:
    """What the losses see of a caption in training (`--txt_aug`). Test captions stay whole.

    Args:
        how: `none`; `mask`, BERT's masking, which IRRA's code applies in place, so that every loss
            sees it; `rde`, RDE's (CVPR 2024); `delete`, TBPS-CLIP's (AAAI 2024).
        mlm: make the masked caption and labels of the loss `mlm`, too. With `mask` that caption is
            the one that all losses see.
        mask_rate, keep_rate: of `mask_tokens`.
    """

    how: str = "none"
    mlm: bool = False
    mask_rate: float = 0.8
    keep_rate: float = 0.1

    def __call__(self, ids_L: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """`caption_ids` [L]; with `mlm` also `masked_labels` [L] and, unless `caption_ids` are the
        masked ones, `masked_ids` [L]."""
        masked = {}
        if self.mlm or self.how == "mask":
            ids, labels = mask_tokens(ids_L, generator, self.mask_rate, self.keep_rate)
            masked = {"masked_ids": ids, "masked_labels": labels} if self.mlm else {}
            if self.how == "mask":
                masked.pop("masked_ids", None)
                return {"caption_ids": ids, **masked}
        if self.how != "none":
            ids_L = {"rde": mask_or_remove_tokens, "delete": delete_words}[self.how](
                ids_L, generator
            )
        return {"caption_ids": ids_L, **masked}


def augmentation_of(args: EasyDict, masked: bool = False) -> TextAugmentation:
    """What `--txt_aug` and `--MLM` ask for; `masked`: a loss needs masked captions."""
    how = args.txt_aug
    if how == "auto":
        how = "mask" if args.MLM else "none"
    return TextAugmentation(how, masked, args.masked_token_rate, args.masked_token_unchanged_rate)


def mask_tokens(
    ids_L: Tensor, generator: torch.Generator, mask_rate: float = 0.8, keep_rate: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Masked ids and labels [L] of a caption, BERT's way (IRRA, sec. 3.2).

    Each word token is chosen with probability 0.15. Of the chosen, `mask_rate` become the mask,
    `keep_rate` stay, the others become a random id; if none is chosen, the first becomes the mask.
    Labels are the true ids of the chosen and 0 elsewhere. Start, end and padding are never chosen.
    """
    word_L = _words(ids_L)
    chance_L, fate_L = torch.rand((2, len(ids_L)), generator=generator)
    random_L = torch.randint(1, MASK_ID, (len(ids_L),), generator=generator).to(ids_L.dtype)
    chosen_L = word_L & (chance_L < MASK_RATE)
    if not chosen_L.any():
        chosen_L[1], fate_L[1] = word_L[1], -1  # below any rate: the mask
    masked_L = torch.where(fate_L >= 1 - keep_rate, ids_L, random_L)
    masked_L = torch.where(fate_L < mask_rate, MASK_ID, masked_L)
    return torch.where(chosen_L, masked_L, ids_L), torch.where(chosen_L, ids_L, 0)


def mask_or_remove_tokens(ids_L: Tensor, generator: torch.Generator) -> Tensor:
    """RDE's augmentation: each word token is changed with probability 0.2, to the mask (60 % of
    them) or a random id (20 %), or is removed. A caption keeps one token at least."""
    word_L = _words(ids_L)
    chance_L, fate_L = torch.rand((2, len(ids_L)), generator=generator)
    random_L = torch.randint(1, MASK_ID, (len(ids_L),), generator=generator).to(ids_L.dtype)
    chosen_L = word_L & (chance_L < RDE_RATE)
    changed_L = torch.where(fate_L < RDE_MASK, MASK_ID, random_L)
    removed_L = chosen_L & (fate_L >= RDE_MASK + RDE_RANDOM)
    if (removed_L | ~word_L).all():
        removed_L[1] = False
    return _without(torch.where(chosen_L, changed_L, ids_L), removed_L)


def delete_words(ids_L: Tensor, generator: torch.Generator) -> Tensor:
    """TBPS-CLIP's augmentation: each word, with all its tokens, is deleted with probability 0.05.
    If that leaves none, one of them stays, each with the same probability."""
    word_L, ends_L = _words(ids_L), _word_ends()[ids_L.long()]
    nth_L = ends_L.cumsum(0) - ends_L.long()  # the word that a token belongs to
    chance_L = torch.rand(len(ids_L), generator=generator)[nth_L]
    kept_L = ~word_L | (chance_L >= DELETE_RATE)
    if word_L.any() and not (kept_L & word_L).any():
        kept_L |= chance_L == chance_L[word_L].max()
    return _without(ids_L, ~kept_L)


def _words(ids_L: Tensor) -> Tensor:
    """Which tokens are words: neither start, end, mask nor padding."""
    return (ids_L > 0) & (ids_L < MASK_ID)


@functools.cache
def _word_ends() -> Tensor:
    """Which token ids end a word, [vocabulary] bool. CLIP's tokens are parts of words."""
    decoder = tokenizer().decoder
    return torch.tensor([decoder[i].endswith("</w>") for i in range(len(decoder))])


def _without(ids_L: Tensor, removed_L: Tensor) -> Tensor:
    """The caption without some of its tokens, padded to its old length."""
    kept = ids_L[~removed_L]
    return torch.cat([kept, kept.new_zeros(len(ids_L) - len(kept))])
