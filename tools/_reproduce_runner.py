"""Runs the jobs of reproduce.py: train.py and test.py as child processes, some jobs at a time."""

from __future__ import annotations

import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from processor.results import CHECKPOINTS, check_metrics, read_results, stem
from tools._reproduce_jobs import Job, epochs_done, epochs_logged
from utils.command_line import command_line_only_arguments
from utils.config import write_config
from utils.console import say
from utils.errors import UserError
from utils.files import PROJECT, append, lock, write_atomically
from utils.machine import cores
from utils.metrics import METRICS
from utils.text import visible

Slots = Sequence[dict[str, str]]


def gpu_slots(gpus: Sequence[str]) -> Slots:
    """One job at a time on each of these values of CUDA_VISIBLE_DEVICES."""
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]


def cpu_slots(count: int) -> Slots:
    """So many jobs at a time, each with its share of the CPU cores."""
    return [{"OMP_NUM_THREADS": str(max(1, cores() // count))} if count > 1 else {}] * count


class Runner:
    """Runs jobs, one at a time in each slot.

    Args:
        bar: counts epochs over all jobs.
        slots: environment variables of each: `gpu_slots` or `cpu_slots`.
        code: the present `code_version`.
        launcher: arguments of Python before the script: torchrun's, for several processes.
    """

    def __init__(
        self, bar: tqdm, slots: Slots, code: dict[str, str], launcher: Sequence[str] = ()
    ) -> None:
        self.bar, self.code, self.launcher = bar, code, launcher
        self.slots: queue.Queue[dict[str, str]] = queue.Queue()
        for slot in slots:
            self.slots.put(slot)
        self.children: set[subprocess.Popen[str]] = set()
        self.locks: dict[Path, int] = {}
        self.stopping = False

    def run(self, job: Job) -> None:
        """Train or resume, evaluate each protocol's checkpoint, and save the metrics."""
        if self.stopping:
            return
        slot = self.slots.get()
        self.bar.set_postfix_str(job.label)
        begun = f"resumes after epoch {epochs_done(job)}" if job.last else "starts"
        say(visible(f"{job.label}: {begun}; {job.folder / 'console.txt'}"))
        try:
            started = time.time()
            self._open(job)
            config = job.folder / "options.yaml"
            job.args.output_dir = str(job.folder / "logs")
            write_config(config, job.args)
            resume = ["--resume", "--resume_ckpt_file", str(job.last)] if job.last else []
            self._call(job, slot, "train.py", "--config_file", str(config), *resume)
            if job.last is None:
                raise UserError(f"{job.folder}: train.py wrote no last.pth; run this command again")
            run = job.last.parent
            metrics = {}
            for protocol, file in CHECKPOINTS[job.args.val_dataset].items():
                self._call(
                    job, slot, "test.py", "--config_file", str(run / "configs.yaml"),
                    "--checkpoint", str(run / file), *command_line_only_arguments(job.args),
                )  # fmt: skip
                path = run / f"{stem(file)}_results.json"
                results = read_results(path, run / f"{stem(file)}_queries.npz")
                check_metrics(results, path)
                first = next(iter(results["splits"]["test"]["galleries"].values()))
                metrics[protocol] = {
                    **{name: first[name] for name in METRICS},
                    **{name: results.get(name) for name in ("epoch", "protocol", "data")},
                    "queries": str(run / f"{stem(file)}_queries.npz"),
                }
            about = {"row": job.row, "seed": job.seed, "code": job.code}
            job.new_results = {**about, "seconds": time.time() - started, **metrics}
            text = json.dumps(job.new_results, indent=2)
            write_atomically(job.folder / "done.json", lambda file: file.write(text.encode()))
            scores = ", ".join(f"{p} R@1 {values['R@1']:.2f}" for p, values in metrics.items())
            seconds = job.new_results["seconds"]
            say(visible(f"{job.label}: done in {seconds:.0f} s, {scores}"))
        except (UserError, OSError) as error:  # a full disk must not end the other jobs
            job.error = str(UserError(str(error)))
            if not self.stopping:
                say(visible(f"FAILED {job.label}: {job.error}"))
        finally:
            if job.folder in self.locks:
                os.close(self.locks.pop(job.folder))
            self.slots.put(slot)

    def _open(self, job: Job) -> None:
        """Make and lock the folder, and record the code; first set aside a job to be retrained."""
        if job.retrain:
            set_aside(job)
        job.folder.mkdir(parents=True, exist_ok=True)
        self.locks[job.folder] = lock(job.folder, inherited=True)
        if self.code not in job.code:
            text = json.dumps([*job.code, self.code], indent=2)
            write_atomically(job.folder / "code.json", lambda file: file.write(text.encode()))

    def _call(self, job: Job, slot: dict[str, str], *command: str) -> None:
        """Run a script to its end, with its output in console.txt. Raises UserError if it fails."""
        console = job.folder / "console.txt"
        line, epochs = "", epochs_done(job)
        log = append(console)
        try:
            child = subprocess.Popen(
                [sys.executable, *self.launcher, *command], cwd=PROJECT, env=os.environ | slot,
                text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                pass_fds=[self.locks[job.folder]],
            )  # fmt: skip
            self.children.add(child)
            if self.stopping:  # `stop` may not have seen this child
                child.terminate()
            for text in child.stdout or ():
                with suppress(OSError):  # a full disk loses these lines, not the job
                    log.write(text)
                    log.flush()
                if text.strip("=\n"):  # torchrun ends its report with a rule
                    line = " ".join(text.split()).removeprefix("traceback : ")
                if (now := epochs_logged(job)) > epochs:
                    self.bar.update(now - epochs)
                    epochs = now
            code = child.wait()
            self.children.discard(child)
        finally:
            with suppress(OSError):
                log.close()
        if code:
            killed = f"{command[0]} was killed by {signal.Signals(-code).name}" if code < 0 else ""
            raise UserError(f"{killed or line or f'exit status {code}'} (see {console})")

    def stop(self) -> None:
        """Terminate the child processes; their last checkpoints stay."""
        self.stopping = True
        for child in list(self.children):
            child.terminate()


def set_aside(job: Job) -> None:
    """Rename the folder of a job that is to be retrained. Nothing is deleted."""
    holder = lock(job.folder, inherited=True)
    names = (Path(f"{job.folder}.backup{n}") for n in itertools.count(1))
    job.folder.rename(next(name for name in names if not name.exists()))
    os.close(holder)
    job.retrain = False


def run_jobs(jobs: list[Job], slots: Slots, code: dict[str, str]) -> None:
    """Run the unfinished jobs, with one progress bar over their epochs."""
    waiting = [job for job in jobs if job.results is None]
    say(f"{len(jobs)} jobs, {len(jobs) - len(waiting)} of them done already")
    total = sum(job.args.num_epoch for job in waiting)
    already = sum(epochs_done(job) for job in waiting)
    bar = tqdm(total=total, initial=already, unit="epoch", dynamic_ncols=True, disable=None)
    runner = Runner(bar, slots, code)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler)
    with bar, ThreadPoolExecutor(len(slots)) as pool:
        try:
            list(pool.map(runner.run, waiting))
        except KeyboardInterrupt:
            runner.stop()
            raise
