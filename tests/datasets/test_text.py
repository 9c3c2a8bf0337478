import collections

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.text import (
    MASK_ID,
    TextAugmentation,
    TokenizedCaptions,
    augmentation_of,
    delete_words,
    mask_or_remove_tokens,
    mask_tokens,
    tokenize,
    trim,
)
from model.losses.registry import needs_masked, parse_loss_names
from tests.helpers import golden, options
from utils.errors import UserError

CAPTION = "a woman in a red coat carrying a black backpack"


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("case", golden()["tokenizer"], ids=lambda case: case["text"][:20])
def test_tokens_equal_the_original(case):
    ids = tokenize([case["text"]], 77)[0]
    assert ids[: len(case["ids"])].tolist() == case["ids"]
    assert (ids[len(case["ids"]) :] == 0).all()


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="ascii"), max_size=60) | st.text(max_size=20))
def test_tokens_equal_clips_tokenizer_for_any_text(text):
    """Plain text, whose words are remembered, and any other."""
    assert tokenize([text], 20).equal(open_clip.tokenize([text], 20).int())


def test_remembered_words_are_those_of_the_complete_caption():
    text = "a man's T-shirt 'Hey!' 7:30 x-ray... don't"
    for _ in range(2):
        assert tokenize([text], 77).equal(open_clip.tokenize([text], 77).int())


def test_a_token_takes_two_bytes():
    captions = TokenizedCaptions([CAPTION] * 1000, 77)
    assert (captions.flat.nbytes + captions.ends.nbytes) / 1000 < 2 * 12 + 8.1
    assert len(captions) == 1000 and captions[999].equal(tokenize([CAPTION], 77)[0])


def test_a_long_caption_keeps_its_beginning_and_the_end_token():
    ids = tokenize(["man " * 200], 20)[0].tolist()
    assert len(ids) == 20 and ids[0] == 49406 and ids[-1] == 49407 and len(set(ids[1:-1])) == 1


def test_trimming_removes_only_padding():
    ids = tokenize(["a man", "a man with a bag"], 77)
    assert trim(ids).tolist() == ids[:, :7].tolist() and (ids[:, 7:] == 0).all()


def test_an_exclamation_mark_is_a_word_although_its_id_is_that_of_padding():
    """Before other punctuation, CLIP's token of "!" is 0."""
    ids = tokenize(["go!'."], 77)[0]
    assert ids[:6].tolist() == [49406, 861, 0, 4645, 49407, 0]
    assert trim(ids[None]).tolist() == [ids[:5].tolist()]
    for change in (delete_words, mask_or_remove_tokens, lambda *args: mask_tokens(*args)[0]):
        for seed in range(40):
            changed = change(ids, seeded(seed))
            assert (changed == 49407).sum() == 1 and changed.argmax() <= 4
    left = {tuple(delete_words(ids, seeded(seed))[1:4].tolist()) for seed in range(200)}
    assert left == {(861, 0, 4645), (0, 4645, 49407), (861, 49407, 0)}  # words: go, !'.


def test_masking_chooses_only_words_at_its_rates():
    ids = tokenize(["a woman in a red coat carrying a black backpack"], 77)[0]
    words = (ids > 0) & (ids < MASK_ID)
    counts = collections.Counter()
    for seed in range(400):
        masked, labels = mask_tokens(ids, torch.Generator().manual_seed(seed))
        chosen = labels != 0
        assert chosen.any() and not chosen[~words].any()
        assert torch.equal(labels[chosen], ids[chosen])
        assert torch.equal(masked[~chosen], ids[~chosen])
        counts["chosen"] += int(chosen.sum())
        counts["mask"] += int((masked[chosen] == MASK_ID).sum())
        counts["kept"] += int((masked[chosen] == ids[chosen]).sum())
    assert counts["chosen"] / (400 * int(words.sum())) == pytest.approx(0.17, abs=0.02)
    assert counts["mask"] / counts["chosen"] == pytest.approx(0.8, abs=0.04)
    assert counts["kept"] / counts["chosen"] == pytest.approx(0.1, abs=0.04)


def test_masking_follows_the_given_rates():
    ids = tokenize(["a woman in a red coat"], 77)[0]
    masked, labels = mask_tokens(ids, torch.Generator().manual_seed(0), 0.0, 1.0)
    assert torch.equal(masked, ids) and (labels != 0).any()
    masked, labels = mask_tokens(ids, torch.Generator().manual_seed(0), 1.0, 0.0)
    assert (masked[labels != 0] == MASK_ID).all()


