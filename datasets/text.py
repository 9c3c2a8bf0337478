"""Captions: tokenizing, and the augmentations of `--txt_aug` and `--MLM`.

Shapes: B captions of L tokens each. After the end token all ids are 0; before it, 0 is the
token "!".
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from easydict import EasyDict
from torch import Tensor

from utils.tokenizer import END, MAX_TEXT, PLAIN, START, tokenizer

MASK_ID = 49405  # the mask token; in CLIP's vocabulary the id of the rare word "jekyll"
MASK_RATE = 0.15  # of the word tokens, as in BERT and IRRA
RDE_RATE = 0.2  # of the word tokens, as in RDE
RDE_MASK, RDE_RANDOM = 0.6, 0.2  # of those: become the mask, or a random id; the rest is removed
DELETE_RATE = 0.05  # of the words, as in TBPS-CLIP
REMEMBERED = 50_000  # words with known tokens; 100,000 captions have a third of that


class TokenizedCaptions:
    """CLIP token ids of captions by position, each a tensor [length] int32, padded with 0.

    In memory a token has two bytes, and there is no padding. A caption with more than `length`
    tokens keeps the first `length - 1` and the end token.
    """

    def __init__(self, captions: Iterable[str], length: int) -> None:
        flat, ends = array("H"), array("q", [0])
        for caption in captions:
            flat.append(START)
            flat.extend(_word_ids(caption)[: length - 2])
            flat.append(END)
            ends.append(len(flat))
        self.length = length
        self.flat, self.ends = np.asarray(flat), np.asarray(ends)

    @classmethod
    def of(cls, flat: np.ndarray, ends: np.ndarray, length: int) -> TokenizedCaptions:
        """Captions that were tokenized before."""
        tokenized = cls((), length)
        tokenized.flat, tokenized.ends = flat, ends
        return tokenized

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> Tensor:
        ids_L = np.zeros(self.length, np.int32)
        start, end = self.ends[index], self.ends[index + 1]
        ids_L[: end - start] = self.flat[start:end]
        return torch.from_numpy(ids_L)


def tokenize(captions: Sequence[str], length: int) -> Tensor:
    """CLIP token ids [B, length] int32; see `TokenizedCaptions`."""
    tokenized = TokenizedCaptions(captions, length)
    rows = [tokenized[i] for i in range(len(tokenized))]
    return torch.stack(rows) if rows else torch.zeros((0, length), dtype=torch.int32)


def trim(ids_BL: Tensor) -> Tensor:
    """Remove the columns after the last end token (the largest id), which hold only padding."""
    return ids_BL[:, : int(ids_BL.argmax(dim=1).max()) + 1].long()


@dataclass(frozen=True)
class TextAugmentation:
    """Augments the token ids of a training caption (`--txt_aug`). Test captions are not augmented.

    Args:
        how: `none`; `mask`, BERT's masking, which IRRA's code applies in place, so that all losses
            see it; `rde`, RDE's (CVPR 2024); `delete`, TBPS-CLIP's (AAAI 2024).
        mlm: also make the masked caption and the labels of the loss `mlm`. With `mask`, all losses
            see this masked caption.
        mask_rate, keep_rate: see `mask_tokens`.
    """

    how: str = "none"
    mlm: bool = False
    mask_rate: float = 0.8
    keep_rate: float = 0.1

    def __call__(self, ids_L: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """`caption_ids` [L]; with `mlm` also `masked_labels` [L] and `masked_ids` [L]. With `mask`
        there are no `masked_ids`, because `caption_ids` are already masked."""
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
    """The augmentation that `--txt_aug` and `--MLM` select. `masked`: a loss needs masked
    captions."""
    how = args.txt_aug
    if how == "auto":
        how = "mask" if args.MLM else "none"
    return TextAugmentation(how, masked, args.masked_token_rate, args.masked_token_unchanged_rate)


def mask_tokens(
    ids_L: Tensor, generator: torch.Generator, mask_rate: float = 0.8, keep_rate: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Masked ids [L] and labels [L] of a caption, as in BERT (IRRA, sec. 3.2).

    Each word token is chosen with probability 0.15. Of the chosen tokens, `mask_rate` become the
    mask, `keep_rate` stay as they are, and the others become a random id. If no token is chosen,
    the first word token becomes the mask. Labels are the original ids of the chosen tokens, and 0
    elsewhere. Start, end, padding and the token "!" (id 0) are never chosen.
    """
    word_L = _words(ids_L) & (ids_L > 0)  # the label 0 means "not chosen"
    chance_L, fate_L = torch.rand((2, len(ids_L)), generator=generator)
    random_L = torch.randint(1, MASK_ID, (len(ids_L),), generator=generator).to(ids_L.dtype)
    chosen_L = word_L & (chance_L < MASK_RATE)
    if not chosen_L.any():
        chosen_L[1], fate_L[1] = word_L[1], -1  # lower than any rate, so it becomes the mask
    masked_L = torch.where(fate_L >= 1 - keep_rate, ids_L, random_L)
    masked_L = torch.where(fate_L < mask_rate, MASK_ID, masked_L)
    return torch.where(chosen_L, masked_L, ids_L), torch.where(chosen_L, ids_L, 0)


