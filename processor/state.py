"""What survives a run that is cut off: parts with `state_dict` and `load_state_dict`, by name.

A checkpoint to resume from (last.pth) is one loop over the parts, and so is resuming.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from utils.distributed import Processes

# The parts' names, which a checkpoint must have to be resumed.
PARTS = (
    "model", "optimizer", "scaler", "generators", "nonfinite", "epoch_log", "best", "progress",
)  # fmt: skip


@dataclass
class Progress:
    """How far a run is."""

    epoch: int = 0  # epochs that are done, with their evaluation
    step: int = 0  # steps that are done of the next one

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError for what `state_dict` does not give."""
        epoch, step = state["epoch"], state["step"]
        if type(epoch) is not int or type(step) is not int or epoch < 0 or step < 0:
            raise ValueError("its epochs and steps are no counts")
        self.epoch, self.step = epoch, step


class OptimizerState:
    """The optimizer's moments. Rates, decay and betas are those of the present options, so that a
    resumed run may be given other ones."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for other groups, shapes that do not fit, and NaN."""
        groups = self.optimizer.state_dict()["param_groups"]
        if [g["params"] for g in groups] != [g["params"] for g in state["param_groups"]]:
            raise ValueError("the optimizer's groups are others")
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, moments in state["state"].items():
            for name, value in moments.items():
                if value.dim() and value.shape != parameters[index].shape:
                    raise ValueError(f"the optimizer's {name} has the shape {tuple(value.shape)}")
                if value.isnan().any():
                    raise ValueError(f"the optimizer's {name} holds NaN")
        self.optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


class Generators:
    """The model's own generator, and every process's global ones. Nothing here draws from the
    global ones, but a method that is built on it may (dropout).

    Args:
        seed: of the global ones; each process adds its rank.
    """

    def __init__(
        self, own: torch.Generator, seed: int, device: torch.device, processes: Processes
    ) -> None:
        self.own, self.device, self.processes = own, device, processes
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
        return {"model": self.own.get_state(), "processes": processes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.own.set_state(state["model"])
        if self.processes.rank >= len(state["processes"]):
            return  # with more processes than before, these begin anew
        found = state["processes"][self.processes.rank]
        torch.set_rng_state(found["torch"])
        if self.device.type == "cuda" and found["cuda"] is not None:
            torch.cuda.set_rng_state(found["cuda"], self.device)
        np.random.set_state(tuple(found["numpy"]))
        random.setstate(found["python"])


def save_state(parts: dict[str, Stateful | nn.Module], about: dict[str, Any]) -> dict[str, Any]:
    """The content of last.pth. All processes must call it.

    Args:
        about: what a reader of the file, and a resumed run, may compare: `data`, `input`, ...
    """
    return {**{name: part.state_dict() for name, part in parts.items()}, **about}


def load_state(parts: dict[str, Stateful | nn.Module], state: dict[str, Any]) -> None:
    """Load what `save_state` gave into the parts. Raises whatever a part raises."""
    for name, part in parts.items():
        part.load_state_dict(state[name])
