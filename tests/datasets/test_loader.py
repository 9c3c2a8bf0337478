import collections

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from datasets.augmentation import MORE_IMAGES, more_numbers
from datasets.loaders import caption_batches, image_loader, on_device, to_device, train_loader
from datasets.samplers import IdentitySampler, RandomSampler
from datasets.synthetic import synthetic_batch
from datasets.text import tokenize
from datasets.transforms import load_image
from model.losses.registry import needs_masked, parse_loss_names
from processor.memory import fake_batch
from tests.helpers import options, read
from utils.errors import UserError

CPU = torch.device("cpu")


def batches(root, seed=5, more_images=(), **values):
    values = {"loss_names": "sdm", "seed": seed, **values}
    args = options(root_dir=str(root), img_aug=True, **values)
    data = read("AGDataAttr", args.root_dir)
    masked = needs_masked(parse_loss_names(args.loss_names))
    loader = train_loader(data, args, CPU, masked=masked, more_images=more_images)
    return list(loader), data


def test_a_batch_holds_what_its_samples_hold(mini_root):
    loaded, data = batches(mini_root)
    assert sorted(torch.cat([b["index"] for b in loaded]).tolist()) == list(range(len(data.train)))
    for batch in loaded:
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
        # The views are augmented independently.
        assert (batch["uniform"] != batch["pair_uniform"]).all()
        assert (batch["caption_ids"] != 0).any(dim=0).all()  # no column has only padding


def test_with_mlm_every_loss_sees_the_masked_captions_that_mlm_predicts(mini_root):
    """As in the original code, which masks in place: both use one tensor of ids."""
    unmasked = {int(i): row for b in batches(mini_root)[0] for i, row in zip(b["index"], b["caption_ids"], strict=True)}  # fmt: skip
    masked, data = batches(mini_root, loss_names="sdm+mlm", MLM=True)
    for batch in masked:
        ids, labels = batch["caption_ids"], batch["masked_labels"]
        assert "masked_ids" not in batch and ids.shape == labels.shape == (len(ids), 77)
        assert torch.equal(batch["masked_at"], labels.flatten().nonzero()[:, 0])
        for row, label, index in zip(ids, labels, batch["index"].tolist(), strict=True):
            assert torch.equal(torch.where(label != 0, label, row), tokenize([data.train[index].caption], 77)[0])  # fmt: skip
    # Without the loss mlm (the paper's recipe): the same masks, trimmed to the longest caption.
    recipe, _ = batches(mini_root, loss_names="supkl", MLM=True)
    for batch, with_mlm in zip(recipe, masked, strict=True):
        length = batch["caption_ids"].shape[1]
        assert (batch["caption_ids"] != 0).any(dim=0).all() and "masked_labels" not in batch
        assert torch.equal(batch["caption_ids"], with_mlm["caption_ids"][:, :length])
    # --txt_aug none: unmasked captions for the other losses, the same masks for mlm.
    separate, _ = batches(mini_root, loss_names="sdm+mlm", MLM=True, txt_aug="none")
    for batch, with_mlm in zip(separate, masked, strict=True):
        assert torch.equal(batch["masked_ids"], with_mlm["caption_ids"])
        for row, index in zip(batch["caption_ids"], batch["index"].tolist(), strict=True):
            assert torch.equal(row[row != 0], unmasked[index][unmasked[index] != 0])


