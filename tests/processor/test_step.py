"""Options that save memory or time give the numbers of the plain step."""

import pytest
import torch

from model.build import build_training_model, check_batch_norm
from processor.step import TrainStep, split_batch
from solver.build import build_optimizer
from tests.helpers import golden_batch, noise, options
from utils.errors import UserError

LORA = {"lora_rank": 4, "lora_alpha": 8.0}
RECIPES = [
    "supkl+queue+match2+dot",
    "supitc+queue+match2+cat+id",
    "sdm+id+mlm",
    "itc+cmpm",
    "tal+trl+nitc+ritc+citc+cda",
    "tal+tse+nitc+mvs+simclr+fta",
]


def gradients(clip_file, names, batches=1, two_views=True, shared=False, **values):
    """Losses, gradients and state of `TrainStep` after the last of some batches. With `shared` all
    losses see the masked captions. `values` are options."""
    args = options(pretrain_choice=str(clip_file), loss_names=names, cmt_depth=1, **values)
    model = build_training_model(args, names.split("+"), num_classes=11003)
    for j, (name, parameter) in enumerate(model.named_parameters()):
        if ".lora_" in name:
            parameter.data.copy_(noise(parameter.shape, j, 0.1))
    train_step = TrainStep(model, build_optimizer(model.named_parameters(), args), args)
    for step in range(batches):
        model.zero_grad()
        batch = golden_batch(step, two_views)
        if shared:
            batch["caption_ids"] = batch.pop("masked_ids")
        losses = train_step.backward(batch)
    by_name = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: v.detach() for n, v in losses.items()}, by_name, model.state_dict()


def assert_equal(plain, other, rtol=1e-4, atol=1e-5):
    for expected, actual in zip(plain, other, strict=True):
        assert expected.keys() == actual.keys()
        for name in expected:
            scale = float(expected[name].float().abs().max())
            torch.testing.assert_close(
                actual[name], expected[name], rtol=rtol, atol=atol * max(1.0, scale),
                msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip


@pytest.mark.parametrize("names", RECIPES)
@pytest.mark.parametrize("parts", [2, 3])
def test_a_batch_in_parts_gives_the_losses_and_gradients_of_the_whole_batch(
    names, parts, clip_file
):
    """Also with the queue: the second batch sees the features of the first."""
    plain = gradients(clip_file, names, batches=2)
    assert_equal(plain, gradients(clip_file, names, batches=2, accum_steps=parts))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora_in_parts_gives_the_losses_and_gradients_of_the_whole_batch(dropout, clip_file):
    """Dropout drops the same when a part is encoded again. The whole batch draws other numbers, so
    its loss is compared with one of the parts in one graph."""
    args = options(pretrain_choice=str(clip_file), loss_names="itc", **LORA, lora_dropout=dropout,
                   accum_steps=2)  # fmt: skip
    model = build_training_model(args, ["itc"], num_classes=0).train()
    train_step = TrainStep(model, build_optimizer(model.named_parameters(), args), args)
    batch, results = golden_batch(), []
    for together in (False, True):
        model.zero_grad()
        torch.manual_seed(5)
        if together:
            parts = [model.encode(part) for part in split_batch(batch, 2)]
            features = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            losses = model.losses(features, batch)
            losses["total"].backward()
        else:
            losses = train_step.backward(batch)
        results.append([losses["total"].detach(), *(p.grad for p in train_step.parameters)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    if not dropout:
        plain = gradients(clip_file, "supkl+queue+match2+dot", batches=2, **LORA)
        assert_equal(plain, gradients(clip_file, "supkl+queue+match2+dot", batches=2, accum_steps=3, **LORA))  # fmt: skip


def test_a_batch_of_one_view_in_parts_gives_the_gradients_of_the_whole_batch(clip_file):
    plain = gradients(clip_file, "sdm+id+mlm", two_views=False)
    assert_equal(plain, gradients(clip_file, "sdm+id+mlm", two_views=False, accum_steps=4))


def test_captions_shared_by_all_losses_in_parts_give_the_gradients_of_the_whole_batch(clip_file):
    plain = gradients(clip_file, "supkl+mlm", shared=True)
    assert_equal(plain, gradients(clip_file, "supkl+mlm", shared=True, accum_steps=2))


def test_parts_of_a_batch_hold_every_sample_once_and_in_order():
    batch = {"pids": torch.arange(5), "images": torch.arange(10).view(5, 2)}
    for parts in (1, 2, 3, 5, 8):
        split = split_batch(batch, parts)
        assert len(split) == min(parts, 5)
        for name, value in batch.items():
            assert torch.equal(torch.cat([part[name] for part in split]), value)


@pytest.mark.parametrize("more", [{}, LORA], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("names", RECIPES[:1])
def test_gradients_are_the_same_with_gradient_checkpointing(names, more, clip_file):
    plain = gradients(clip_file, names, **more)
    assert_equal(plain, gradients(clip_file, names, grad_checkpointing=True, **more))


@pytest.mark.parametrize("more", [{}, LORA], ids=["all weights", "LoRA"])
def test_compiled_encoders_give_the_same_losses_gradients_and_names(more, clip_file, monkeypatch):
    """With the compiler's tracing and differentiation, but without code generation (minutes)."""
    compile = torch.nn.Module.compile

    def compile_quickly(module, **options):
        compile(module, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    names = "supkl+match2+dot"
    plain = gradients(clip_file, names, **more)
    assert_equal(plain, gradients(clip_file, names, compile=True, **more), 1e-3, 1e-4)


def test_a_resnet_refuses_options_that_would_change_its_numbers(tmp_path):
    from model.backbone import Backbone
    from tests.model.test_backbone import RESNET

    torch.save(Backbone(RESNET, (96, 32)).state_dict(), tmp_path / "rn.pt")
    for flag, message in (
        ({"accum_steps": 2}, "--accum_steps: a ResNet normalises by the statistics"),
        (
            {"average_last": 2},
            "--average_last: .* do not belong to a mean of weights; --ema averages",
        ),
        ({"layer_decay": 0.8}, "--layer_decay: it counts blocks of a ViT; leave it out"),
        (
            {"grad_checkpointing": True},
            "--grad_checkpointing: open_clip's ResNets do not support it",
        ),
    ):
        args = options(pretrain_choice=str(tmp_path / "rn.pt"), **flag)
        with pytest.raises(UserError, match=message):
            build_training_model(args, ["itc"], num_classes=0)


def test_a_resnet_refuses_a_batch_with_one_value_per_channel(tmp_path):
    """A single image at 32x32 has no variance. Two images, or a larger image, have one."""
    from model.backbone import Backbone
    from tests.model.test_backbone import RESNET

    torch.save(Backbone(RESNET, (32, 32)).state_dict(), tmp_path / "rn.pt")
    for size, images in (((32, 32), 1), ((32, 32), 2), ((64, 32), 1)):
        args = options(pretrain_choice=str(tmp_path / "rn.pt"), img_size=list(size))
        model = build_training_model(args, ["itc"], num_classes=0).train()
        images_BCHW = torch.rand(images, 3, *size)
        if images * size[0] == 32:
            with pytest.raises(
                UserError, match="--batch_size 4: .*single image, .* --img_size 32 32"
            ):
                check_batch_norm(model, args, images)
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                model.encode_image(images_BCHW)
        else:
            check_batch_norm(model, args, images)
            assert model.encode_image(images_BCHW).isfinite().all()
