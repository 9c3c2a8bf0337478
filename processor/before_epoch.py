"""Values of the training samples that losses compute before each epoch.

A loss may ask for them (`before_epoch` in its row of the registry), for example RDE's decision
which pairs are clean. The trainer calls `prepare` before an epoch and `add_to` for each batch; the
loss reads `Inputs.samples`. A resumed run has the same values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import copy
from importlib import import_module
from typing import Any

import numpy as np
import torch
from easydict import EasyDict
from torch import Tensor
from tqdm import tqdm

from datasets.loaders import TrainLoader, on_device
from datasets.samplers import RandomSampler
from model.aeafirm import AEAFIRM
from model.losses.inputs import SAMPLES, BeforeEpoch, Inputs
from utils.devices import autocast


class SampleValues:
    """The values of an epoch, [N] each, on the device.

    Args:
        loader: of the training; it is not used up.
    """

    def __init__(
        self,
        model: AEAFIRM,
        loader: TrainLoader,
        args: EasyDict,
        device: torch.device,
        log: logging.Logger,
    ) -> None:
        self.model, self.loader, self.args, self.device = model, loader, args, device
        self.log, self.processes = log, model.processes
        self.rows = [row for row in model.rows.values() if row.before_epoch]
        for row in self.rows:
            if row.library:  # now, since importing it may use random numbers
                import_module(row.library)
        self.epoch, self.values = -1, dict[str, Tensor]()  # of which epoch the values are

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for values of another number of samples."""
        for name, value in state["values"].items():
            if value.shape != (len(self.loader.dataset),) or not value.is_floating_point():
                raise ValueError(f"its values '{name}' are not one for each training sample")
        self.epoch = state["epoch"]
        self.values = {name: value.to(self.device) for name, value in state["values"].items()}

    def prepare(self, epoch: int, between: Callable[[], object]) -> None:
        """Compute the values for an epoch (from 0), unless they are known.

        Args:
            between: called after every batch, the same number of times in all processes.
        """
        if not self.rows or self.epoch == epoch:
            return
        seed = int(np.random.SeedSequence([self.args.seed, epoch, 1]).generate_state(1)[0])
        values: dict[str, Tensor] = {}
        noisy = self.loader.dataset.noisy
        for row in self.rows:
            assert row.before_epoch is not None
            context = BeforeEpoch(
                epoch, self.args, seed, lambda of: self._evaluate(epoch, of, between),
                self.log.info, None if noisy is None else torch.from_numpy(noisy),
            )  # fmt: skip
            values |= row.before_epoch(context)
        # Another machine may round differently, but all must train with the same values.
        values = self.processes.from_rank_0(values)
        self.epoch = epoch
        self.values = {name: value.to(self.device) for name, value in values.items()}

    def add_to(self, batch: dict[str, Any]) -> None:
        """Give a batch the values of its samples."""
        for name, value_N in self.values.items():
            batch[f"{SAMPLES}{name}"] = value_N[batch["index"]]

    @torch.no_grad()
    def _evaluate(
        self,
        epoch: int,
        of: Callable[[Inputs], dict[str, Tensor]],
        between: Callable[[], object],
    ) -> dict[str, Tensor]:
        """`BeforeEpoch.evaluate`. A sample whose image is broken (--on_bad_image skip) has NaN."""
        dataset, config = self.loader.dataset, self.model.base_model.config
        sampler = RandomSampler(len(dataset), self.args.batch_size, self.args.seed, self.processes)
        sampler.set_epoch(epoch)
        # Of the further images only those that the values need. Their random numbers are a sample's
        # last ones, so the others stay the same.
        needed = {image for row in self.rows for image in row.images}
        reduced = copy(dataset)
        reduced.more_numbers = {n: v for n, v in dataset.more_numbers.items() if n in needed}
        loader = TrainLoader(
            reduced,
            batch_sampler=sampler,
            collate_fn=self.loader.collate_fn,
            num_workers=self.loader.num_workers,
            pin_memory=self.loader.pin_memory,
            worker_init_fn=self.loader.worker_init_fn,
            generator=torch.Generator(),
        )
        values: dict[str, Tensor] = {}
        bar = tqdm(
            on_device(loader, self.device, config.image_mean, config.image_std),
            total=len(loader), desc=f"before epoch {epoch + 1}", leave=False,
            disable=None if self.processes.is_rank_0 else True,
        )  # fmt: skip
        was_training = self.model.training
        self.model.eval()
        for step, batch in enumerate(bar):
            batch["counts"] = sampler.counts(step)
            batch.pop("skipped", None)
            with autocast(self.args.precision, self.device):
                inputs, index_B = self.model.inputs(batch)
            for name, value_B in of(inputs).items():
                empty = value_B.new_full((len(dataset),), torch.nan)
                values.setdefault(name, empty)[index_B] = value_B
            between()
        self.model.train(was_training)
        return {name: value_N.float().cpu() for name, value_N in values.items()}
