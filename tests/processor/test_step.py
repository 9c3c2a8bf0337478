"""What saves memory or time gives the numbers of the plain step."""

import pytest
import torch

from model.build import build_training_model, check_batch_norm
from processor.step import TrainStep, split_batch
from solver.build import build_optimizer
from tests.helpers import golden_batch, options
from utils.errors import UserError

RECIPES = ["supkl+queue+match2+dot", "supitc+queue+match2+cat+id", "sdm+id+mlm", "itc+cmpm"]


def gradients(clip_file, names, batches=1, two_views=True, shared=False, **more):
    """Losses and gradients of the last of some batches, through `TrainStep`; `shared`:
    all losses see the masked captions."""
    args = options(pretrain_choice=str(clip_file), loss_names=names, cmt_depth=1, **more)
    model = build_training_model(args, names.split("+"), num_classes=11003)
    train_step = TrainStep(model, build_optimizer(model.named_parameters(), args), args)
    for step in range(batches):
        model.zero_grad()
        batch = golden_batch(step, two_views)
        if shared:
            batch["caption_ids"] = batch.pop("masked_ids")
        losses = train_step.backward(batch)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: v.detach() for n, v in losses.items()}, found, model.state_dict()


def equal(plain, other, rtol=1e-4, atol=1e-5):
    for mine, theirs in zip(plain, other, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            scale = float(mine[name].float().abs().max())
            torch.testing.assert_close(
                theirs[name], mine[name], rtol=rtol, atol=atol * max(1.0, scale),
                msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip


@pytest.mark.parametrize("names", RECIPES)
@pytest.mark.parametrize("parts", [2, 3])
def test_a_batch_in_parts_gives_the_losses_and_gradients_of_the_whole(names, parts, clip_file):
    """With the queue too: the second batch sees what the first one left there."""
    plain = gradients(clip_file, names, batches=2)
    equal(plain, gradients(clip_file, names, batches=2, accum_steps=parts))


def test_a_batch_of_one_view_in_parts_gives_the_gradients_of_the_whole(clip_file):
    plain = gradients(clip_file, "sdm+id+mlm", two_views=False)
    equal(plain, gradients(clip_file, "sdm+id+mlm", two_views=False, accum_steps=4))


def test_captions_encoded_once_for_all_losses_in_parts_give_the_gradients_of_the_whole(clip_file):
    plain = gradients(clip_file, "supkl+mlm", shared=True)
    equal(plain, gradients(clip_file, "supkl+mlm", shared=True, accum_steps=2))


def test_parts_of_a_batch_hold_every_sample_once_and_in_order():
    batch = {"pids": torch.arange(5), "images": torch.arange(10).view(5, 2)}
    for parts in (1, 2, 3, 5, 8):
        rows = split_batch(batch, parts)
        assert len(rows) == min(parts, 5)
        for name, value in batch.items():
            assert torch.equal(torch.cat([row[name] for row in rows]), value)


@pytest.mark.parametrize("names", RECIPES[:1])
def test_checkpointed_gradients_are_the_same(names, clip_file):
    equal(gradients(clip_file, names), gradients(clip_file, names, grad_checkpointing=True))


def test_compiled_encoders_give_the_same_losses_gradients_and_names(clip_file, monkeypatch):
    """Traced and differentiated as for the real compiler, whose code generation takes minutes."""
    compile = torch.nn.Module.compile

    def quickly(module, **more):
        compile(module, backend="aot_eager", **more)

    monkeypatch.setattr(torch.nn.Module, "compile", quickly)
    names = "supkl+match2+dot"
    equal(gradients(clip_file, names), gradients(clip_file, names, compile=True), 1e-3, 1e-4)


def test_a_resnet_refuses_what_would_change_its_numbers(tmp_path):
    from model.backbone import Backbone
    from tests.model.test_backbone import RESNET

    torch.save(Backbone(RESNET, (96, 32)).state_dict(), tmp_path / "rn.pt")
    for flag, message in (
        ({"accum_steps": 2}, "--accum_steps: a ResNet normalises by the statistics"),
        (
            {"grad_checkpointing": True},
            "--grad_checkpointing: open_clip's ResNets do not support it",
        ),
    ):
        args = options(pretrain_choice=str(tmp_path / "rn.pt"), **flag)
        with pytest.raises(UserError, match=message):
            build_training_model(args, ["itc"], num_classes=0)


def test_a_resnet_refuses_a_batch_that_leaves_it_one_value_of_a_channel(tmp_path):
    """A single image at 32x32; with two, or a map of more places, there is a variance."""
    from model.backbone import Backbone
    from tests.model.test_backbone import RESNET

    torch.save(Backbone(RESNET, (32, 32)).state_dict(), tmp_path / "rn.pt")
    for size, images in (((32, 32), 1), ((32, 32), 2), ((64, 32), 1)):
        args = options(pretrain_choice=str(tmp_path / "rn.pt"), img_size=list(size))
        model = build_training_model(args, ["itc"], num_classes=0).train()
        pictures = torch.rand(images, 3, *size)
        if images * size[0] == 32:
            with pytest.raises(
                UserError, match="--batch_size 4: .*single image, .* --img_size 32 32"
            ):
                check_batch_norm(model, args, images)
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                model.encode_image(pictures)
        else:
            check_batch_norm(model, args, images)
            assert model.encode_image(pictures).isfinite().all()
