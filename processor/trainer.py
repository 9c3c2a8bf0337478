"""A training run: epochs of steps, each with an evaluation and a checkpoint. Read top to bottom.

Files in the run's folder: train_log.txt, TensorBoard events, history.jsonl, last.pth (everything
that `--resume` needs) and best.pth (weights of the epoch with the highest R@1 on the first
selecting split, or of the last epoch without one). `--val_dataset both` adds best_test.pth, the
best epoch on test, and `--average_last` adds averaged.pth. A run that stops at any step and is
resumed ends with the same results. With several processes only rank 0 writes files.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from easydict import EasyDict
from torch.distributed.checkpoint.stateful import Stateful

from datasets.loaders import TrainLoader, on_device
from model.lora import lora_entry
from processor.averages import Average, EpochAverage, mean_of
from processor.before_epoch import SampleValues
from processor.best import Best
from processor.epoch_log import EpochLog
from processor.evaluator import Evaluator
from processor.failures import explain_failures
from processor.nonfinite import NonFiniteGuard
from processor.state import Generators, ModelState, OptimizerState, Progress, save_state
from processor.step import TrainStep
from solver.build import set_lr
from utils.checkpoint import save_checkpoint
from utils.distributed import AgreedFlags
from utils.errors import StoppedBySignal, UserError
from utils.interrupt import StopRequest
from utils.runs import AVERAGED, LAST


class Trainer:
    """One run.

    Args:
        train_step: an optimisation step of the model.
        loader: training batches.
        evaluators: one for each selecting split; the first split selects best.pth. Without any,
            best.pth is the last epoch.
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
        self.args, self.train_step, self.loader = args, train_step, loader
        self.evaluators, self.run_dir, self.log, self.data = evaluators, run_dir, log, data
        self.model, self.processes = train_step.model, train_step.processes
        self.device, self.sampler = train_step.device, loader.batch_sampler
        self.progress = Progress()
        self.best = Best([e.name for e in evaluators], run_dir)
        self.guard = NonFiniteGuard(
            args, loader.dataset, run_dir if self.processes.is_rank_0 else None, log
        )
        self.epoch_log = EpochLog(
            args, len(loader), self.sampler.count, self.device, run_dir, log, self.processes
        )
        self.samples = SampleValues(self.model, loader, args, self.device, log)
        # Everything that a resumed run needs, by name; see processor/state.py.
        self.weights, self.lora = ModelState(self.model), lora_entry(args)
        self.parts: dict[str, Stateful] = {
            "model": self.weights,
            "optimizer": OptimizerState(train_step.optimizer),
            "scaler": train_step.scaler,
            "generators": Generators(self.model.generator, args.seed, self.device, self.processes),
            "nonfinite": self.guard,
            "epoch_log": self.epoch_log,
            "best": self.best,
            "progress": self.progress,
        }
        if self.samples.rows:
            self.parts["samples"] = self.samples
        if train_step.average:
            self.parts["ema"] = train_step.average
        self.epoch_average: EpochAverage | None = None
        if args.average_last:
            self.epoch_average = EpochAverage(self.model, args.average_last, args.num_epoch)
            self.parts["epoch_average"] = self.epoch_average
        self.stop, self.flags = StopRequest(), AgreedFlags(self.processes)
        self.save_epochs, self.save_seconds = parse_period(args.save_period)
        self.last_save = time.monotonic()
        self.in_step = False  # during a step the queue may be newer than the weights

    def train(self) -> Best:
        """Run the remaining epochs. Raises StoppedBySignal after a signal, once all is saved."""
        self.epoch_log.open(self.progress.epoch, self.progress.step)
        try:
            with self.stop:
                while self.progress.epoch < self.args.num_epoch:
                    self._run_epoch()
                if self.epoch_average and self.epoch_average.epochs:
                    self._finish_average(self.epoch_average)
        except UserError as error:
            raise UserError(f"{error}{self._save_after_error()}") from None
        finally:
            self.epoch_log.close()
        return self.best

    def _run_epoch(self) -> None:
        """Train the remaining steps of an epoch, evaluate, log, save."""
        args, epoch = self.args, self.progress.epoch + 1
        is_last = epoch == args.num_epoch
        evaluation_due = is_last or epoch % args.eval_period == 0
        save_due = is_last or bool(self.save_epochs and epoch % self.save_epochs == 0)
        images = [self.loader.dataset.images, *(x for e in self.evaluators for x in e.files)]
        with explain_failures(args, self.device, images, "training"):
            summary = self._train_steps()
        with explain_failures(args, self.device, images, "evaluation"):
            metrics = self._evaluate(self.train_step.average) if evaluation_due else {}
            # The last epoch counts without metrics too: it is best.pth if no split selects.
            improved = self.best.update(epoch, metrics) if metrics or is_last else []
            self.progress.epoch, self.progress.step = epoch, 0
            if self.epoch_average:
                self.epoch_average.add(epoch)
            self.epoch_log.end(summary, metrics, improved)
            if improved or save_due:
                self.save()
            # last.pth has the same weights, so a kill between the two files loses no best epoch.
            for split in improved:
                self.save_best(split)

    def _train_steps(self) -> str:
        """Run the remaining steps of an epoch. Returns their summary for the log."""
        args, progress, sampler, config = (
            self.args, self.progress, self.sampler, self.model.base_model.config
        )  # fmt: skip
        lr = set_lr(self.train_step.optimizer, progress.epoch, args)
        sampler.set_epoch(progress.epoch, progress.step)
        self.epoch_log.begin(progress.epoch, progress.step, lr)
        self.samples.prepare(progress.epoch, self._save_or_stop)
        self.model.train()
        for batch in on_device(self.loader, self.device, config.image_mean, config.image_std):
            batch["counts"] = sampler.counts(progress.step)
            batch["epochs"] = progress.epoch + progress.step / len(self.loader)
            self.samples.add_to(batch)
            self.epoch_log.add_skipped_images(batch.pop("skipped", []))
            self.in_step = True
            values, skipped = self.train_step(batch)
            self.epoch_log.add(values, skipped)
            progress.step, self.in_step = progress.step + 1, False
            place = f"epoch {progress.epoch + 1}, step {progress.step}"
            self.guard.watch(place, sampler.batch(progress.step - 1), values, skipped)
            if progress.step % args.log_period == 0 and progress.step < len(self.loader):
                self.guard.check(wait=True)
                self.epoch_log.log_step()
            self._save_or_stop()
        self.guard.check(wait=True)
        return self.epoch_log.end_steps()

    def _evaluate(self, average: Average | None) -> dict[str, dict[str, float]]:
        """Metrics in percent by split, of an average of the weights if there is one."""
        with self.weights.evaluated(average.values if average else {}):
            metrics = {
                e.name: e.evaluate(self.model, self._save_or_stop).metrics for e in self.evaluators
            }
        # Another machine may round a similarity differently, but all must select the same epoch.
        return self.processes.from_rank_0(metrics)

    def save(self) -> None:
        """Write last.pth. All processes must call it."""
        self.guard.check(wait=True)
        metadata = {"epoch": self.progress.epoch, "batches": self.sampler.describe()}
        content = save_state(self.parts, {**metadata, **self._metadata()})
        self._write(self.run_dir / LAST, content, self.args.keep_last)
        self.last_save = time.monotonic()

    def save_best(self, split: str) -> None:
        """Write the checkpoint that a split selects. The model must be that of its epoch."""
        self._write(self.best.file(split), self.best_content(split))

    def best_content(self, split: str) -> dict[str, Any]:
        """The content of that checkpoint."""
        best = self.best.describe(split)
        metadata = {"epoch": best["epoch"], "best": best, **self._metadata()}
        average = self.train_step.average
        return {"model": self.weights.state_with(average.values if average else {}), **metadata}

    def _finish_average(self, average: EpochAverage) -> None:
        """Evaluate the mean of the last epochs' weights, and write it."""
        images = [x for e in self.evaluators for x in e.files]
        with explain_failures(self.args, self.device, images, "evaluation"):
            metrics = self._evaluate(average)
        about = {"epochs": average.epochs, "metrics": metrics}
        metadata = {"epoch": self.progress.epoch, "averaged": about, **self._metadata()}
        content = {"model": self.weights.state_with(average.values), **metadata}
        self._write(self.run_dir / AVERAGED, content)
        line = f"{AVERAGED} is {mean_of(average.epochs)}: no split chooses it"
        for split, values in metrics.items():
            line += f"  {split}: {' '.join(f'{name} {v:.2f}' for name, v in values.items())}"
        self.log.info(line)

    def _metadata(self) -> dict[str, Any]:
        return {"input": self.model.base_model.input, "data": self.data, **self.lora}

    def _write(self, path: Path, content: dict[str, Any], keep: int = 1) -> None:
        """Save a checkpoint at rank 0. The others wait at a barrier, since a slow disk may need
        longer than the timeout of a step's collectives."""
        if self.processes.is_rank_0:
            save_checkpoint(path, content, keep)
        self.processes.barrier()

    def _save_or_stop(self) -> None:
        """Between steps: save if the minutes of `--save_period` are over; save and stop if any
        process received a signal. Raises StoppedBySignal."""
        due = bool(self.save_seconds) and time.monotonic() - self.last_save >= self.save_seconds
        if due:
            self.last_save = time.monotonic()  # the flags answer one step later: ask only once
        stop, due = self.flags(bool(self.stop.name), self.processes.is_rank_0 and due)
        if stop or due:
            self.save()
        if stop:
            name = next(n for n in self.processes.all_gather_objects(self.stop.name) if n)
            raise StoppedBySignal(f"{name}: {self._saved_message()}")

    def _save_after_error(self) -> str:
        """Save after an error between two steps. Returns an addition to the error's message.

        Several processes do not save, since they may be at different steps.
        """
        if self.processes.size > 1 or self.in_step:
            return ""
        self.guard.waiting.clear()
        try:
            self.save()
        except UserError:  # a full disk may be the first error too
            return ""
        return f" ({self._saved_message()})"

    def _saved_message(self) -> str:
        program = "python" if self.processes.size == 1 else "torchrun ..."
        options = ["--resume", "--resume_ckpt_file", str(self.run_dir / LAST)]
        options += ["--image_cache", self.args.image_cache] if self.args.image_cache else []
        return (
            f"saved at epoch {self.progress.epoch + 1}, step {self.progress.step}; resume with: "
            f"{program} train.py {shlex.join(options)}"
        )


def parse_period(text: str) -> tuple[int, float]:
    """(epochs, seconds) of a `--save_period`; one of them is 0."""
    if text.endswith("min"):
        return 0, 60 * float(text.removesuffix("min"))
    return int(text), 0.0
