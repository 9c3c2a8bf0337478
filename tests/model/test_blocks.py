"""The lean blocks are open_clip's blocks: the same weights, outputs and gradients."""

import copy

import pytest
import torch
from open_clip import transformer as clip

from model.blocks import QuickGELU, SelfAttention, use_lean_blocks
from processor.memory import PeakMemory


def transformers(dtype=torch.float64):
    """open_clip's transformer and its lean form."""
    torch.manual_seed(0)
    plain = clip.Transformer(128, 2, 2, act_layer=clip.QuickGELU).to(dtype)
    lean = copy.deepcopy(plain)
    use_lean_blocks(lean)
    return plain, lean


@pytest.mark.parametrize("causal", [False, True])
def test_outputs_and_gradients_are_those_of_open_clip(causal):
    plain, lean = transformers()
    assert plain.state_dict().keys() == lean.state_dict().keys()
    assert all(type(block.attn) is SelfAttention for block in lean.resblocks)
    x, toward = torch.randn(2, 3, 7, 128, dtype=torch.float64, generator=torch.manual_seed(1))
    mask = torch.full((7, 7), -torch.inf, dtype=torch.float64).triu(1) if causal else None
    results = []
    for transformer in (plain, lean):
        x = x.detach().requires_grad_()
        result = transformer(x, attn_mask=mask)
        (result * toward).sum().backward()
        results.append([result, x.grad, *(p.grad for p in transformer.parameters())])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_quick_gelu_has_open_clips_values_and_a_more_exact_gradient(dtype):
    x = torch.linspace(-8, 8, 2001, dtype=torch.float64).to(dtype)
    exact = x.double().requires_grad_()
    (exact * torch.sigmoid(1.702 * exact)).sum().backward()
    values, errors = [], []
    for gelu in (QuickGELU(), clip.QuickGELU()):
        x = x.detach().requires_grad_()
        values.append(gelu(x))
        values[-1].sum().backward()
        errors.append((x.grad.double() - exact.grad).abs().max())
    assert torch.equal(*values) and errors[0] <= errors[1] + 1e-15


def test_the_backward_pass_keeps_less_memory():
    kept = []
    for transformer in transformers(torch.float32):
        with PeakMemory() as memory:
            result = transformer(torch.randn(4, 65, 128))
            kept.append(memory.now)
        assert result.requires_grad
    assert kept[1] < 0.85 * kept[0]
