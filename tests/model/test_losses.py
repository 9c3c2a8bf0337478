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


def losses_of(names, clip_file, two_views=True, head=None, **changes):
    args = options(pretrain_choice=str(clip_file), cmt_depth=2, **changes)
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

    monkeypatch.setattr(model.losses.firm.SentenceTable, "_pick_sentences", first_sentence)
    losses = losses_of(f"match2+{fusion}", clip_file, head=fusion)
    expected = golden()["firm_first_sentence"][fusion]
    assert losses["match2"].item() == pytest.approx(expected, rel=1e-4)


def test_aea_with_a_full_queue_equals_the_original(clip_file):
    args = options(pretrain_choice=str(clip_file), loss_names="supkl+queue")
    net = build_model(args, ["supkl", "queue"], 5).eval()
    with torch.no_grad():
        values = [net(golden_batch(step))["supkl"].item() for step in range(6)]
    assert values[3:] == pytest.approx(golden()["aea_with_queue"]["loss"][3:], rel=1e-4)


def test_the_total_is_the_sum_of_the_losses_without_logged_scalars(clip_file, monkeypatch):
    def sdm_with_scale(inputs):
        inputs.log("sdm/scale", inputs.text_BD.sum() * 0 + inputs.scale)
        return irra.sdm_of_views(inputs)

    expected = losses_of("sdm+itc", clip_file)
    monkeypatch.setitem(LOSSES, "sdm", Loss("with a scalar for the log", sdm_with_scale))
    losses = losses_of("sdm+itc", clip_file)
    assert list(losses) == ["sdm", "itc", "total", "sdm/scale"]
    assert losses["sdm/scale"].item() == 50 and not losses["sdm/scale"].requires_grad
    assert torch.equal(losses["total"], expected["sdm"] + expected["itc"])


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda inputs: inputs.scale, "'sdm' is a float; expected a scalar tensor"),
        (
            lambda inputs: inputs.unit["text"].sum(dim=1),
            r"'sdm' is a tensor of shape \[4\]; expected a scalar",
        ),
        (lambda inputs: inputs.log("sdm/x", inputs.pids_B), r"'sdm/x' is a tensor of shape \[4\]"),
    ],
)
def test_a_loss_or_logged_value_that_is_no_scalar_is_named(
    compute, message, clip_file, monkeypatch
):
    monkeypatch.setitem(LOSSES, "sdm", Loss("a loss under development", compute))
    net = build_model(options(pretrain_choice=str(clip_file)), ["sdm"], 0).eval()
    with pytest.raises(TypeError, match=message):
        net(golden_batch())


def test_a_row_whose_weight_is_no_option_is_refused(monkeypatch):
    monkeypatch.setitem(LOSSES, "sdm", Loss("a loss under development", weight="sdm_wieght"))
    with pytest.raises(UserError, match="loss 'sdm': utils/options.py has no option 'sdm_wieght'"):
        parse_loss_names("sdm")


def test_reduction_none_returns_values_per_sample_whose_mean_is_the_loss():
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
    # Value i is that of sample i in any order of the batch.
    flipped = irra.itc(a.flip(0), b.flip(0), 50.0, reduction="none")
    torch.testing.assert_close(flipped.flip(0), irra.itc(a, b, 50.0, reduction="none"))


def test_loss_weights_scale_their_losses(clip_file):
    single = losses_of("id+sdm", clip_file, head="id")
    double = losses_of("id+sdm", clip_file, head="id", id_loss_weight=2.0)
    assert double["id"].item() == pytest.approx(2 * single["id"].item())
    assert double["sdm"].item() == pytest.approx(single["sdm"].item())


@pytest.mark.parametrize("name", [n for n, row in LOSSES.items() if row.compute and n != "match2"])
def test_permuting_the_batch_changes_no_loss(name, clip_file):
    args = options(pretrain_choice=str(clip_file), cmt_depth=1)
    net = build_model(args, [name], 11003).eval()
    batch = golden_batch()
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        expected = net(batch)[name]
        permuted = {key: value[order] for key, value in batch.items() if key != "masked_at"}
        permuted["masked_at"] = permuted["masked_labels"].flatten().nonzero()[:, 0]
        loss = net(permuted)[name]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_masked_captions_of_all_losses_are_encoded_once(clip_file, monkeypatch):
    """The losses equal those of the same ids encoded twice, the second time only for `mlm`."""
    names = ["supkl", "mlm"]
    net = build_model(options(pretrain_choice=str(clip_file), cmt_depth=1), names, 0).eval()
    batch, calls = golden_batch(), []
    encoded_twice = {**batch, "caption_ids": batch["masked_ids"]}
    encoded_once = {name: v for name, v in encoded_twice.items() if name != "masked_ids"}
    encode = net.base_model.encode_captions
    monkeypatch.setattr(
        net.base_model, "encode_captions", lambda ids, rows: calls.append(ids) or encode(ids, rows)
    )
    with torch.no_grad():
        expected, losses = net(encoded_twice), net(encoded_once)
    assert len(calls) == 3 and torch.equal(calls[2], calls[1])
    for name in names:
        torch.testing.assert_close(losses[name], expected[name])


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


def parse(text, **dataset_has):
    dataset_has = {"pairs": True, "attributes": True, **dataset_has}
    names = parse_loss_names(text)
    check_losses(names, "X", **dataset_has)
    return names


def test_the_papers_recipe_and_the_default_are_accepted():
    assert parse("supkl+queue+match2+dot") == ["supkl", "queue", "match2", "dot"]
    assert parse(options().loss_names) == ["sdm", "id", "mlm"]


@pytest.mark.parametrize(
    ("text", "dataset_has", "message"),
    [
        ("supkI", {}, r"unknown loss 'supkI'. Did you mean 'supkl'\? Known: supkl"),
        ("", {}, "unknown loss ''. Names are joined by +"),
        (
            "sdm,id,mlm",
            {},
            r"unknown loss 'sdm,id,mlm'. Names are joined by \+, as in sdm\+id\+mlm",
        ),
        ("SDM+id", {}, "unknown loss 'SDM'. Did you mean 'sdm'"),
        ("sdm+sdm", {}, "'sdm' is named twice"),
        ("sdm+queue", {}, "'queue' needs supkl or supitc too"),
        ("match2", {}, "'match2' needs exactly one of dot, cat"),
        ("match2+dot+cat", {}, "'match2' needs exactly one of dot, cat"),
        ("sdm+dot", {}, "'dot' needs match2"),
        ("match2+dot", {"attributes": False}, "needs attribute labels; X has none"),
        ("supkl", {"pairs": False}, "needs an aerial and a ground image per caption"),
    ],
)
def test_losses_that_cannot_work_together_are_refused_with_the_reason(text, dataset_has, message):
    with pytest.raises(UserError, match=message):
        parse(text, **dataset_has)


def test_match2_of_one_view_equals_match2_of_two_identical_views(clip_file):
    args = options(pretrain_choice=str(clip_file))
    model = build_model(args, ["match2", "dot"], num_classes=0).eval()
    single = golden_batch(two_views=False)
    double = {**single, "pair_images": single["images"], "pair_attributes": single["attributes"]}
    sampled = model.sentences.sample(single["attributes"], torch.Generator().manual_seed(0))
    model.sentences.sample = lambda labels, _: [s.repeat(len(labels) // 4, 1) for s in sampled]
    with torch.no_grad():
        torch.testing.assert_close(model(single)["match2"], model(double)["match2"])


def test_the_documentation_has_the_current_table_of_losses():
    assert losses_table() in (ROOT / "docs/training.md").read_text()
