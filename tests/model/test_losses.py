import pytest
import torch
import torch.nn.functional as F

import model.losses.firm
from model.build import build_model
from model.losses import aea, firm, irra
from model.losses.irra import cmpm
from model.losses.registry import LOSSES, Loss, check_losses, losses_table, parse_loss_names
from tests.helpers import ROOT, filled, golden, golden_batch, options
from utils.errors import UserError


def losses_of(names, clip_file, two_views=True, head=None, **more):
    args = options(pretrain_choice=str(clip_file), cmt_depth=2, **more)
    model = build_model(args, names.split("+"), num_classes=11003).eval()
    if head:
        weights = filled(golden()["head_state_shapes"][head])
        assert not model.load_state_dict(weights, strict=False).unexpected_keys
    return model(golden_batch(two_views=two_views))


@pytest.mark.parametrize("case", sorted(golden()["losses_one_batch"]))
def test_losses_equal_the_original(case, clip_file):
    name = case.split(" ")[0]
    head = name if name in ("id", "mlm") else None
    losses = losses_of(name, clip_file, two_views="single" not in case, head=head)
    expected = golden()["losses_one_batch"][case][f"{name}_loss"]
    assert losses[name].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("fusion", ["dot", "cat"])
def test_firm_equals_the_original(fusion, clip_file, monkeypatch):
    def first_sentence(table, class_VA, u_VA):
        return table.first[torch.arange(7), class_VA]

    monkeypatch.setattr(model.losses.firm.SentenceTable, "_pick", first_sentence)
    losses = losses_of(f"match2+{fusion}", clip_file, head=fusion)
    expected = golden()["firm_first_sentence"][fusion]
    assert losses["match2"].item() == pytest.approx(expected, rel=1e-4)


def test_aea_with_a_full_queue_equals_the_original(clip_file):
    args = options(pretrain_choice=str(clip_file), loss_names="supkl+queue")
    net = build_model(args, ["supkl", "queue"], 5).eval()
    with torch.no_grad():
        values = [net(golden_batch(step))["supkl"].item() for step in range(6)]
    assert values[3:] == pytest.approx(golden()["aea_with_queue"]["loss"][3:], rel=1e-4)


def test_the_total_is_the_sum_of_the_losses_and_what_a_loss_logs_is_no_part_of_it(
    clip_file, monkeypatch
):
    def sdm_with_scale(inputs):
        inputs.log("sdm/scale", inputs.text_BD.sum() * 0 + inputs.scale)
        return irra.sdm_of_views(inputs)

    expected = losses_of("sdm+itc", clip_file)
    monkeypatch.setitem(LOSSES, "sdm", Loss("with a scalar for the log", sdm_with_scale))
    found = losses_of("sdm+itc", clip_file)
    assert list(found) == ["sdm", "itc", "total", "sdm/scale"]
    assert found["sdm/scale"].item() == 50 and not found["sdm/scale"].requires_grad
    assert torch.equal(found["total"], expected["sdm"] + expected["itc"])


def test_matching_losses_have_a_value_per_sample_whose_mean_is_the_loss():
    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    pids = torch.tensor([0, 1, 0, 2, 1])
    targets, logits = aea.soft_targets(pids), torch.randn(5, 10)
    chosen = torch.randint(6, (2, 5, 3))
    for loss, inputs, shape in (
        (irra.sdm, (a, b, pids, 50.0), (5,)),
        (irra.itc, (a, b, 50.0), (5,)),
        (irra.cmpm, (a, b, pids), (5,)),
        (aea.elastic_kl, (logits, targets), (5,)),
        (firm.match_loss, (torch.randn(5, 6, 2), *chosen), (5, 3)),
    ):
        values = loss(*inputs, reduction="none")
        assert values.shape == shape and values.std() > 0
        torch.testing.assert_close(values.mean(), loss(*inputs))
        with pytest.raises(ValueError, match="reduction|not a valid"):
            loss(*inputs, reduction="sums")
    # Value i is that of sample i, wherever it stands in the batch.
    moved = irra.itc(a.flip(0), b.flip(0), 50.0, reduction="none")
    torch.testing.assert_close(moved.flip(0), irra.itc(a, b, 50.0, reduction="none"))


def test_weights_scale_their_losses(clip_file):
    once = losses_of("id+sdm", clip_file, head="id")
    twice = losses_of("id+sdm", clip_file, head="id", id_loss_weight=2.0)
    assert twice["id"].item() == pytest.approx(2 * once["id"].item())
    assert twice["sdm"].item() == pytest.approx(once["sdm"].item())


