"""One optimisation step: the losses in mixed precision, their gradients, the update.

train_step = TrainStep(model, optimizer, args)
values, skipped = train_step(batch)          # never waits for the device
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from easydict import EasyDict
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from model.aeafirm import AEAFIRM
from processor.averages import MovingAverage
from utils.devices import autocast


class StepResult(NamedTuple):
    """Scalars on the device."""

    values: dict[str, Tensor]  # the losses, their `total`, `grad_norm`, and values to log
    skipped: Tensor  # bool: the loss or the gradient was not finite, so nothing has changed


class TrainStep:
    """Optimisation steps of a model.

    A step whose loss or gradient is not finite changes neither the weights nor the model's buffers
    (AEA's queue). Each process calls it with its shard of the batch.

    Args:
        model: on its device.
        args: this class reads `precision`, `accum_steps`, `grad_clip` and `ema`.

    Attributes:
        average: of the weights over the steps (`--ema`), or None.
    """

    def __init__(self, model: AEAFIRM, optimizer: Optimizer, args: EasyDict) -> None:
        self.model, self.optimizer, self.args = model, optimizer, args
        self.processes = model.processes
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.scaler = GradScaler(self.device.type, enabled=args.precision == "fp16")
        self.buffers = [
            (module, name)
            for module in model.modules()
            for name in module._buffers
            if name not in module._non_persistent_buffers_set
        ]
        self.average = MovingAverage(model, args.ema) if args.ema else None
        # DistributedDataParallel averages gradients over processes in the backward pass. Buffers
        # need no synchronisation, since every process computes the same queue.
        self.forward: nn.Module = model
        if self.processes.size > 1 and args.accum_steps == 1:
            self.forward = DistributedDataParallel(
                model, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True
            )
        else:
            self.processes.broadcast([p.data for p in model.parameters()])

    def __call__(self, batch: dict[str, Any]) -> StepResult:
        """One step on a batch that is on the device (see `AEAFIRM.forward`)."""
        self.optimizer.zero_grad(set_to_none=True)
        before = [getattr(module, name).clone() for module, name in self.buffers]
        values = {name: value.detach() for name, value in self.backward(batch).items()}
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.scaler.is_enabled():  # it checks only gradients, so one gets the loss's NaN
            gradients[0] += 0 * values["total"]
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if self.args.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.args.grad_clip, norm)
        bad_loss, bad_gradient = ~values["total"].isfinite(), ~norm.isfinite()
        skipped = no_update = bad_loss | bad_gradient
        if self.scaler.is_enabled():  # an overflow is normal as long as the scale can fall
            assert self.scaler._scale is not None  # since `unscale_`
            skipped = bad_loss | (bad_gradient & (self.scaler._scale <= 1))
        self.update(skipped)
        for (module, name), old in zip(self.buffers, before, strict=True):
            setattr(module, name, torch.where(no_update, old, getattr(module, name)))
        if self.average:
            self.average.update(no_update)
        return StepResult({**values, "grad_norm": norm.to(values["total"].dtype)}, skipped)

    def backward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute gradients into the parameters. Returns the model's output: scalars by name."""
        context, model = autocast(self.args.precision, self.device), self.model
        if self.args.accum_steps == 1:
            with context:
                values = self.forward(batch)
            self.scaler.scale(values["total"]).backward()
            return values
        # Gradient caching (Gao et al., 2021): the losses of the whole batch give the gradient of
        # every feature. Each part is then encoded again, to backpropagate its rows to the weights.
        parts = split_batch(batch, self.args.accum_steps)
        states, encoded = [], []
        with torch.no_grad(), context:
            for part in parts:
                states.append(self._random_state())
                encoded.append(model.encode(part))
        features = {k: torch.cat([e[k] for e in encoded]) for k in encoded[0]}
        for feature in features.values():
            feature.requires_grad_(feature.is_floating_point())
        with context:
            values = model.losses({**features, **model.encode_sentences()}, batch)
        self.scaler.scale(values["total"]).backward()
        gradients = {k: v.grad for k, v in features.items() if v.grad is not None}
        start = 0
        for part, state in zip(parts, states, strict=True):
            stop = start + len(part["pids"])
            with context, self._repeated(state):  # dropout drops the same again
                encoded_part = model.encode(part)
            used = [name for name in encoded_part if name in gradients]
            torch.autograd.backward(
                [encoded_part[name] for name in used],
                [gradients[name][start:stop] for name in used],
            )
            start = stop
        self.processes.all_reduce_mean([p.grad for p in self.parameters if p.grad is not None])
        return values

    def _random_state(self) -> tuple[Tensor, Tensor | None]:
        """The states of torch's global generators: the CPU's, and that of a CUDA device."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return torch.get_rng_state(), cuda

    @contextmanager
    def _repeated(self, state: tuple[Tensor, Tensor | None]) -> Iterator[None]:
        """Draw the random numbers after a state again."""
        cpu, cuda = state
        with torch.random.fork_rng([] if cuda is None else [self.device]):
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda, self.device)
            yield

    def update(self, skipped: Tensor) -> None:
        """Update the weights unless `skipped`."""
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.optimizer.param_groups[0]["fused"]:
            # As GradScaler does for fused optimizers: they skip on the device.
            vars(self.optimizer).update(grad_scale=None, found_inf=skipped.float())
            self.optimizer.step()
        elif not skipped:  # weights in half precision on the CPU
            self.optimizer.step()


def split_batch(batch: dict[str, Any], parts: int) -> list[dict[str, Tensor]]:
    """Split a batch into `parts` of nearly equal size (fewer if it has fewer samples)."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    chunks = {name: value.tensor_split(parts) for name, value in tensors.items()}
    split = [dict(zip(chunks, v, strict=True)) for v in zip(*chunks.values(), strict=True)]
    return [part for part in split if len(part["pids"])]
