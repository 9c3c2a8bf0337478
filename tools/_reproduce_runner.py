"""Runs the jobs of reproduce.py: train.py and test.py as child processes, one job per GPU."""

from __future__ import annotations

import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import time
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
from utils.metrics import METRICS
from utils.text import visible


class Runner:
    """Runs jobs, one at a time or one per GPU.

    Args:
        bar: counts epochs over all jobs.
        code: the present `code_version`.
    """

    def __init__(self, bar: tqdm, gpus: list[str], code: dict[str, str]) -> None:
        self.bar, self.code = bar, code
        self.gpus: queue.Queue[str | None] = queue.Queue()
        slots: list[str | None] = [*gpus]
        for gpu in slots or [None]:
            self.gpus.put(gpu)
        self.children: set[subprocess.Popen[str]] = set()
        self.locks: dict[Path, int] = {}
        self.stopping = False

    def run(self, job: Job) -> None:
        """Train or resume, evaluate each protocol's checkpoint, and save the metrics."""
        if self.stopping:
            return
        gpu = self.gpus.get()
        self.bar.set_postfix_str(f"{job.row}, seed {job.seed}")
        begun = f"resumes after epoch {epochs_done(job)}" if job.last else "starts"
        say(visible(f"{job.row}, seed {job.seed}: {begun}; {job.folder / 'console.txt'}"))
        try:
            started = time.time()
            self._open(job)
            config = job.folder / "options.yaml"
            job.args.output_dir = str(job.folder / "logs")
            write_config(config, job.args)
            resume = ["--resume", "--resume_ckpt_file", str(job.last)] if job.last else []
            self._call(job, gpu, "train.py", "--config_file", str(config), *resume)
            if job.last is None:
                raise UserError(f"{job.folder}: train.py wrote no last.pth; run this command again")
            run = job.last.parent
            metrics = {}
            for protocol, file in CHECKPOINTS[job.args.val_dataset].items():
                self._call(
                    job, gpu, "test.py", "--config_file", str(run / "configs.yaml"),
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
            say(visible(f"{job.row}, seed {job.seed}: done in {seconds:.0f} s, {scores}"))
        except (UserError, OSError) as error:  # a full disk must not end the other jobs
            job.error = str(UserError(str(error)))
            if not self.stopping:
                say(visible(f"FAILED {job.row}, seed {job.seed}: {job.error}"))
        finally:
            if job.folder in self.locks:
                os.close(self.locks.pop(job.folder))
            self.gpus.put(gpu)

    def _open(self, job: Job) -> None:
        """Make and lock the folder, and record the code; rename a folder that is to be retrained.

        Nothing is deleted.
        """
        job.folder.mkdir(parents=True, exist_ok=True)
        self.locks[job.folder] = lock(job.folder, inherited=True)
        if job.retrain:
            names = (Path(f"{job.folder}.backup{n}") for n in itertools.count(1))
            job.folder.rename(next(name for name in names if not name.exists()))
            os.close(self.locks.pop(job.folder))
            job.retrain = False
            self._open(job)
        elif self.code not in job.code:
            text = json.dumps([*job.code, self.code], indent=2)
            write_atomically(job.folder / "code.json", lambda file: file.write(text.encode()))

    def _call(self, job: Job, gpu: str | None, *command: str) -> None:
        """Run a script to its end, with its output in console.txt. Raises UserError if it fails."""
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {})
        console = job.folder / "console.txt"
        line, epochs = "", epochs_done(job)
        log = append(console)
        try:
            child = subprocess.Popen(
                [sys.executable, *command], cwd=PROJECT, env=environment, text=True,
                errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                pass_fds=[self.locks[job.folder]],
            )  # fmt: skip
            self.children.add(child)
            for line in child.stdout or ():
                with suppress(OSError):  # a full disk loses these lines, not the job
                    log.write(line)
                    log.flush()
                if (now := epochs_logged(job)) > epochs:
                    self.bar.update(now - epochs)
                    epochs = now
            code = child.wait()
            self.children.discard(child)
        finally:
            with suppress(OSError):
                log.close()
        if code:
            raise UserError(f"{' '.join(line.split()) or f'exit status {code}'} (see {console})")

    def stop(self) -> None:
        """Terminate the child processes; their last checkpoints stay."""
        self.stopping = True
        for child in list(self.children):
            child.terminate()


def run_jobs(jobs: list[Job], gpus: list[str], code: dict[str, str]) -> None:
    """Run the unfinished jobs, with one progress bar over their epochs."""
    waiting = [job for job in jobs if job.results is None]
    say(f"{len(jobs)} jobs, {len(jobs) - len(waiting)} of them done already")
    total = sum(job.args.num_epoch for job in waiting)
    already = sum(epochs_done(job) for job in waiting)
    bar = tqdm(total=total, initial=already, unit="epoch", dynamic_ncols=True, disable=None)
    runner = Runner(bar, gpus, code)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler)
    with bar, ThreadPoolExecutor(max(1, len(gpus))) as pool:
        try:
            list(pool.map(runner.run, waiting))
        except KeyboardInterrupt:
            runner.stop()
            raise