def test_batches_are_the_same_for_any_number_of_workers_and_differ_by_seed(mini_root):
    loaded, _ = batches(mini_root)
    by_workers, _ = batches(mini_root, num_workers=2)
    other_seed, _ = batches(mini_root, seed=6)
    for a, b in zip(loaded, by_workers, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(loaded[0]["index"], other_seed[0]["index"])


def test_prefetched_batches_are_the_same_in_the_same_order(mini_root):
    loaded, _ = batches(mini_root)
    prefetched = list(on_device(loaded, CPU, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)))
    assert len(prefetched) == len(loaded) > 1
    for batch, moved in zip(loaded, prefetched, strict=True):
        expected = to_device(batch, CPU, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
        assert expected.keys() == moved.keys() and "uniform" not in moved
        assert all(torch.equal(expected[name], moved[name]) for name in moved)
        assert moved["pair_images"].dtype == torch.float32
    assert list(on_device([], CPU, (0.5,) * 3, (0.2,) * 3)) == []


def test_further_images_come_from_the_first_view_and_leave_the_other_random_numbers(mini_root):
    """The file is decoded once: until it is on the device, a further image is its random numbers."""
    loss_names = "sdm+mlm"  # which draws random numbers too
    plain, _ = batches(mini_root, loss_names=loss_names)
    loaded, _ = batches(mini_root, more_images=MORE_IMAGES, loss_names=loss_names)
    new = {f"{name}_uniform" for name in MORE_IMAGES}
    for batch, before in zip(loaded, plain, strict=True):
        assert batch.keys() - before.keys() == new
        assert all(batch[name].equal(before[name]) for name in before)
        (raw, numbers), norm = (batch["images"], batch["second_uniform"]), ((0.5,) * 3, (0.2,) * 3)
        assert not (numbers == batch["uniform"]).any()
        moved = to_device(batch, CPU, *norm)
        assert not [name for name in moved if name.endswith("uniform")]
        again = to_device({"images": raw, "uniform": numbers}, CPU, *norm)["images"]
        assert moved["second_images"].equal(again)
        first = moved["images"]
        for name in MORE_IMAGES:
            image = moved[f"{name}_images"]
            assert image.shape == first.shape and image.dtype == torch.float32
            assert image.isfinite().all() and not image.equal(first)
        assert not moved["strong_1_images"].equal(moved["strong_2_images"])


def test_a_synthetic_and_a_fake_batch_have_the_images_of_a_loaders(mini_root):
    loaded, _ = batches(mini_root, more_images=MORE_IMAGES)
    batch = synthetic_batch(options(img_aug=True), more_images=MORE_IMAGES)
    assert batch.keys() == loaded[0].keys() - {"index"}
    assert all(batch[k].shape[1:] == loaded[0][k].shape[1:] for k in batch if k != "caption_ids")
    moved = to_device(batch, CPU, (0.5,) * 3, (0.2,) * 3)
    fake = fake_batch(batch, FakeTensorMode())
    assert {k: (v.shape, v.dtype) for k, v in fake.items()} == {
        k: (v.shape, v.dtype) for k, v in moved.items()
    }


def test_an_unknown_further_image_is_refused():
    with pytest.raises(ValueError, match="no further image 'third'; there are second, strong_1"):
        more_numbers(options(), ["second", "third"])


def test_augmentation_differs_between_epochs_and_does_not_use_the_global_generator(mini_root):
    args = options(root_dir=str(mini_root), img_aug=True)
    data = read("AGDataAttr", args.root_dir)
    loader = train_loader(data, args, CPU)
    before, epochs = torch.get_rng_state(), []
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        rows = [(b["index"].tolist(), b["uniform"]) for b in loader]
        epochs.append(
            {i: d for indices, uniform in rows for i, d in zip(indices, uniform, strict=True)}
        )
    first, second = epochs
    assert not any(torch.equal(first[i], second[i]) for i in first)
    assert torch.equal(before, torch.get_rng_state())


def test_random_sampler_gives_each_sample_once_in_a_new_order_each_epoch():
    sampler = RandomSampler(20, 6, 0)
    assert [len(batch) for batch in sampler] == [6, 6, 6, 2]
    first = [key for batch in sampler for key in batch]
    assert [key for batch in sampler for key in batch] == first
    sampler.set_epoch(1)
    second = [key for batch in sampler for key in batch]
    assert sorted(k.index for k in first) == sorted(k.index for k in second) == list(range(20))
    assert [k.index for k in first] != [k.index for k in second]
    assert len({k.seed for k in first + second}) == 40


@pytest.mark.parametrize("counts", [[4] * 6, [1, 9, 2, 5, 3, 8, 4], [30, 1, 1, 1]])
def test_identity_sampler_fills_batches_with_distinct_identities(counts):
    pids = [pid for pid, count in enumerate(counts) for _ in range(count)]
    sampler = IdentitySampler(pids, 3, 6, 0)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = [key.index for batch in sampler for key in batch]
        assert len(order) == 6 * len(sampler) > 0
        for start in range(0, len(order), 6):
            batch = collections.Counter(pids[i] for i in order[start : start + 6])
            assert list(batch.values()) == [3, 3]
    if counts == [4] * 6:  # two groups per identity, all of them are used: each sample is seen
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


def test_an_unknown_data_set_is_refused(mini_root):
    with pytest.raises(UserError, match="AGDataAtr: unknown. Did you mean 'AGDataAttr'"):
        read("AGDataAtr", mini_root)
