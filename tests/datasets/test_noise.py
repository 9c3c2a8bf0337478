"""Noisy correspondence: who gets whose caption, and what else stays."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from datasets.compact import TrainSamples
from datasets.fingerprint import changes, fingerprint
from datasets.loaders import train_loader
from datasets.noise import exchange_captions, noise_note
from datasets.records import Data, Gallery, Image, Split, TrainSample
from datasets.text import tokenize
from tests.datasets.test_compact import lines
from tests.helpers import options, read
from utils.errors import UserError

CPU = torch.device("cpu")


def data_of(count, per_identity=2, compact=False):
    train = [
        TrainSample(i // per_identity, f"caption {i}", Image(f"/r/{i}.jpg"), None, f"sample {i}")
        for i in range(count)
    ]
    split = Split(["s"], {"aerial": Gallery()})
    samples = TrainSamples(train, "/r") if compact else train
    return Data("synthetic", samples, {"test": split}, views=("aerial",), warnings=["before"])


def origins(data):
    """Of each sample, the number of its caption."""
    return np.array([int(sample.caption.split()[1]) for sample in data.train])


@pytest.mark.parametrize("rate", [0.02, 0.2, 0.29, 0.5, 0.999])
def test_that_fraction_of_the_samples_exchange_their_captions(rate):
    data = data_of(100)
    noisy = exchange_captions(data, rate, seed=3)
    found = origins(noisy)
    assert sorted(found) == list(range(100))  # each caption is still there, once
    moved = found != np.arange(100)
    number = round(100 * rate)
    # A random permutation leaves one in its place on average.
    assert number - 4 <= moved.sum() <= number
    expected = found // 2 != np.arange(100) // 2
    assert noisy.noisy.dtype == bool and noisy.noisy.tolist() == expected.tolist()
    assert data.noisy is None and [s.caption for s in data.train] == [s.caption for s in data_of(100).train]  # fmt: skip
    for before, after in zip(data.train, noisy.train, strict=True):
        assert replace(after, caption=before.caption) == before
    assert noise_note(noisy, rate, 3) == (
        f"--noise_rate {rate}, --noise_seed 3: {number} of 100 training samples have exchanged "
        f"captions, {expected.sum()} of them now one of another identity"
    )
    assert noise_note(data, rate, 3) == "" and noisy.warnings == ["before"]
    assert noisy.splits is data.splits


def test_the_seed_decides_and_every_sample_can_be_chosen():
    chosen = [origins(exchange_captions(data_of(40), 0.3, seed)) for seed in (*range(30), 0)]
    assert (chosen[0] == chosen[-1]).all() and (chosen[0] != chosen[1]).any()
    moved = np.stack(chosen[:-1]) != np.arange(40)
    assert moved.any(axis=0).all() and moved.mean() == pytest.approx(0.3 - 1 / 40, abs=0.02)


def test_columns_give_the_same_samples_and_stay_columns():
    columns, rows = data_of(50, compact=True), data_of(50)
    columns.train.known, columns.train.stored = (1, 2, 3, "x"), "folder"
    result, expected = (exchange_captions(data, 0.4, 1) for data in (columns, rows))
    assert isinstance(result.train, TrainSamples) and list(result.train) == expected.train
    assert result.noisy.tolist() == expected.noisy.tolist() and result.noisy.any()
    assert result.train.known is None and result.train.stored is None
    assert list(columns.train) == rows.train and columns.train.known


def test_of_one_identity_no_caption_is_wrong():
    noisy = exchange_captions(data_of(30, per_identity=30), 0.9, 0)
    assert not noisy.noisy.any() and "0 of them now one of another" in noise_note(noisy, 0.9, 0)


@pytest.mark.parametrize(("count", "rate"), [(10, 0.1), (10, 0.14), (1, 0.9)])
def test_a_rate_that_exchanges_nothing_is_refused(count, rate):
    with pytest.raises(UserError, match=rf"--noise_rate {rate}: of {count} training samples it"):
        exchange_captions(data_of(count), rate, 0)


def test_the_training_set_has_the_exchanged_captions_and_only_its_fingerprint_changes(mini_root):
    values = {"val_dataset": "both", "heldout": 0.3}
    clean = read("AGDataAttr", mini_root, **values)
    noisy = read("AGDataAttr", mini_root, noise_rate=0.8, **values)
    assert noisy.noisy.any() and len(noisy.noisy) == len(noisy.train) == len(clean.train)
    assert noisy.splits == clean.splits and (noisy.train_pids == clean.train_pids).all()
    then, now = fingerprint(clean), fingerprint(noisy)
    assert list(changes(then, now)) == ["train"] and then["counts"] == now["counts"]
    again = read("AGDataAttr", mini_root, noise_rate=0.8, **values)
    assert fingerprint(again) == now and again.noisy.tolist() == noisy.noisy.tolist()
    other = read("AGDataAttr", mini_root, noise_rate=0.8, noise_seed=1, **values)
    assert list(changes(now, fingerprint(other))) == ["train"]
    ids = train_loader(noisy, options(), CPU).dataset.caption_ids
    for i, sample in enumerate(noisy.train):
        assert ids[i].equal(tokenize([sample.caption], 77)[0])


def test_a_stored_data_set_stays_clean_and_its_tokens_are_not_used(rendered, tmp_path):
    root, cache = lines(rendered, tmp_path), str(tmp_path / "cache")
    clean = read("custom", root, image_cache=cache)
    args = options(image_cache=cache, num_workers=0)
    before = [sample.caption for sample in clean.train]
    tokens = train_loader(clean, args, CPU).dataset.caption_ids  # are stored now
    files = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    noisy = read("custom", root, image_cache=cache, noise_rate=0.9)
    dataset = train_loader(noisy, args, CPU).dataset
    assert noisy.noisy.any() and isinstance(noisy.train, TrainSamples)
    for i, sample in enumerate(noisy.train):
        assert dataset.caption_ids[i].equal(tokenize([sample.caption], 77)[0])
        assert dataset.caption_ids[i].equal(tokens[before.index(sample.caption)])
        assert (sample.caption != before[i]) >= noisy.noisy[i]
    now = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert now == files  # also the image cache
    later = read("custom", root, image_cache=cache)
    assert [sample.caption for sample in later.train] == before
    assert list(changes(fingerprint(clean), fingerprint(noisy))) == ["train"]
