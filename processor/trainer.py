"""A training run: epochs of steps, an evaluation, a checkpoint; read it top to bottom.

The run's folder receives train_log.txt, TensorBoard events, history.jsonl, best.pth (weights of the
epoch with the highest R@1; with `--val_dataset both` on held-out identities, and best_test.pth on
test; with `last` those of the last epoch) and last.pth (all that `--resume` needs). A run that is
cut off at any step and resumed ends as if nothing had happened. Of several processes rank 0 writes.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from easydict import EasyDict
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful

from datasets.loaders import TrainLoader, on_device
from processor.best import Best
from processor.epoch_log import EpochLog
from processor.evaluator import Evaluator
from processor.failures import explain_failures
from processor.nonfinite import NonFiniteGuard
from processor.state import Generators, OptimizerState, Progress, save_state
from processor.step import TrainStep
from solver.build import set_lr
from utils.checkpoint import save_checkpoint
from utils.distributed import AgreedFlags
from utils.errors import StoppedBySignal, UserError
from utils.interrupt import StopRequest
from utils.runs import LAST


class Trainer:
    """One run.

    Args:
        train_step: of a model and its optimizer.
        loader: training batches.
        evaluators: of the splits that choose a checkpoint; the first chooses best.pth. With none
            it is that of the last epoch.
        run_dir: receives all files.
        data: the `fingerprint` of the data set, which checkpoints keep.
    """

    def __init__(
        self,
        args: EasyDict,
        train_step: TrainStep,
        loader: TrainLoader,
        evaluators: Sequence[Evaluator],
        run_dir: Path,
        log: logging.Logger,
        data: dict[str, Any],
    ) -> None:
        self.args, self.train_step, self.loader, self.evaluators = (
            args,
            train_step,
            loader,
            evaluators,
        )
        self.run_dir, self.log, self.data = run_dir, log, data
        self.model, self.processes, device = (
            train_step.model,
            train_step.processes,
            train_step.device,
        )
        self.device, self.sampler = device, loader.batch_sampler
        self.progress = Progress()
        self.best = Best([e.name for e in evaluators], run_dir)
        self.guard = NonFiniteGuard(
            args, loader.dataset, run_dir if self.processes.is_rank_0 else None, log
        )
        self.epoch_log = EpochLog(
            args, len(loader), self.sampler.count, device, run_dir, log, self.processes
        )
        # All that survives the run, by name; see processor/state.py.
        self.parts: dict[str, Stateful | nn.Module] = {
            "model": self.model,
            "optimizer": OptimizerState(train_step.optimizer),
            "scaler": train_step.scaler,
            "generators": Generators(self.model.generator, args.seed, device, self.processes),
            "nonfinite": self.guard,
            "epoch_log": self.epoch_log,
            "best": self.best,
            "progress": self.progress,
        }
        self.stop, self.flags = StopRequest(), AgreedFlags(self.processes)
        self.save_epochs, self.save_seconds = parse_period(args.save_period)
        self.saved = time.monotonic()
        self.in_step = False  # then the queue may be ahead of the weights

    def train(self) -> Best:
        """Run the remaining epochs. Raises StoppedBySignal after a signal, when all is saved."""
        self.epoch_log.open(self.progress.epoch, self.progress.step)
        try:
            with self.stop:
                while self.progress.epoch < self.args.num_epoch:
                    self._epoch()
        except UserError as error:
            raise UserError(f"{error}{self._rescue()}") from None
        finally:
            self.epoch_log.close()
        return self.best

    def _epoch(self) -> None:
        """What remains of an epoch: its steps, its evaluation, its checkpoint."""
        args, epoch = self.args, self.progress.epoch + 1
        images = [self.loader.dataset.images, *(x for e in self.evaluators for x in e.files)]
        with explain_failures(args, self.device, images, "training"):
            line = self._steps()
        with explain_failures(args, self.device, images, "evaluation"):
            metrics, better = {}, []
            if epoch % args.eval_period == 0 or epoch == args.num_epoch:
                metrics = self._evaluate()
                if metrics or epoch == args.num_epoch:
                    better = self.best.update(epoch, metrics)
            for split, values in metrics.items():
                shown = " ".join(f"{name} {value:.2f}" for name, value in values.items())
                line += f"  {split}: {shown}" + "  best" * (split in better)
            self.progress.epoch, self.progress.step = epoch, 0
            self.epoch_log.end(line, metrics)
            due = self.save_epochs and epoch % self.save_epochs == 0
            if better or due or epoch == args.num_epoch:
                self.save()
            # After last.pth, which has the same weights: so a kill between the two loses no best.
            for split in better:
                self.save_best(split)

    def _steps(self) -> str:
        """The remaining steps of an epoch. Returns what the log says of it."""
        args, progress, sampler, config = (
            self.args, self.progress, self.sampler, self.model.base_model.config
        )  # fmt: skip
        lr = set_lr(self.train_step.optimizer, progress.epoch, args)
        sampler.set_epoch(progress.epoch, progress.step)
        self.epoch_log.begin(progress.epoch, progress.step, lr)
        self.model.train()
        for batch in on_device(self.loader, self.device, config.image_mean, config.image_std):
            batch["counts"] = sampler.counts(progress.step)
            self.epoch_log.add_skipped_images(batch.pop("skipped", []))
            self.in_step = True
            values, skipped = self.train_step(batch)
            self.epoch_log.add(values, skipped)
            progress.step, self.in_step = progress.step + 1, False
            place = f"epoch {progress.epoch + 1}, step {progress.step}"
            self.guard.watch(place, sampler.batch(progress.step - 1), values, skipped)
            if progress.step % args.log_period == 0 and progress.step < len(self.loader):
                self.guard.look(wait=True)
                self.epoch_log.show_step()
            self._save_or_stop()
        self.guard.look(wait=True)
        return self.epoch_log.end_steps()

    def _evaluate(self) -> dict[str, dict[str, float]]:
        """Metrics in percent by split."""
        metrics = {
            e.name: e.evaluate(self.model, self._save_or_stop).metrics for e in self.evaluators
        }
        # Other processors may round a similarity otherwise, and all must choose alike.
        return self.processes.from_rank_0(metrics)

    def save(self) -> None:
        """Write last.pth. All processes must call it."""
        self.guard.look(wait=True)
        about = {"epoch": self.progress.epoch, "batches": self.sampler.describe(), **self._about()}
        self._write(self.run_dir / LAST, save_state(self.parts, about), self.args.keep_last)
        self.saved = time.monotonic()

    def save_best(self, split: str) -> None:
        """Write the checkpoint that a split has chosen; the model is that of its epoch."""
        self._write(self.best.file(split), self.best_content(split))

    def best_content(self, split: str) -> dict[str, Any]:
        """The content of that checkpoint."""
        chosen = self.best.described(split)
        about = {"epoch": chosen["epoch"], "best": chosen, **self._about()}
        return {"model": self.model.state_dict(), **about}

    def _about(self) -> dict[str, Any]:
        return {"input": self.model.base_model.input, "data": self.data}

    def _write(self, path: Path, content: dict[str, Any], keep: int = 1) -> None:
        """Save a checkpoint at rank 0. The others wait: a step's collectives have less patience
        than a slow disk may ask for."""
        if self.processes.is_rank_0:
            save_checkpoint(path, content, keep)
        self.processes.barrier()

    def _save_or_stop(self) -> None:
        """Between steps: save if minutes are up; if any process got a signal, save and stop.

        Raises StoppedBySignal.
        """
        due = bool(self.save_seconds) and time.monotonic() - self.saved >= self.save_seconds
        if due:
            self.saved = time.monotonic()  # several processes agree a step later; ask once
        stop, due = self.flags(bool(self.stop.name), self.processes.is_rank_0 and due)
        if stop or due:
            self.save()
        if stop:
            name = next(n for n in self.processes.all_gather_objects(self.stop.name) if n)
            raise StoppedBySignal(f"{name}: {self._saved()}")

    def _rescue(self) -> str:
        """Save after an error that came between steps. Returns what to tell.

        Several processes may each be in another place, so they do not.
        """
        if self.processes.size > 1 or self.in_step:
            return ""
        self.guard.waiting.clear()
        try:
            self.save()
        except UserError:  # the disk may be what failed
            return ""
        return f" ({self._saved()})"

    def _saved(self) -> str:
        program = "python" if self.processes.size == 1 else "torchrun ..."
        words = ["--resume", "--resume_ckpt_file", str(self.run_dir / LAST)]
        words += ["--image_cache", self.args.image_cache] if self.args.image_cache else []
        return (
            f"saved at epoch {self.progress.epoch + 1}, step {self.progress.step}; resume with: "
            f"{program} train.py {shlex.join(words)}"
        )


def parse_period(text: str) -> tuple[int, float]:
    """(epochs, seconds) of a `--save_period`; the one that it does not give is 0."""
    if text.endswith("min"):
        return 0, 60 * float(text.removesuffix("min"))
    return int(text), 0.0