def mask_or_remove_tokens(ids_L: Tensor, generator: torch.Generator) -> Tensor:
    """RDE's augmentation of a caption [L]: each word token is chosen with probability 0.2. Of the
    chosen tokens, 60 % become the mask, 20 % become a random id, and 20 % are removed. A caption
    keeps at least one word token."""
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
    """TBPS-CLIP's augmentation of a caption [L]: each word, with all its tokens, is deleted with
    probability 0.05. If this would delete all words, a random one stays."""
    word_L, ends_L = _words(ids_L), _word_ends()[ids_L.long()]
    nth_L = ends_L.cumsum(0) - ends_L.long()  # number of the word that a token belongs to
    chance_L = torch.rand(len(ids_L), generator=generator)[nth_L]
    kept_L = ~word_L | (chance_L >= DELETE_RATE)
    if word_L.any() and not (kept_L & word_L).any():
        kept_L |= chance_L == chance_L[word_L].max()
    return _without(ids_L, ~kept_L)


def _words(ids_L: Tensor) -> Tensor:
    """Which tokens belong to words, [L] bool: not start, end, mask or padding."""
    position_L = torch.arange(len(ids_L))
    return (position_L > 0) & (position_L < ids_L.argmax()) & (ids_L < MASK_ID)


def _word_ids(caption: str) -> Sequence[int]:
    """The token ids between the start and the end token.

    CLIP's tokenizer takes 100 us for a caption, a third of that for the repair of wrongly encoded
    text. Plain text needs no repair, and its tokens do not cross spaces, so those of each word are
    remembered: 10 us.
    """
    if len(caption) <= MAX_TEXT and PLAIN.fullmatch(caption):
        return [i for word in caption.lower().split() for i in _ids_of_word(word)]
    return _encode(caption)


@functools.lru_cache(REMEMBERED)
def _ids_of_word(word: str) -> tuple[int, ...]:
    return _encode(word)


def _encode(text: str) -> tuple[int, ...]:
    clip = tokenizer()
    ids = clip.encode(text)
    if len(clip.cache) > REMEMBERED:  # otherwise it grows with every new word
        clip.cache = {word: word for word in ("<start_of_text>", "<end_of_text>")}
    return tuple(ids)


@functools.cache
def _word_ends() -> Tensor:
    """Which token ids end a word, [vocabulary] bool. A word of CLIP may have several tokens."""
    decoder = tokenizer().decoder
    return torch.tensor([decoder[i].endswith("</w>") for i in range(len(decoder))])


def _without(ids_L: Tensor, removed_L: Tensor) -> Tensor:
    """The caption without its removed tokens, padded to the same length."""
    kept = ids_L[~removed_L]
    return torch.cat([kept, kept.new_zeros(len(ids_L) - len(kept))])
