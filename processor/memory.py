"""The peak memory of a training step, estimated without computing it.

estimate = estimate_memory(model, args, like_cuda=True)
print(estimate.peak / 2**30)

PyTorch's FakeTensorMode computes the shapes of a step's tensors and none of their values. A step of
ViT-B/16 takes about two seconds this way, with any batch size and on any machine.
"""

from __future__ import annotations

import copy
import textwrap
import weakref
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from easydict import EasyDict
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datasets.synthetic import synthetic_batch
from model.aeafirm import AEAFIRM
from processor.step import TrainStep
from solver.build import build_optimizer
from utils.distributed import SINGLE_PROCESS, Processes

GIB = 2**30
LAYER_NORM = F.layer_norm
CPU = torch.device("cpu")


class Estimate(NamedTuple):
    """Bytes of tensors. CUDA's own memory and the allocator's gaps are not included."""

    state: int  # between steps: weights and their average, buffers, the optimizer's moments
    peak: int  # during a step, `state` included


def on_a_card(peak: int) -> float:
    """The bytes that a card needs for a peak of tensors: the allocator leaves gaps, and CUDA and
    its libraries need memory of their own. (The two numbers are an assumption.)"""
    return 1.05 * peak + 0.6 * GIB


class PeakMemory(TorchDispatchMode):
    """The bytes of all storages that operators make within the context, while they live.

    Attributes:
        now: bytes of the living storages.
        peak: the largest `now` so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: dict[int, int] = {}  # by the address of a living storage
        self.now = self.peak = 0

    def add(self, *tensors: Tensor) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.bytes:
                self.bytes[key] = storage.nbytes()
                self.now += self.bytes[key]
                weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        self.now -= self.bytes.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(*(value for value in tree_leaves(result) if isinstance(value, Tensor)))
        return result


def _layer_norm_of_cuda(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """With mixed precision, CUDA's layer normalisation computes and keeps float32; the CPU's does
    not."""
    if torch.is_autocast_enabled("cpu"):
        values = values.float()
    return LAYER_NORM(values, *args, **kwargs)


def fake_copy(model: AEAFIRM, mode: FakeTensorMode, device: torch.device = CPU) -> AEAFIRM:
    """A copy of a model whose weights have no values, on a device that need not exist."""

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    memo: dict[int, Any] = {id(model.processes): SINGLE_PROCESS}
    memo |= {id(buffer): fake(buffer) for buffer in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(fake(p.data), requires_grad=p.requires_grad)
    return copy.deepcopy(model, memo)


def fake_batch(
    raw: dict[str, Tensor], mode: FakeTensorMode, device: torch.device = CPU
) -> dict[str, Tensor]:
    """A batch as `to_device` makes it of a loader's, without values."""
    prefixes = [name.removesuffix("uniform") for name in raw if name.endswith("uniform")]
    shown = {f"{prefix}images": raw["images"] for prefix in prefixes} | raw
    with mode:
        return {
            name: torch.empty(
                value.shape,
                dtype=torch.float32 if name.endswith("images") else value.dtype,
                device=device,
            )
            for name, value in shown.items()
            if not name.endswith("uniform")
        }


def estimate_memory(
    model: AEAFIRM, args: EasyDict, like_cuda: bool, pairs: bool = True
) -> Estimate:
    """The memory of a training step of `model` with these options.

    The batch has `--batch_size` samples, and captions of `--text_length` tokens.

    Args:
        model: of any device; it is not changed.
        like_cuda: as CUDA computes layer normalisation, or as the CPU does. (The attention of short
            captions is the CPU's in both, which takes a little more.)
        pairs: samples have two views.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    model = fake_copy(model, mode).train()
    raw = synthetic_batch(args, model.needs_masked, model.more_images, pairs, pad=True)
    memory = PeakMemory()
    with mode:
        optimizer = build_optimizer(model.named_parameters(), args)
        for group in optimizer.param_groups:  # also of half-precision weights, as on CUDA
            group["fused"] = True
        train_step = TrainStep(model, optimizer, args)
        for parameter in train_step.parameters:  # the first step makes the moments
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        batch = fake_batch(raw, mode)
        memory.add(*model.parameters(), *model.buffers())
        moments = (v for state in optimizer.state.values() for v in state.values())
        memory.add(*(value for value in moments if isinstance(value, Tensor)))
        memory.add(*(train_step.average.values.values() if train_step.average else ()))
        state = memory.now
        memory.add(*batch.values())
        layer_norm = _layer_norm_of_cuda if like_cuda else LAYER_NORM
        with mock.patch.object(F, "layer_norm", layer_norm), memory:
            train_step(batch)
    return Estimate(state, memory.peak)


def memory_notes(
    model: AEAFIRM, args: EasyDict, pairs: bool, device: torch.device, processes: Processes
) -> list[str]:
    """`memory_note` of a process's part of the batch, for rank 0 on a GPU; otherwise none."""
    if device.type != "cuda" or not processes.is_rank_0:
        return []
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)  # by the model
    shard = EasyDict(args, batch_size=-(-args.batch_size // processes.size))
    return [memory_note(model, shard, pairs, free, total)]


def memory_note(model: AEAFIRM, args: EasyDict, pairs: bool, free: int, total: int) -> str:
    """A line for the log: does a step fit on a card?

    Args:
        args: `batch_size` is that of one process.
        free: bytes of the card that this process may use, the model's included.
        total: bytes of the card.
    """
    card = f"the card has {total / GIB:.1f} GiB, of which {free / GIB:.1f} are free"
    try:
        peak = estimate_memory(model, args, like_cuda=True, pairs=pairs).peak
    except Exception as error:  # such as a loss of one's own that reads values; only a hint is lost
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        return f"memory of a step: cannot be estimated ({reason}); {card}"
    need = on_a_card(peak)
    note = f"memory of a step: about {need / GIB:.1f} GiB, estimated; {card}"
    if need <= free:
        return note
    options = ["--accum_steps 4", "--grad_checkpointing", "a smaller --batch_size"]
    return f"warning: {note}: it may run out of memory; try {', '.join(options)}"
