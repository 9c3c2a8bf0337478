"""A training run: epochs of steps, an evaluation, a checkpoint; read it top to bottom.

The run's folder receives train_log.txt, TensorBoard events, best.pth (weights of the epoch with
the highest R@1; with `--val_dataset both` on held-out identities, and best_test.pth on test; with
`last` those of the last epoch) and last.pth (everything that `--resume` needs). A run that is cut
off at any step and resumed ends as if nothing had happened. Of several processes the first alone
writes.
"""

from __future__ import annotations

import logging
import shlex
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from datasets.loaders import on_device
from model.aeafirm import AEAFIRM
from processor.evaluator import Evaluator
from processor.guards import Guard, explained
from processor.resume import best_of, seed_generators, state_of
from utils.checkpoint import save_checkpoint
from utils.devices import autocast
from utils.distributed import ALONE, Votes, World
from utils.errors import Stopped, UserError
from utils.interrupt import StopRequest
from utils.logger import note_in_file
from utils.runs import EVENTS, LAST, LAST_EPOCH


class Trainer:
    """One run.

    Args:
        model: on its device.
        loader: training batches of an `EpochSampler`, whose position is part of the checkpoint.
        evaluators: of the splits that choose a checkpoint; the first chooses best.pth. With none
            it is that of the last epoch.
        run_dir: receives all files.
        data: the `fingerprint` of the data set, which checkpoints keep.
    """

    def __init__(
        self,
        args: EasyDict,
        model: AEAFIRM,
        loader: DataLoader | None,
        evaluators: Sequence[Evaluator] | None,
        optimizer: Optimizer | None,
        scheduler: LRScheduler | None,
        device: torch.device,
        run_dir: Path | None,
        logger: logging.Logger | None,
        world: World = ALONE,
        data: dict[str, Any] | None = None,
    ) -> None:
        self.args, self.model, self.loader, self.evaluators = args, model, loader, evaluators
        self.data = data
        self.optimizer, self.scheduler, self.device = optimizer, scheduler, device
        self.run_dir, self.log, self.world = run_dir, logger, world
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # Averages gradients over processes in the backward pass. Buffers need no synchronisation:
        # every process computes the same queue.
        self.forward = model
        if world.size > 1 and args.accum_steps == 1:
            self.forward = DistributedDataParallel(
                model, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True
            )
        else:
            world.spread([p.data for p in model.parameters()])
        seed_generators(args.seed + world.rank)
        dataset = loader.dataset if loader else None
        self.guard = Guard(args, model, dataset, run_dir if world.leads else None, logger)
        self.writer: SummaryWriter | None = None
        self.stop, self.votes = StopRequest(), Votes(world)
        self.save_epochs, self.save_seconds = parse_period(args.save_period)
        self.saved = time.monotonic()
        self.epoch = 0  # epochs done, with their evaluation
        self.step = 0  # steps done of the epoch under way
        # Of that epoch's losses and gradient norms, and of good `steps` and `norms`.
        self.sums: dict[str, torch.Tensor] = {}
        self.in_step = False  # then the queue may be ahead of the weights
        self.skipped = 0  # broken images of that epoch
        self.reported: dict[str, None] = {}  # messages on them, of this process's shares
        # By the split that chose it: its `epoch`, and all splits' `figures` there.
        self.best: dict[str, dict[str, Any]] = {}

    def train(self) -> dict[str, dict[str, Any]]:
        """Run the remaining epochs. Returns, by the split that chose it, the best `epoch` and
        every evaluated split's `figures` there.

        Raises Stopped when a signal asked to leave and all is saved.
        """
        args = self.args
        bar = tqdm(
            total=args.num_epoch * len(self.loader),
            initial=self.epoch * len(self.loader) + self.step,
            unit="step",
            dynamic_ncols=True,
            # No bar where stderr is no terminal; the log has every figure.
            disable=None if self.world.leads else True,
        )
        with self._curves(), bar, self.stop:
            while self.epoch < args.num_epoch:
                try:
                    self._epoch(bar)
                except UserError as error:
                    raise UserError(f"{error}{self._rescue()}") from None
        return self.best

    @contextmanager
    def _curves(self) -> Iterator[None]:
        """TensorBoard's writer, of the leader. A full disk ends the curves, not the run."""
        if self.world.leads:
            threading.excepthook = _excepthook
            starts = EVENTS.format(1 + sum(1 for _ in self.run_dir.glob("events.out.*")))
            try:
                self.writer = SummaryWriter(
                    self.run_dir, purge_step=self.epoch + 1, filename_suffix=starts
                )
            except UnicodeEncodeError:
                self.log.warning(f"{self.run_dir}: no curves: TensorBoard wants a name in UTF-8")
        try:
            yield
        finally:
            with suppress(OSError):
                if self.writer:
                    self.writer.close()

    def _epoch(self, bar: tqdm) -> None:
        """What remains of an epoch: its steps, its evaluation, its checkpoint."""
        args, started = self.args, time.perf_counter()
        images = [self.loader.dataset.images, *(x for e in self.evaluators for x in e.files)]
        with explained(args, self.device, images, "training"):
            line = self._train_epoch(bar)
        with explained(args, self.device, images, "evaluation"):
            better: list[str] = []
            if (self.epoch + 1) % args.eval_period == 0 or self.epoch + 1 == args.num_epoch:
                shown, better = self._evaluate()
                line += shown
            self.epoch, self.step, self.sums, self.skipped = self.epoch + 1, 0, {}, 0
            self.scheduler.step()
            self.loader.batch_sampler.end_epoch()
            seconds = time.perf_counter() - started
            self.log.info(f"epoch {self.epoch}/{args.num_epoch}  {line}  {seconds:.1f} s")
            due = self.save_epochs and self.epoch % self.save_epochs == 0
            if better or due or self.epoch == args.num_epoch:
                self.save()
            # After last.pth, which has the same weights: so a kill between the two loses no best.
            for split in better:
                self._write(self.best_file(split), best_of(self, split))

    def _rescue(self) -> str:
        """Save after an error that came between steps. Returns what to tell.

        Several processes may each be in another place, so they do not.
        """
        if self.world.size > 1 or self.in_step:
            return ""
        self.guard.waiting.clear()
        try:
            self.save()
        except UserError:  # the disk may be what failed
            return ""
        return f" ({self._saved()})"

    def _train_epoch(self, bar: tqdm) -> str:
        """The remaining steps of an epoch. Returns what the log says of it."""
        args, model = self.args, self.model
        sizes, sampler = model.base_model.sizes, self.loader.batch_sampler
        model.train()
        lr = self.scheduler.get_last_lr()[0]
        since, samples, begun, means = time.perf_counter(), 0, (time.perf_counter(), self.step), {}
        bar.set_description(f"epoch {self.epoch + 1}/{args.num_epoch}")
        for batch in on_device(self.loader, self.device, sizes.image_mean, sizes.image_std):
            batch["counts"] = sampler.counts(self.step)
            self._note_skipped(batch.pop("skipped", []))
            self.in_step = True
            figures, bad = self._step(batch)
            # Sums stay on the device: between log lines nothing waits for it. A norm that fp16's
            # scaler made overflow is left out.
            norm = figures["grad_norm"]
            counts = {"steps": torch.ones_like(norm), "norms": norm.isfinite().to(norm.dtype)}
            for name, value in {**figures, **counts}.items():
                left_out = bad | ~norm.isfinite() if name == "grad_norm" else bad
                self.sums[name] = self.sums.get(name, 0) + value.masked_fill(left_out, 0)
            self.step, self.in_step = self.step + 1, False
            place = f"epoch {self.epoch + 1}, step {self.step}"
            self.guard.watch(place, sampler.batch(self.step - 1), figures, bad)
            samples += sum(batch["counts"])
            bar.update()
            if self.step % args.log_period == 0 and self.step < len(self.loader):
                means = self._means()
                now = time.perf_counter()
                speed, since, samples = samples / (now - since), now, 0
                self._show(bar, means, lr, speed)
                self.log.info(
                    f"epoch {self.epoch + 1}/{args.num_epoch} step {self.step}/{len(self.loader)}  "
                    f"{_shown(means)}  lr {lr:.2e}  {speed:.0f} samples/s"
                )
            self._leave_or_save()
        means = self._means()
        start, first = begun
        done = min(self.step * args.batch_size, sampler.count) - first * args.batch_size
        speed = max(done, 0) / (time.perf_counter() - start)
        self._show(bar, means, lr, speed)
        scalars = {f"loss/{k}": v for k, v in means.items() if k != "grad_norm"}
        scalars |= {"grad_norm": means["grad_norm"], "lr": lr, "samples_per_second": speed}
        self._write_scalars(scalars)
        line = f"{_shown(means)}  lr {lr:.2e}  {speed:.0f} samples/s"
        skipped = sum(self.world.objects(self.skipped))
        if not skipped:
            return line
        told = [text for texts in self.world.objects(list(self.reported)) for text in texts]
        for text in told if self.world.leads else ():
            if text not in self.reported:  # another process, on the console alone
                note_in_file(f"skipped in epoch {self.epoch + 1}: {text}")
                self.reported[text] = None
        return f"{line}  broken images skipped: {skipped}"

    def _step(self, batch: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """One step. Returns its losses by name, `total` and `grad_norm`, and whether one of them
        was not finite, so that the step was skipped; all on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        self.guard.before()
        losses = {name: value.detach() for name, value in self._backward(batch).items()}
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.scaler.is_enabled():  # it judges by gradients alone
            gradients[0] += 0 * losses["total"]  # NaN if the loss is not finite
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.args.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.args.grad_clip, norm)
        no_loss, no_gradient = ~losses["total"].isfinite(), ~norm.isfinite()
        bad = undone = no_loss | no_gradient
        if self.scaler.is_enabled():  # gradients that overflow are its business, down to scale 1
            bad = no_loss | (no_gradient & (self.scaler._scale <= 1))
        self._update(bad)
        self.guard.after(undone)
        return {**losses, "grad_norm": norm.to(losses["total"].dtype)}, bad

    def _update(self, bad: torch.Tensor) -> None:
        """Step the optimizer unless `bad`."""
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.optimizer.param_groups[0]["fused"]:
            # What the scaler itself gives to fused optimizers: they skip on the device.
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad.float()
            self.optimizer.step()
        elif not bad:  # weights in half or double precision: a wait for the device
            self.optimizer.step()

    def _backward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Losses of a batch by name, with `total`; their gradients are in the parameters."""

        def differentiate(losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            self.scaler.scale(losses["total"]).backward()
            return losses

        context, model = autocast(self.args.precision, self.device), self.model
        if self.args.accum_steps == 1:
            with context:
                losses = self.forward(batch)
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
        self.world.average([p.grad for p in self.parameters if p.grad is not None])
        return losses

    def _means(self) -> dict[str, float]:
        """Means over the epoch's good steps so far."""
        self.guard.look(wait=True)
        names = list(self.sums)
        values = torch.stack([self.sums[name].double() for name in names]).tolist()  # one wait
        sums = dict(zip(names, values, strict=True))
        counts = {"grad_norm": sums.pop("norms")}
        steps = sums.pop("steps")
        return {
            name: value / count if (count := counts.get(name, steps)) else float("nan")
            for name, value in sums.items()
        }

    def _note_skipped(self, messages: list[str]) -> None:
        self.skipped += len(messages)
        for text in messages:
            if text not in self.reported:
                self.log.warning(f"skipped in epoch {self.epoch + 1}: {text}")
        self.reported |= dict.fromkeys(messages)

    def _show(self, bar: tqdm, means: dict[str, float], lr: float, speed: float) -> None:
        bar.set_postfix_str(f"loss {means['total']:.3f}, lr {lr:.1e}, {speed:.0f} samples/s")

    def _write_scalars(self, values: dict[str, float]) -> None:
        if self.writer is None:
            return
        try:
            for name, value in values.items():
                self.writer.add_scalar(name, value, self.epoch + 1)
            self.writer.flush()
        except OSError as error:
            self.log.warning(f"{self.run_dir}: no more curves for TensorBoard: {error}")
            self.writer = None

    def _evaluate(self) -> tuple[str, list[str]]:
        """Evaluate the epoch. Returns what the log says of it, and the splits that chose it."""
        if not self.evaluators:
            if self.epoch + 1 < self.args.num_epoch:
                return "", []
            self.best = {LAST_EPOCH: {"epoch": self.epoch + 1, "figures": {}}}
            return "", [LAST_EPOCH]
        figures = {
            e.name: e.evaluate(self.model, self._leave_or_save).percentages()
            for e in self.evaluators
        }
        # Other processors may round a similarity otherwise, and all must choose alike.
        figures = self.world.from_leader(figures)
        line, better = "", []
        for split, values in figures.items():
            self._write_scalars({f"{split}/{name}": value for name, value in values.items()})
            line += f"  {split}: " + " ".join(
                f"{name} {value:.2f}" for name, value in values.items()
            )
            best = self.best.get(split)
            if best is None or values["R@1"] > best["figures"][split]["R@1"]:
                self.best[split] = {"epoch": self.epoch + 1, "figures": figures}
                better.append(split)
                line += "  best"
        self.best = {split: self.best[split] for split in figures}
        return line, better

    @property
    def choosers(self) -> list[str]:
        """The splits that choose a checkpoint; the first one's is best.pth."""
        return [e.name for e in self.evaluators] or [LAST_EPOCH]

    def best_file(self, split: str) -> Path:
        return self.run_dir / ("best.pth" if split == self.choosers[0] else f"best_{split}.pth")

    def _write(self, path: Path, content: dict[str, Any], keep: int = 1) -> None:
        """The leader saves a checkpoint. The others wait: a step's collectives have less patience
        than a slow disk may ask for."""
        if self.world.leads:
            save_checkpoint(path, content, keep)
        self.world.wait()

    def _leave_or_save(self) -> None:
        """Between steps: save if minutes are up; if any process was asked to leave, save and leave.

        Raises Stopped.
        """
        due = bool(self.save_seconds) and time.monotonic() - self.saved >= self.save_seconds
        if due:
            self.saved = time.monotonic()  # several processes agree a step later; ask once
        leave, due = self.votes(bool(self.stop.name), self.world.leads and due)
        if leave or due:
            self.save()
        if leave:
            name = next(name for name in self.world.objects(self.stop.name) if name)
            raise Stopped(f"{name}: {self._saved()}")

    def _saved(self) -> str:
        program = "python" if self.world.size == 1 else "torchrun ..."
        words = ["--resume", "--resume_ckpt_file", str(self.run_dir / LAST)]
        words += ["--image_cache", self.args.image_cache] if self.args.image_cache else []
        return (
            f"saved at epoch {self.epoch + 1}, step {self.step}; go on with: {program} train.py "
            f"{shlex.join(words)}"
        )

    def save(self) -> None:
        """Write last.pth. All processes must call it."""
        self.guard.look(wait=True)
        self._write(self.run_dir / LAST, state_of(self), self.args.keep_last)
        self.saved = time.monotonic()


def _excepthook(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread hands its error on to `_write_scalars`, which tells it."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(args)


def parse_period(text: str) -> tuple[int, float]:
    """(epochs, seconds) of a `--save_period`; the one that it does not give is 0."""
    if text.endswith("min"):
        return 0, 60 * float(text.removesuffix("min"))
    return int(text), 0.0


def split_batch(batch: dict[str, Any], parts: int) -> list[dict[str, torch.Tensor]]:
    """Cut a batch into so many parts of nearly equal size (fewer if it has fewer samples)."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    chunks = {name: value.tensor_split(parts) for name, value in tensors.items()}
    rows = [dict(zip(chunks, values, strict=True)) for values in zip(*chunks.values(), strict=True)]
    return [row for row in rows if len(row["pids"])]


def _shown(means: dict[str, float]) -> str:
    if means["total"] != means["total"]:
        return "loss: no finite step yet"
    parts = {k: v for k, v in means.items() if k not in ("total", "grad_norm")}
    inner = f" ({', '.join(f'{k} {v:.3f}' for k, v in parts.items())})" if len(parts) > 1 else ""
    return f"loss {means['total']:.3f}{inner}"
