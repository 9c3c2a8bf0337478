"""A training run: epochs of steps, an evaluation, a checkpoint; read it top to bottom.

The run's folder receives train_log.txt, TensorBoard events, best.pth (weights of the epoch with
the highest R@1; with `--val_dataset both` that of val, and best_test.pth that of test) and last.pth
(everything that `--resume` needs).
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from datasets.build import on_device
from model.build import AEAFIRM
from processor.evaluator import Evaluator
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.devices import autocast
from utils.errors import UserError

# What `Trainer.state` holds and going on with a run needs.
STATE = ("model", "optimizer", "scaler", "epoch", "best", "generators")


class Trainer:
    """One run.

    Args:
        model: on its device.
        loader: training batches; its sampler's generator is part of the checkpoint.
        evaluators: of the splits that choose a checkpoint; the first chooses best.pth.
        run_dir: receives all files.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: AEAFIRM,
        loader: DataLoader,
        evaluators: Sequence[Evaluator],
        optimizer: Optimizer,
        scheduler: LRScheduler,
        device: torch.device,
        run_dir: Path,
        logger: logging.Logger,
    ) -> None:
        self.args, self.model, self.loader, self.evaluators = args, model, loader, evaluators
        self.optimizer, self.scheduler, self.device = optimizer, scheduler, device
        self.run_dir, self.log = run_dir, logger
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
        self.epoch = 0  # epochs done
        # By the split that chose it: its `epoch`, and all splits' `figures` there.
        self.best: dict[str, dict[str, Any]] = {}

    def train(self) -> dict[str, dict[str, Any]]:
        """Run the remaining epochs. Returns, by the split that chose it, the best `epoch` and
        every evaluated split's `figures` there."""
        args = self.args
        steps = len(self.loader)
        self.writer = SummaryWriter(self.run_dir)
        bar = tqdm(
            total=args.num_epoch * steps,
            initial=self.epoch * steps,
            unit="step",
            dynamic_ncols=True,
            disable=None,  # no bar where stderr is no terminal; the log has every figure
        )
        with self.writer, bar, self._interruptible():
            while self.epoch < args.num_epoch:
                started = time.perf_counter()
                line = self._train_epoch(bar)
                self.epoch += 1
                self.scheduler.step()
                if self.epoch % args.eval_period == 0 or self.epoch == args.num_epoch:
                    line += self._evaluate()
                    save_checkpoint(self.run_dir / "last.pth", self.state())
                seconds = time.perf_counter() - started
                self.log.info(f"epoch {self.epoch}/{args.num_epoch}  {line}  {seconds:.1f} s")
        return self.best

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Say on Ctrl-C how to go on."""
        try:
            yield
        except KeyboardInterrupt:
            last = self.run_dir / "last.pth"
            self.log.info(
                f"interrupted in epoch {self.epoch + 1}; "
                + (
                    f"go on with: python train.py --resume --resume_ckpt_file {last}"
                    if last.exists()
                    else f"there is no checkpoint yet, {self.run_dir} may be deleted"
                )
            )
            raise

    def _train_epoch(self, bar: tqdm) -> str:
        args, model = self.args, self.model
        sizes = model.base_model.sizes
        model.train()
        lr = self.scheduler.get_last_lr()[0]
        sums: dict[str, torch.Tensor] = {}
        since, samples, epoch_start, epoch_samples = time.perf_counter(), 0, time.perf_counter(), 0
        bar.set_description(f"epoch {self.epoch + 1}/{args.num_epoch}")
        batches = on_device(self.loader, self.device, sizes.image_mean, sizes.image_std)
        for step, batch in enumerate(batches, 1):
            self.optimizer.zero_grad(set_to_none=True)
            losses = self._backward(batch)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            # Sums stay on the device: between log lines nothing waits for it.
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach()
            samples += len(batch["pids"])
            bar.update()
            if step % args.log_period == 0 or step == len(self.loader):
                means = self._means(sums, step)
                now = time.perf_counter()
                speed = samples / (now - since)
                epoch_samples += samples
                since, samples = now, 0
                bar.set_postfix_str(
                    f"loss {means['total']:.3f}, lr {lr:.1e}, {speed:.0f} samples/s"
                )
                if step < len(self.loader):
                    self.log.info(
                        f"epoch {self.epoch + 1}/{args.num_epoch} step {step}/{len(self.loader)}  "
                        f"{_shown(means)}  lr {lr:.2e}  {speed:.0f} samples/s"
                    )
        speed = epoch_samples / (time.perf_counter() - epoch_start)
        for name, value in means.items():
            self.writer.add_scalar(f"loss/{name}", value, self.epoch + 1)
        self.writer.add_scalar("lr", lr, self.epoch + 1)
        self.writer.add_scalar("samples_per_second", speed, self.epoch + 1)
        return f"{_shown(means)}  lr {lr:.2e}  {speed:.0f} samples/s"

    def _backward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Losses of a batch by name, with `total`; their gradients are in the parameters."""

        def differentiate(losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            losses["total"] = sum(losses.values())
            self.scaler.scale(losses["total"]).backward()
            return losses

        context, model = autocast(self.args.precision, self.device), self.model
        if self.args.accum_steps == 1:
            with context:
                losses = model(batch)
            return differentiate(losses)
        # Gradient caching (Gao et al., 2021): the losses of the whole batch give the gradient of
        # every feature, and each part, encoded a second time, carries its share to the weights.
        parts = split_batch(batch, self.args.accum_steps)
        with torch.no_grad(), context:
            encoded = [model.encode(part) for part in parts]
        whole = {k: torch.cat([e[k] for e in encoded]).requires_grad_() for k in encoded[0]}
        with context:
            losses = model.losses({**whole, **model.encode_sentences()}, batch)
        losses = differentiate(losses)
        start = 0
        for part in parts:
            stop = start + len(part["pids"])
            with context:
                again = model.encode(part)
            used = [name for name in again if whole[name].grad is not None]
            torch.autograd.backward(
                [again[name] for name in used], [whole[name].grad[start:stop] for name in used]
            )
            start = stop
        return losses

    def _means(self, sums: dict[str, torch.Tensor], step: int) -> dict[str, float]:
        values = (torch.stack(list(sums.values())) / step).tolist()  # one wait for the device
        means = dict(zip(sums, values, strict=True))
        for name, value in means.items():
            if value != value or abs(value) == float("inf"):
                raise UserError(
                    f"loss {name} is {value} in epoch {self.epoch + 1}, by step {step}: try a "
                    f"lower --lr, more --warmup_epochs, or --precision fp32 "
                    f"(now {self.args.precision})"
                )
        return means

    def _evaluate(self) -> str:
        figures = {e.name: e.evaluate(self.model).percentages() for e in self.evaluators}
        line = ""
        for number, (split, values) in enumerate(figures.items()):
            for name, value in values.items():
                self.writer.add_scalar(f"{split}/{name}", value, self.epoch)
            line += f"  {split}: " + " ".join(
                f"{name} {value:.2f}" for name, value in values.items()
            )
            best = self.best.get(split)
            if best is None or values["R@1"] > best["figures"][split]["R@1"]:
                self.best[split] = {"epoch": self.epoch, "figures": figures}
                chosen = {**values, "epoch": self.epoch, "split": split}
                save_checkpoint(
                    self.run_dir / (f"best_{split}.pth" if number else "best.pth"),
                    {"model": self.model.state_dict(), "epoch": self.epoch, "best": chosen},
                )
                line += "  best"
        return line

    def state(self) -> dict[str, Any]:
        """Everything that going on with the run needs."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "best": self.best,
            "generators": {
                "sampler": self.loader.sampler.generator.get_state(),
                "firm": self.model.generator.get_state(),
            },
        }

    def resume(self, state: dict[str, Any], path: str) -> None:
        """Go on from `read_state(path)`. Raises UserError if it does not fit the options.

        Learning rates are those of the present options at that epoch, so that a run may be given
        more epochs.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path}: does not fit these options: {error}") from None
        self.scheduler.last_epoch = state["epoch"]
        for group, base, factor in zip(
            self.optimizer.param_groups,
            self.scheduler.base_lrs,
            self.scheduler.lr_lambdas,
            strict=True,
        ):
            group["initial_lr"], group["lr"] = base, base * factor(state["epoch"])
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.best = state["epoch"], state["best"]
        self.loader.sampler.generator.set_state(state["generators"]["sampler"])
        self.model.generator.set_state(state["generators"]["firm"])


def read_state(path: str) -> dict[str, Any]:
    """A checkpoint that a run can go on from. Raises UserError if it is none."""
    state = load_checkpoint(path)
    missing = sorted(set(STATE) - set(state))
    if missing:
        raise UserError(
            f"{path}: cannot be resumed, it lacks {', '.join(missing)}; "
            "give last.pth, or start from its weights with --finetune"
        )
    return state


def split_batch(batch: dict[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
    """Cut a batch into so many parts of nearly equal size (fewer if it has fewer samples)."""
    chunks = {name: value.tensor_split(parts) for name, value in batch.items()}
    rows = [dict(zip(chunks, values, strict=True)) for values in zip(*chunks.values(), strict=True)]
    return [row for row in rows if len(row["pids"])]


def _shown(means: dict[str, float]) -> str:
    parts = {k: v for k, v in means.items() if k != "total"}
    inner = f" ({', '.join(f'{k} {v:.3f}' for k, v in parts.items())})" if len(parts) > 1 else ""
    return f"loss {means['total']:.3f}{inner}"