@pytest.mark.parametrize("name", [n for n, row in LOSSES.items() if row.compute and n != "match2"])
def test_permuting_the_batch_changes_no_loss(name, clip_file):
    args = options(pretrain_choice=str(clip_file), cmt_depth=1)
    net = build_model(args, [name], 11003).eval()
    batch = golden_batch()
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        straight = net(batch)[name]
        moved = {key: value[order] for key, value in batch.items() if key != "masked_at"}
        moved["masked_at"] = moved["masked_labels"].flatten().nonzero()[:, 0]
        permuted = net(moved)[name]
    torch.testing.assert_close(straight, permuted, rtol=1e-4, atol=1e-5)


def test_captions_that_all_losses_see_masked_are_encoded_once(clip_file, monkeypatch):
    """The losses equal those of the same ids encoded twice, once for `mlm` alone."""
    names = ["supkl", "mlm"]
    net = build_model(options(pretrain_choice=str(clip_file), cmt_depth=1), names, 0).eval()
    batch, calls = golden_batch(), []
    twice = {**batch, "caption_ids": batch["masked_ids"]}
    once = {name: value for name, value in twice.items() if name != "masked_ids"}
    encode = net.base_model.encode_captions
    monkeypatch.setattr(
        net.base_model, "encode_captions", lambda ids, rows: calls.append(ids) or encode(ids, rows)
    )
    with torch.no_grad():
        expected, found = net(twice), net(once)
    assert len(calls) == 3 and torch.equal(calls[2], calls[1])
    for name in names:
        torch.testing.assert_close(found[name], expected[name])


def test_cmpm_equals_its_definition_anchor_by_anchor():
    torch.manual_seed(0)
    a, b, pids = torch.randn(5, 8), torch.randn(5, 8), torch.tensor([0, 1, 0, 2, 1])
    total = 0.0
    for x, y in ((a, b), (b, a)):
        for i in range(5):
            logits = torch.stack([x[i] @ y[j] / y[j].norm() for j in range(5)])
            p = logits.softmax(0)
            q = (pids == pids[i]).float()
            total += (p * (p.log() - (q / q.norm() + 1e-8).log())).sum() / 5
    torch.testing.assert_close(cmpm(a, b, pids), total)


def parse(text, **facts):
    facts = {"pairs": True, "attributes": True, **facts}
    names = parse_loss_names(text)
    check_losses(names, "X", **facts)
    return names


def test_the_papers_recipe_and_the_default_are_accepted():
    assert parse("supkl+queue+match2+dot") == ["supkl", "queue", "match2", "dot"]
    assert parse(options().loss_names) == ["sdm", "id", "mlm"]


@pytest.mark.parametrize(
    ("text", "facts", "message"),
    [
        ("supkI", {}, r"unknown loss 'supkI'. Did you mean 'supkl'\? Known: supkl"),
        ("", {}, "unknown loss ''"),
        ("sdm+sdm", {}, "'sdm' stands there twice"),
        ("sdm+queue", {}, "'queue' needs supkl or supitc beside it"),
        ("match2", {}, "'match2' needs exactly one of dot, cat"),
        ("match2+dot+cat", {}, "'match2' needs exactly one of dot, cat"),
        ("sdm+dot", {}, "'dot' needs match2"),
        ("match2+dot", {"attributes": False}, "needs attribute labels; X comes without"),
        ("supkl", {"pairs": False}, "needs an aerial and a ground image per caption"),
    ],
)
def test_combinations_that_cannot_work_are_refused_with_the_reason(text, facts, message):
    with pytest.raises(UserError, match=message):
        parse(text, **facts)


def test_attribute_matching_of_one_view_is_that_of_its_images_alone(clip_file):
    """match2 on single-view samples equals match2 on two views that are the same images."""
    args = options(pretrain_choice=str(clip_file))
    model = build_model(args, ["match2", "dot"], num_classes=0).eval()
    single = golden_batch(two_views=False)
    double = {**single, "pair_images": single["images"], "pair_attributes": single["attributes"]}
    drawn = model.sentences.sample(single["attributes"], torch.Generator().manual_seed(0))
    model.sentences.sample = lambda labels, _: [d.repeat(len(labels) // 4, 1) for d in drawn]
    with torch.no_grad():
        torch.testing.assert_close(model(single)["match2"], model(double)["match2"])


def test_the_documentation_holds_the_table_of_losses_as_it_is():
    assert losses_table() in (ROOT / "docs/training.md").read_text()
