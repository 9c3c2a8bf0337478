import collections
import dataclasses

import pytest
import torch

from datasets.build import (
    MASK_ID,
    TrainDataset,
    caption_batches,
    image_loader,
    mask_tokens,
    on_device,
    to_device,
    tokenize,
    train_loader,
    trim,
)
from datasets.image_cache import ImageFiles
from datasets.samplers import IdentitySampler, RandomSampler
from datasets.transforms import load_image
from tests.helpers import golden, options, read
from utils.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", golden()["tokenizer"], ids=lambda case: case["text"][:20])
def test_tokens_equal_the_original(case):
    ids = tokenize([case["text"]], 77)[0]
    assert ids[: len(case["ids"])].tolist() == case["ids"]
    assert (ids[len(case["ids"]) :] == 0).all()


def test_a_long_caption_keeps_its_start_and_the_end_token():
    ids = tokenize(["man " * 200], 20)[0].tolist()
    assert len(ids) == 20 and ids[0] == 49406 and ids[-1] == 49407 and len(set(ids[1:-1])) == 1


def test_trimming_cuts_only_padding():
    ids = tokenize(["a man", "a man with a bag"], 77)
    assert trim(ids).tolist() == ids[:, :7].tolist() and (ids[:, 7:] == 0).all()


def test_masking_chooses_words_alone_and_always_one():
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


def test_masking_follows_its_rates():
    ids = tokenize(["a woman in a red coat"], 77)[0]
    masked, labels = mask_tokens(ids, torch.Generator().manual_seed(0), 0.0, 1.0)
    assert torch.equal(masked, ids) and (labels != 0).any()
    masked, labels = mask_tokens(ids, torch.Generator().manual_seed(0), 1.0, 0.0)
    assert (masked[labels != 0] == MASK_ID).all()


def batches(root, seed=5, **more):
    args = options(root_dir=str(root), img_aug=True, MLM=True, **more)
    data = read("AGDataAttr", args.root_dir)
    return list(train_loader(data, args, torch.Generator().manual_seed(seed), CPU)), data


def test_a_batch_holds_what_its_samples_hold(mini_root):
    found, data = batches(mini_root)
    assert sorted(torch.cat([b["index"] for b in found]).tolist()) == list(range(len(data.train)))
    for batch in found:
        for row, index in enumerate(batch["index"].tolist()):
            sample = data.train[index]
            assert batch["pids"][row] == sample.pid
            assert tuple(batch["attributes"][row].tolist()) == sample.image.attributes
            assert tuple(batch["pair_attributes"][row].tolist()) == sample.pair.attributes
            ids = tokenize([sample.caption], 77)[0]
            length = batch["caption_ids"].shape[1]
            assert torch.equal(batch["caption_ids"][row], ids[:length].long())
            assert (ids[length:] == 0).all()
            for view, image in (("", sample.image), ("pair_", sample.pair)):
                assert torch.equal(batch[f"{view}images"][row], load_image(image.path, (96, 32)))
        assert (batch["draws"] != batch["pair_draws"]).all()  # views are augmented independently
        assert batch["masked_ids"].shape == batch["masked_labels"].shape == (len(batch["pids"]), 77)
        assert (batch["caption_ids"] != 0).any(dim=0).all()  # no column of padding alone


def test_batches_are_the_same_for_any_number_of_workers_and_differ_by_seed(mini_root):
    here, _ = batches(mini_root)
    there, _ = batches(mini_root, num_workers=2)
    other, _ = batches(mini_root, seed=6)
    for a, b in zip(here, there, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(here[0]["index"], other[0]["index"])


def test_batches_one_ahead_are_the_same_in_the_same_order(mini_root):
    found, _ = batches(mini_root)
    ahead = list(on_device(found, CPU, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)))
    assert len(ahead) == len(found) > 1
    for batch, moved in zip(found, ahead, strict=True):
        expected = to_device(batch, CPU, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
        assert expected.keys() == moved.keys() and "draws" not in moved
        assert all(torch.equal(expected[name], moved[name]) for name in moved)
        assert moved["pair_images"].dtype == torch.float32
    assert list(on_device([], CPU, (0.5,) * 3, (0.2,) * 3)) == []


def test_augmentation_differs_between_epochs_and_leaves_the_global_generator_alone(mini_root):
    args = options(root_dir=str(mini_root), img_aug=True)
    data = read("AGDataAttr", args.root_dir)
    loader = train_loader(data, args, torch.Generator().manual_seed(5), CPU)
    before = torch.get_rng_state()
    first, second = ({int(i): d for b in loader for i, d in zip(b["index"], b["draws"], strict=True)} for _ in range(2))  # fmt: skip
    assert not any(torch.equal(first[i], second[i]) for i in first)
    assert torch.equal(before, torch.get_rng_state())


def test_random_sampler_visits_all_once_in_new_orders():
    sampler = RandomSampler(20, 6, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in sampler] == [6, 6, 6, 2]
    first, second = ([key for batch in sampler for key in batch] for _ in range(2))
    assert sorted(k.index for k in first) == sorted(k.index for k in second) == list(range(20))
    assert [k.index for k in first] != [k.index for k in second]
    assert len({k.seed for k in first + second}) == 40


@pytest.mark.parametrize("counts", [[4] * 6, [1, 9, 2, 5, 3, 8, 4], [30, 1, 1, 1]])
def test_identity_sampler_fills_batches_with_distinct_identities(counts):
    pids = [pid for pid, count in enumerate(counts) for _ in range(count)]
    sampler = IdentitySampler(pids, 3, 6, torch.Generator().manual_seed(0))
    for _ in range(2):
        order = [key.index for batch in sampler for key in batch]
        assert len(order) == 6 * len(sampler) > 0
        for start in range(0, len(order), 6):
            batch = collections.Counter(pids[i] for i in order[start : start + 6])
            assert list(batch.values()) == [3, 3]
    if counts == [4] * 6:  # two groups an identity: all are used, so every sample is seen
        assert set(order) == set(range(24)) and len(order) == 36


def test_identity_sampler_with_too_few_identities_is_refused(mini_root):
    with pytest.raises(UserError, match="8 identities are fewer than the 16 that a batch of 64"):
        batches(mini_root, sampler="identity", batch_size=64)


def test_evaluation_loaders_keep_the_order(mini_root):
    args = options(test_batch_size=5)
    split = read("AGData", mini_root).splits["test"]
    images = torch.cat(list(image_loader(split.galleries["aerial"].images, args, CPU)))
    assert len(images) == len(split.galleries["aerial"].images)
    single = next(iter(image_loader(split.galleries["aerial"].images[7:8], args, CPU)))[0]
    assert torch.equal(images[7], single)
    rows = [row for batch in caption_batches(split.captions, args) for row in batch]
    for row, caption in zip(rows, split.captions, strict=True):
        assert torch.equal(
            row[row != 0], tokenize([caption], 77)[0].long()[: int((row != 0).sum())]
        )


def test_a_caption_without_words_and_an_unknown_data_set_are_refused(mini_root):
    data = read("AGData", mini_root)
    data.train[3] = dataclasses.replace(data.train[3], caption="&nbsp;")
    with pytest.raises(UserError, match="sample 3: the caption .* has no words"):
        TrainDataset(data.train, ImageFiles([], (96, 32)))
    with pytest.raises(UserError, match="AGDataAtr: unknown. Did you mean 'AGDataAttr'"):
        read("AGDataAtr", mini_root)
