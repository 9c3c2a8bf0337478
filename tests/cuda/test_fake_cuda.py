"""A CUDA device that is not there: PyTorch's fake tensors have shapes, types and a device, and no
values. A tensor that is left on the CPU raises, as it would on a GPU."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from datasets.augmentation import UNIFORM_POOL, UNIFORM_SIMCLR, pool, simclr
from datasets.synthetic import synthetic_batch
from model.backbone import Backbone
from model.build import build_model
from model.losses import irra
from model.losses.registry import LOSSES, Loss
from processor.memory import fake_batch, fake_copy
from tests.helpers import SCRATCH, options
from tests.model.test_backbone import RESNET
from utils import metrics
from utils.devices import autocast

CUDA = torch.device("cuda:0")
PRECISIONS = ("fp32", "bf16", "fp16", "half", "fp64")
# Every loss, in combinations that the command line accepts.
RECIPES = (
    "supkl+queue+match2+dot", "sdm+id+mlm", "supitc+queue+match2+cat", "supkl+supitc+mlm",
    "itc+cmpm+bisdm+biitc", "tal+trl+nitc+ritc+citc+cda",
    "tal+tse+ccd", "nitc+mvs+simclr+fta",
)  # fmt: skip


@pytest.fixture
def cuda(monkeypatch):
    """PyTorch believes that there is a CUDA device."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    return FakeTensorMode(allow_non_fake_inputs=False)


def forward(mode, names, pairs=True, **values):
    """The losses of a model and a batch on the fake device."""
    args = options(loss_names=names, **values)
    model = build_model(args, names.split("+"), num_classes=9).train()
    model = fake_copy(model, mode, CUDA)
    batch = fake_batch(
        synthetic_batch(args, model.needs_masked, model.more_images, pairs), mode, CUDA
    )
    with mode, autocast(args.precision, CUDA):
        return model(batch), model


def test_the_recipes_here_have_every_loss():
    assert {name for recipe in RECIPES for name in recipe.split("+")} == set(LOSSES)


@pytest.mark.parametrize(("names", "precision"), itertools.product(RECIPES, PRECISIONS))
def test_every_loss_in_every_precision_stays_on_the_device(names, precision, cuda):
    losses, _ = forward(cuda, names, precision=precision, cmt_depth=1, **SCRATCH)
    expected = torch.float64 if precision == "fp64" else torch.float32
    for name, value in losses.items():
        assert (value.device, value.dtype, value.shape) == (CUDA, expected, ()), name


@pytest.mark.parametrize(
    ("augmentation", "shape"), [(pool, (2, UNIFORM_POOL)), (simclr, (UNIFORM_SIMCLR,))]
)
def test_the_pool_and_simclr_stay_on_the_device(augmentation, shape, cuda):
    with cuda:
        images = torch.empty((4, 3, 96, 32), dtype=torch.uint8, device=CUDA)
        result = augmentation(images, torch.empty((4, *shape), device=CUDA))
    assert (result.device, result.dtype) == (CUDA, torch.float32)


@pytest.mark.parametrize("values", [
    {"negatives": "random"}, {"txt_aug": "rde"}, {"MLM": True}, {"stride_size": 8},
    {"img_aug": True}, {"img_size": [64, 64]}, {"firm_attributes": ["age", "light"]},
])  # fmt: skip
def test_options_of_the_model_and_the_losses_stay_on_the_device(values, cuda):
    losses, _ = forward(cuda, "supkl+queue+match2+dot", **{**SCRATCH, **values})
    assert losses["total"].device == CUDA


def test_one_view_stays_on_the_device(cuda):
    assert forward(cuda, "sdm+id+mlm+match2+dot", False, cmt_depth=1, **SCRATCH)[0]["total"].is_cuda


@pytest.mark.parametrize("precision", ["fp32", "bf16", "half"])
def test_a_resnet_stays_on_the_device(precision, cuda, tmp_path):
    torch.save(Backbone(RESNET, (96, 32)).state_dict(), tmp_path / "rn.pt")
    choice = str(tmp_path / "rn.pt")
    losses, _ = forward(cuda, "supkl+match2+dot+mlm", pretrain_choice=choice, precision=precision, cmt_depth=1)  # fmt: skip
    assert losses["total"].device == CUDA


def test_mixed_precision_is_on_in_this_test(cuda):
    """Otherwise the tests above would not see the types that CUDA gives."""
    args = options(**SCRATCH)
    model = fake_copy(build_model(args, [], 0), cuda, CUDA)
    with cuda, autocast("bf16", CUDA):
        pooled, _ = model.base_model.encode_captions(
            torch.ones(2, 5, dtype=torch.long, device=CUDA)
        )
    assert pooled.dtype == torch.bfloat16


class Assumed(TorchDispatchMode):
    """Ranking reads values: how many matches a query has, and whether features are finite. Here each
    of the queries has two matches, and all is finite."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 2
        if func is torch.ops.aten.repeat_interleave.Tensor:
            return args[0].new_empty(2 * len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("counted", [64, 1])
def test_ranking_stays_on_the_device(counted, cuda, monkeypatch):
    """Both ways to count, and in several chunks; the result is on the CPU."""
    monkeypatch.setattr(metrics, "COUNTED", counted)
    with cuda, Assumed():
        queries, images = (torch.randn(n, 8, device=CUDA) for n in (6, 9))
        pids = [torch.zeros(n, dtype=torch.long, device=CUDA) for n in (6, 9)]
        ranked = metrics.rank_gallery(queries, images, *pids, chunk=4)
    assert ranked.rows_Q3.shape == (6, 3) and ranked.rows_Q3.device == torch.device("cpu")


def test_ranking_with_identities_on_the_cpu_is_caught(cuda):
    with cuda, Assumed(), pytest.raises(Exception, match="two different devices|cuda:0, cpu"):
        queries, images = (torch.randn(n, 8, device=CUDA) for n in (6, 9))
        pids = [torch.zeros(n, dtype=torch.long) for n in (6, 9)]
        metrics.rank_gallery(queries, images, *pids)


def test_a_planted_cpu_tensor_is_caught(cuda, monkeypatch):
    def planted(inputs):
        return irra.itc_of_views(inputs) + (inputs.pids_B + torch.arange(len(inputs.pids_B))).sum()

    monkeypatch.setitem(LOSSES, "itc", Loss("planted", planted))
    with pytest.raises(Exception, match="two different devices|cuda:0, cpu"):
        forward(cuda, "itc", **SCRATCH)