def test_if_no_word_is_chosen_the_first_is_masked():
    """As in IRRA: the first word always becomes the mask. A caption without words is unchanged."""
    ids = tokenize(["red coat"], 77)[0]
    changes = collections.Counter()
    for seed in range(300):
        masked, labels = mask_tokens(ids, seeded(seed), mask_rate=0.0, keep_rate=1.0)
        changed = (masked != ids).nonzero().flatten().tolist()
        changes[tuple(changed)] += 1  # at these rates only the fallback changes anything
    assert set(changes) == {(), (1,)}
    assert changes[1,] / 300 == pytest.approx(0.85**2, abs=0.07)
    masked, labels = mask_tokens(tokenize([""], 77)[0], seeded(0))
    assert torch.equal(masked, tokenize([""], 77)[0]) and not labels.any()


def test_rde_masks_replaces_or_removes_a_fifth_of_the_tokens():
    ids = tokenize([CAPTION], 77)[0]
    words, counts = ids[(ids > 0) & (ids < MASK_ID)].tolist(), collections.Counter()
    for seed in range(600):
        changed = mask_or_remove_tokens(ids, seeded(seed))
        assert changed.shape == ids.shape and changed.dtype == ids.dtype
        length = int((changed != 0).sum())
        assert changed[0] == 49406 and changed[length - 1] == 49407 and length > 2
        inner = changed[1 : length - 1].tolist()
        counts["removed"] += len(words) - len(inner)
        counts["mask"] += inner.count(MASK_ID)
        counts["random"] += sum(i != MASK_ID and i not in words for i in inner)
    rates = {name: count / (600 * len(words)) for name, count in counts.items()}
    assert rates == {"mask": pytest.approx(0.12, abs=0.015), "random": pytest.approx(0.04, abs=0.01), "removed": pytest.approx(0.04, abs=0.01)}  # fmt: skip


def test_deleting_removes_complete_words_and_leaves_one():
    caption = "an extraordinarily colourful windbreaker"
    ids = tokenize([caption], 77)[0]
    assert int((ids != 0).sum()) - 2 > 4  # words of several tokens
    deleted, total = 0, 0
    for seed in range(500):
        left = open_clip.decode(delete_words(ids, seeded(seed))).replace("<start_of_text>", "").replace("<end_of_text>", "").replace("!", "").split()  # fmt: skip
        assert left and set(left) <= set(caption.split())
        deleted, total = deleted + 4 - len(left), total + 4
    assert deleted / total == pytest.approx(0.05, abs=0.015)
    single = tokenize(["windbreaker"], 77)[0]
    assert all(torch.equal(delete_words(single, seeded(seed)), single) for seed in range(60))
    none = tokenize(["jekyll"], 8)[0]  # its token in CLIP is the mask, so it is no word
    for change in (delete_words, mask_or_remove_tokens, lambda *args: mask_tokens(*args)[0]):
        assert torch.equal(change(none, seeded(0)), none)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, ("none", False)),
        ({"MLM": True}, ("mask", False)),
        ({"loss_names": "sdm+mlm"}, ("none", True)),
        ({"MLM": True, "loss_names": "sdm + mlm"}, ("mask", True)),
        ({"MLM": True, "loss_names": "sdm+mlm", "txt_aug": "none"}, ("none", True)),
        ({"txt_aug": "mask"}, ("mask", False)),
        ({"txt_aug": "delete"}, ("delete", False)),
    ],
)
def test_the_options_select_the_augmentation(values, expected):
    args = options(**{"loss_names": "sdm", **values})
    augment = augmentation_of(args, masked=needs_masked(parse_loss_names(args.loss_names)))
    assert (augment.how, augment.mlm) == expected


def test_each_augmentation_returns_its_tensors():
    ids = tokenize([CAPTION], 77)[0]
    keys = {how: TextAugmentation(how, mlm=True)(ids, seeded(0)).keys() for how in ("none", "mask", "rde", "delete")}  # fmt: skip
    separate = {"caption_ids", "masked_ids", "masked_labels"}
    together = separate - {"masked_ids"}
    assert keys == {"none": separate, "mask": together, "rde": separate, "delete": separate}
    assert torch.equal(TextAugmentation()(ids, seeded(0))["caption_ids"], ids)


def test_masking_that_no_loss_would_see_is_refused():
    with pytest.raises(UserError, match="--MLM --txt_aug rde: only the loss mlm uses masked"):
        options(MLM=True, txt_aug="rde", loss_names="supkl")
