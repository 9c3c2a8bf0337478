"""The state of a run: named parts, each with `state_dict` and `load_state_dict`.

Saving a checkpoint to resume from (last.pth) is one loop over the parts, and so is resuming.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from model.aeafirm import AEAFIRM
from model.lora import base_names, merged_weights, updates_merged
from utils.distributed import Processes

# Names of the parts that a checkpoint needs to be resumed.
PARTS = (
    "model", "optimizer", "scaler", "generators", "nonfinite", "epoch_log", "best", "progress",
)  # fmt: skip


@dataclass
class Progress:
    """How much of a run is done."""

    epoch: int = 0  # completed epochs, including their evaluation
    step: int = 0  # completed steps of the next epoch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError for a state that `state_dict` cannot have returned."""
        epoch, step = state["epoch"], state["step"]
        if type(epoch) is not int or type(step) is not int or epoch < 0 or step < 0:
            raise ValueError("its epochs and steps are not counts")
        self.epoch, self.step = epoch, step


class ModelState:
    """A model's weights and buffers, without the frozen ones of LoRA: its own, also while others
    are in their place."""

    def __init__(self, model: AEAFIRM) -> None:
        self.model = model
        self.own: dict[str, Tensor] = {}
        self.frozen = base_names(model)

    def state_dict(self) -> dict[str, Any]:
        state = self.model.state_dict()
        state.update(self.own)
        for name in self.frozen:
            del state[name]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises RuntimeError for other names or shapes."""
        frozen = {name: v for name, v in self.model.state_dict().items() if name in self.frozen}
        self.model.load_state_dict({**frozen, **state})

    def state_with(self, values: dict[str, Tensor]) -> dict[str, Any]:
        """`state_dict` with other values, by name."""
        state = self.state_dict()
        state.update({name: value.to(state[name]) for name, value in values.items()})
        return state

    @contextmanager
    def evaluated(self, values: dict[str, Tensor]) -> Iterator[None]:
        """Give the model other values, by name, and merge LoRA's updates, as test.py has them."""
        values = {**values, **merged_weights(self.model, values)}
        with self._replaced(values), updates_merged(self.model):
            yield

    @contextmanager
    def _replaced(self, values: dict[str, Tensor]) -> Iterator[None]:
        """The model's own values come back at the end."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        self.own = {name: tensors[name].data for name in values}
        try:
            for name, value in values.items():
                tensors[name].data = value.to(self.own[name])
            yield
        finally:
            for name, value in self.own.items():
                tensors[name].data = value
            self.own = {}


class OptimizerState:
    """The optimizer's moments. Learning rates, decay and betas are not loaded: a resumed run takes
    them from its current options."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for different groups, shapes that do not fit, and NaN."""
        groups = self.optimizer.state_dict()["param_groups"]
        if [g["params"] for g in groups] != [g["params"] for g in state["param_groups"]]:
            raise ValueError("the optimizer's parameter groups differ")
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, moments in state["state"].items():
            for name, value in moments.items():
                if value.dim() and value.shape != parameters[index].shape:
                    raise ValueError(f"the optimizer's {name} has the shape {tuple(value.shape)}")
                if value.isnan().any():
                    raise ValueError(f"the optimizer's {name} holds NaN")
        self.optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


class Generators:
    """The model's random generator, and the global ones of every process, which it seeds. Training
    here does not use the global ones, but a method built on it may (dropout).

    Args:
        model_generator: the model's own.
        seed: of the global generators; each process adds its rank.
    """

    def __init__(
        self,
        model_generator: torch.Generator,
        seed: int,
        device: torch.device,
        processes: Processes,
    ) -> None:
        self.model_generator, self.device, self.processes = model_generator, device, processes
        torch.manual_seed(seed + processes.rank)
        np.random.seed(seed + processes.rank)
        random.seed(seed + processes.rank)

    def state_dict(self) -> dict[str, Any]:
        """All processes must call it."""
        state: Any = np.random.get_state()
        kind, keys, position, *gauss = state
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        globals_ = {
            "torch": torch.get_rng_state(),
            "cuda": cuda,
            "numpy": [kind, keys.tolist(), position, *gauss],
            "python": random.getstate(),
        }
        processes = self.processes.all_gather_objects(globals_)
        return {"model": self.model_generator.get_state(), "processes": processes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model_generator.set_state(state["model"])
        if self.processes.rank >= len(state["processes"]):
            return  # the run has more processes now: this one keeps its fresh seed
        globals_ = state["processes"][self.processes.rank]
        torch.set_rng_state(globals_["torch"])
        if self.device.type == "cuda" and globals_["cuda"] is not None:
            torch.cuda.set_rng_state(globals_["cuda"], self.device)
        np.random.set_state(tuple(globals_["numpy"]))
        random.setstate(globals_["python"])


def save_state(parts: dict[str, Stateful], metadata: dict[str, Any]) -> dict[str, Any]:
    """The content of last.pth. All processes must call it.

    Args:
        metadata: entries that a resumed run, or a reader of the file, can compare: `data`, ...
    """
    return {**{name: part.state_dict() for name, part in parts.items()}, **metadata}


def load_state(parts: dict[str, Stateful], state: dict[str, Any]) -> None:
    """Load the result of `save_state` into the parts. Raises ValueError for a part that it lacks,
    and whatever a part raises."""
    for name, part in parts.items():
        if name not in state:
            raise ValueError(f"it has no {name}, which only a new run can start")
        part.load_state_dict(state[name])
