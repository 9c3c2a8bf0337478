"""Values of samples that losses compute before an epoch, and RDE's consensus division."""

import logging

import pytest
import torch

from datasets import loaders
from datasets.loaders import train_loader
from model.build import build_training_model
from model.losses import rde
from model.losses.inputs import BeforeEpoch
from model.losses.registry import LOSSES, Loss, check_losses, more_images
from processor.before_epoch import SampleValues
from tests.helpers import SCRATCH, options, read
from utils.errors import UserError

CPU = torch.device("cpu")
FURTHER = ("nitc", "mvs", "simclr", "match2", "dot")


def sample_values(mini_root, monkeypatch, before_epoch, others=(), needs=None, **values):
    """`SampleValues` of a loss that has this `before_epoch`, beside others. `needs`: of its row."""
    row = Loss("under development", lambda inputs: inputs.text_BD.sum(), before_epoch=before_epoch,
               **(needs or {}))  # fmt: skip
    monkeypatch.setitem(LOSSES, "mine", row)
    names = ["mine", *others]
    args = options(
        **SCRATCH,
        loss_names="+".join(names),
        dataset_name="AGDataAttr",
        img_size=[32, 16],
        **values,
    )
    data = read("AGDataAttr", mini_root)
    loader = train_loader(data, args, CPU, more_images=more_images(names))
    model = build_training_model(args, names, data.num_identities)
    return SampleValues(model, loader, args, CPU, logging.getLogger()), data


def test_every_sample_gets_its_own_value_and_a_batch_those_of_its_samples(mini_root, monkeypatch):
    def before_epoch(context):
        assert context.epoch == 3
        return context.evaluate(lambda inputs: {"pid": inputs.pids_B.float()})

    samples, data = sample_values(mini_root, monkeypatch, before_epoch, batch_size=5)
    samples.prepare(3, lambda: None)
    assert samples.values["pid"].tolist() == data.train_pids.tolist()
    batch = {"index": torch.tensor([4, 0, 9])}
    samples.add_to(batch)
    assert batch["sample/pid"].tolist() == [data.train_pids[i] for i in (4, 0, 9)]
    assert samples.model.training


def test_values_are_computed_once_for_an_epoch_and_kept_in_a_checkpoint(mini_root, monkeypatch):
    calls = []

    def before_epoch(context):
        calls.append(context.epoch)
        return {"chance": torch.full((16,), context.seed / 2**32)}

    samples, _ = sample_values(mini_root, monkeypatch, before_epoch)
    samples.prepare(0, lambda: None)
    samples.prepare(0, lambda: None)
    state = samples.state_dict()
    samples.prepare(1, lambda: None)
    assert calls == [0, 1] and not samples.values["chance"].equal(state["values"]["chance"])
    samples.load_state_dict(state)
    samples.prepare(0, lambda: None)
    assert calls == [0, 1] and samples.values["chance"].equal(state["values"]["chance"])
    with pytest.raises(ValueError, match="'chance' are not one for each training sample"):
        samples.load_state_dict({"epoch": 0, "values": {"chance": torch.zeros(3)}})


@pytest.mark.parametrize("image", [None, "second"])
def test_the_pass_makes_only_the_further_images_and_sentences_that_its_values_need(
    image, mini_root, monkeypatch
):
    """Its values are to the bit those of a run without further images, and no random numbers of the
    training move."""
    made, augment = [], loaders.augment
    monkeypatch.setattr(loaders, "augment", lambda name, *a: made.append(name) or augment(name, *a))

    def before_epoch(context):
        def of(inputs):
            assert set(inputs.images) == ({image} if image else set())
            assert inputs.sentence_SD is None
            return {"cosine": (inputs.unit["text"] * inputs.unit["image"]).sum(dim=1)}

        return context.evaluate(of)

    needs = {"images": (image,)} if image else {}
    with_more, _ = sample_values(mini_root, monkeypatch, before_epoch, FURTHER, needs, batch_size=5)
    streams = torch.get_rng_state(), with_more.model.generator.get_state()
    with_more.prepare(0, lambda: None)
    assert set(made) == {"", "pair"} | ({image} if image else set())
    assert streams[0].equal(torch.get_rng_state())
    assert streams[1].equal(with_more.model.generator.get_state())
    assert "second_uniform" in next(iter(with_more.loader))  # the training makes them
    plain, _ = sample_values(mini_root, monkeypatch, before_epoch, (), needs, batch_size=5)
    plain.prepare(0, lambda: None)
    assert plain.values["cosine"].equal(with_more.values["cosine"])


def test_a_mixture_finds_planted_noise_and_leaves_samples_without_a_loss_out():
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(200, generator=generator) < 0.8
    loss = torch.where(clean, 1.0, 4.0) + 0.3 * torch.randn(200, generator=generator)
    assert rde.clean_by_mixture(loss, seed=0).equal(clean)
    loss[7] = torch.nan
    expected = clean.clone()
    expected[7] = False
    assert rde.clean_by_mixture(loss, seed=0).equal(expected)


@pytest.mark.parametrize("loss", [torch.ones(300), torch.tensor([0.5]), torch.tensor([])])
def test_losses_that_do_not_differ_leave_the_most_clean(loss):
    clean = rde.clean_by_mixture(loss, seed=0)
    assert clean.sum() >= 0.5 * len(loss) and clean.dtype == torch.bool


def test_pairs_are_clean_by_consensus_and_by_chance_where_the_losses_disagree():
    tal = torch.cat([torch.zeros(60), torch.ones(40)]) + torch.linspace(0, 0.01, 100)
    tse = torch.cat([torch.zeros(40), torch.ones(60)]) + torch.linspace(0, 0.01, 100)
    said = []

    def divide(names, seed=1):
        losses = {"tal": tal, "tse": tse} if "tse" in names else {"tal": tal}
        context = BeforeEpoch(0, options(loss_names=names), seed, lambda _: losses, said.append)
        return rde.divide(context)["clean"]

    both = divide("tal+tse+ccd")
    assert both[:40].eq(1).all() and both[60:].eq(0).all()
    assert 0 < both[40:60].sum() < 20 and not both.equal(divide("tal+tse+ccd", seed=2))
    assert divide("tal+ccd").equal((torch.arange(100) < 60).float())
    assert "disagree about 20.0%" in said[0] and "60.0% of the training pairs" in said[-1]


def test_a_missing_library_is_told_before_the_training(monkeypatch):
    monkeypatch.setattr("model.losses.registry.find_spec", lambda name: None)
    with pytest.raises(UserError, match="'ccd' needs sklearn, which is not installed: pip install"):
        check_losses(["tal", "ccd"], "AGData", pairs=True, attributes=False)
