"""Runs the jobs of reproduce.py on SLURM, or as processes of this machine, through submitit.

A submitted job has submission.json in its folder, with its id: later calls find it there. The file
is removed when a call has reported how the job ended. A job that fails writes the reason to
error.txt. cluster/ holds submitit's files and logs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import submitit
from easydict import EasyDict
from tqdm import tqdm

from tools._reproduce_jobs import Job, code_version, read_record
from tools._reproduce_runner import Runner, cpu_slots, gpu_slots, set_aside
from utils.console import say
from utils.errors import UserError
from utils.files import PROJECT, read_file, write_atomically
from utils.text import visible

# At this signal train.py saves; submitit's own choice, USR2, would kill it.
WARNING = "USR1"
submitit.JobEnvironment.USR_SIG = WARNING
os.environ["SUBMITIT_PREEMPT_SIGNAL"] = WARNING  # the same in child processes

RECORD, ERROR = "submission.json", "error.txt"
NO_PROCESS = "no such process"
POLL_SECONDS = 1.0
LATE_SECONDS = 60.0  # files of another machine may be seen this late on a network file system
SAVE_SECONDS = 120  # from the warning to the end of the time limit
MOST_TIMEOUTS = 1000  # a job ends when it is done, however often its time runs out
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "REVOKED", "TIMEOUT",
}  # fmt: skip
SIGNALS_OF_TORCHRUN = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # those that it passes on


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Cluster").add_argument
    add("--cluster", choices=["slurm", "local"], default="",
        help="submit the jobs to SLURM, or as processes of this machine")  # fmt: skip
    add("--partition", default=None, help="SLURM's partition (default: that of the cluster)")
    add("--gpus_per_job", type=int, default=1, metavar="INT",
        help="GPUs of a job, each with a process; 0: a CPU (default: 1)")  # fmt: skip
    add("--cpus_per_job", type=int, default=8, metavar="INT", help="cores of a job (default: 8)")
    add("--time", type=int, default=720, metavar="INT",
        help="minutes until a job saves and is put back into the queue (default: 720)")  # fmt: skip
    add("--slurm", nargs="+", default=[], metavar="NAME=VALUE",
        help="further parameters of sbatch, such as mem=64G account=mine")  # fmt: skip
    add("--no_wait", action="store_true", default=False,
        help="only submit to SLURM; the same command without it prints the table")  # fmt: skip


class Submission:
    """What the cluster runs: a job, from its last checkpoint on.

    Args:
        gpus: value of CUDA_VISIBLE_DEVICES; if empty, that of the cluster.
        processes: of train.py and test.py.
    """

    def __init__(self, job: Job, gpus: str, processes: int) -> None:
        self.job, self.gpus, self.processes = job, gpus, processes
        self.runner: Runner | None = None
        self.thread: threading.Thread | None = None

    def __call__(self) -> None:
        """Run the job, unless it is done. Its folder receives done.json or error.txt, or neither if
        it was stopped."""
        if self.job.results is not None:
            return
        launcher = [
            "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes),
            "--signals_to_handle", SIGNALS_OF_TORCHRUN,
        ]  # fmt: skip
        self.runner = runner = Runner(
            tqdm(disable=True),
            gpu_slots([self.gpus]) if self.gpus else cpu_slots(1),
            code_version(),
            launcher if self.processes > 1 else [],
        )
        signal.signal(signal.SIGTERM, lambda *_: runner.stop())
        # In a thread, which still reads the output of train.py while `checkpoint` waits for it.
        self.thread = threading.Thread(target=runner.run, args=(self.job,))
        self.thread.start()
        self.thread.join()
        if self.job.error and not runner.stopping:
            text = self.job.error.encode()
            write_atomically(self.job.folder / ERROR, lambda file: file.write(text))

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Let train.py save and end. submitit calls this at the warning, then queues the job again
        with what this returns."""
        if self.runner and self.thread:
            self.runner.stop()
            self.thread.join()
        again = Submission(replace(self.job, error=""), self.gpus, self.processes)
        return submitit.helpers.DelayedSubmission(again)


class Cluster:
    """SLURM or this machine, and what it gives to each job. Raises UserError for wrong options."""

    def __init__(self, given: EasyDict) -> None:
        self.given, self.name = given, given.cluster
        per_job, local = given.gpus_per_job, given.cluster == "local"
        for name, least in (("gpus_per_job", 0), ("cpus_per_job", 1), ("time", 1)):
            if given[name] < least:
                raise UserError(f"--{name} {given[name]}: must be at least {least}")
        if wrong := [text for text in given.slurm if not re.fullmatch(r"[\w-]+(=.+)?", text)]:
            raise UserError(f"--slurm {wrong[0]}: expected name=value, such as mem=64G")
        if local and (given.partition or given.slurm or given.no_wait):
            raise UserError("--partition, --slurm and --no_wait are for --cluster slurm")
        if given.gpus and not local:
            raise UserError("--gpus: SLURM chooses the GPUs; give their number: --gpus_per_job")
        if given.gpus and (not per_job or len(given.gpus) % per_job):
            raise UserError(f"--gpus: {len(given.gpus)} GPUs are no multiple of the --gpus_per_job")
        # One local job runs at a time on each of these; submitit would hide the user's choice.
        starts = range(0, len(given.gpus), per_job or 1)
        self.slots = [",".join(given.gpus[i : i + per_job]) for i in starts] or [
            os.environ.get("CUDA_VISIBLE_DEVICES", "") if local else ""
        ]

    def free_slot(self, submitted: list[Job]) -> str | None:
        """GPUs for another job, or None if it has to wait for one of those submitted."""
        if self.name == "slurm":
            return ""
        taken = [_record(job)["gpus"] for job in submitted]
        return next((slot for slot in self.slots if slot not in taken), None)

    def submit(self, job: Job, gpus: str) -> None:
        """Submit a job and record its id. Raises UserError if the cluster refuses it."""
        if job.retrain:
            set_aside(job)
        executor = self._executor(job)
        (job.folder / ERROR).unlink(missing_ok=True)
        submission = Submission(job, gpus, max(1, self.given.gpus_per_job))
        # Ctrl-C must not come between the submission and its record; and local jobs, which inherit
        # this, go on when this command is stopped or its terminal is closed.
        with _ignored(signal.SIGINT, signal.SIGHUP):
            try:
                submitted = executor.submit(submission)
            except (RuntimeError, OSError) as error:
                reason = " ".join(str(error).split())
                raise UserError(f"{job.label}: not submitted: {reason} (--cluster)") from None
            record = {"cluster": self.name, "id": submitted.job_id, "gpus": gpus}
            text = json.dumps(record).encode()
            write_atomically(job.folder / RECORD, lambda file: file.write(text))
        say(visible(f"{job.label}: submitted as {_name(job)}; {job.folder / 'console.txt'}"))

    def _executor(self, job: Job) -> submitit.Executor:
        given, folder = self.given, job.folder / "cluster"
        path = f"PYTHONPATH={PROJECT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
        python = shlex.join(["env", path, sys.executable])
        minutes, before_end = given.time, min(SAVE_SECONDS, 30 * given.time)
        if self.name == "local":
            executor: submitit.Executor = submitit.LocalExecutor(
                folder, MOST_TIMEOUTS, python=python
            )
            executor.update_parameters(
                timeout_min=minutes, gpus_per_node=given.gpus_per_job, signal_delay_s=before_end
            )
            return executor
        try:
            executor = submitit.SlurmExecutor(folder, MOST_TIMEOUTS, python=python)
        except RuntimeError:
            raise UserError("--cluster slurm: no srun here; start this on the cluster") from None
        further = dict(text.partition("=")[::2] for text in given.slurm)
        executor.update_parameters(
            job_name=job.args.name,
            partition=given.partition,
            time=minutes,
            ntasks_per_node=1,
            cpus_per_task=given.cpus_per_job,
            gpus_per_node=given.gpus_per_job or None,
            signal_delay_s=before_end,
            srun_args=[f"--cpus-per-task={given.cpus_per_job}"],  # sbatch's is not srun's
            additional_parameters={"requeue": True, **{k: v or True for k, v in further.items()}},
        )
        return executor


def run_on_cluster(jobs: list[Job], cluster: Cluster) -> bool:
    """Submit the unfinished jobs that are not on the cluster yet, and wait until all have ended.

    Returns whether all have ended: not with --no_wait.
    """
    submitted, waiting = [], []
    for job in jobs:
        if (job.folder / RECORD).is_file():
            if (state := state_of(job)) in ("queued", "running", "done", "failed"):
                job.retrain = False
                submitted.append(job)
                continue
            say(visible(f"{job.label}: {_name(job)} has gone ({state}); it is submitted again"))
        if job.results is None:
            waiting.append(job)
    counts = Counter(done=len(jobs) - len(submitted) - len(waiting))
    say(f"{len(jobs)} jobs, {counts['done']} done and {len(submitted)} submitted already")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler)
    gone: dict[Path, float] = {}  # when a job without a result was first seen to have ended
    shown = ""
    bar = tqdm(total=len(jobs), initial=counts["done"], unit="job", disable=None)
    try:
        while waiting or submitted:
            while waiting and (slot := cluster.free_slot(submitted)) is not None:
                cluster.submit(waiting[0], slot)
                submitted.append(waiting.pop(0))
            if cluster.given.no_wait:
                return False
            states = [(job, state_of(job)) for job in submitted]
            ended = [job for job, state in states if _has_ended(job, state, gone)]
            submitted = [job for job in submitted if job not in ended]
            counts.update("failed" if job.error else "done" for job in ended)
            bar.update(len(ended))
            now = counts + Counter(state for job, state in states if job in submitted)
            now["not submitted"] = len(waiting)
            text = ", ".join(f"{count} {state}" for state, count in sorted(now.items()) if count)
            bar.set_postfix_str(text)
            if bar.disable and text != shown:  # not a terminal
                say(f"{len(jobs)} jobs: {text}")
            shown = text
            time.sleep(POLL_SECONDS if submitted else 0)
    except KeyboardInterrupt:
        ids = " ".join(_record(job)["id"] for job in submitted)
        end = "scancel" if cluster.name == "slurm" else "kill"
        say(f"{len(submitted)} jobs go on; the same command finds them; to end them: {end} {ids}")
        raise
    finally:
        bar.close()
    return True


def state_of(job: Job) -> str:
    """How a submitted job stands: queued, running, done or failed.

    If it has ended without a result: SLURM's word for that (TIMEOUT, ...), or NO_PROCESS on this
    machine. Raises UserError if its record is corrupted.
    """
    record = _record(job)
    if record["cluster"] == "local":
        state = "running" if _is_running(record["id"], job.folder) else NO_PROCESS
    else:
        word = submitit.SlurmJob.watcher.get_state(record["id"]).split()[0]
        active = "running" if word in ("RUNNING", "COMPLETING", "SUSPENDED") else "queued"
        state = word if word in ENDED else active
    # After the state: a job writes its result before it ends.
    if job.results is not None:
        return "done"
    return "failed" if (job.folder / ERROR).is_file() else state


def _has_ended(job: Job, state: str, gone: dict[Path, float]) -> bool:
    """Whether a job has ended; if so, report how and remove its record."""
    if state in ("queued", "running"):
        return False
    if state == "failed":
        error = read_file(job.folder / ERROR).decode(errors="replace")
        job.error = str(UserError(error))
    elif state != "done":
        first = gone.setdefault(job.folder, time.monotonic())
        if state != NO_PROCESS and time.monotonic() - first < LATE_SECONDS:
            return False
        logs = job.folder / "cluster"
        job.error = (
            f"{_name(job)} has ended without a result ({state}; see {logs}); the same command "
            "submits it again, from its last checkpoint"
        )
    (job.folder / RECORD).unlink()
    say(visible(f"FAILED {job.label}: {job.error}" if job.error else f"{job.label}: done"))
    return True


def _record(job: Job) -> dict[str, str]:
    """The cluster, id and GPUs of a submitted job. Raises UserError if they are corrupted."""
    record = read_record(job.folder / RECORD, dict)
    fields = {"cluster": "slurm|local", "id": r"\d+", "gpus": ".*"}
    if not all(re.fullmatch(form, str(record.get(name))) for name, form in fields.items()):
        raise UserError(
            f"{job.folder / RECORD}: corrupted; delete it, and the job is submitted again"
        )
    return record


def _name(job: Job) -> str:
    record = _record(job)
    return f"{'SLURM job' if record['cluster'] == 'slurm' else 'process'} {record['id']}"


def _is_running(pid: str, folder: Path) -> bool:
    """Whether submitit's process for a job runs: its number may belong to another one by now."""
    if sys.platform == "linux":  # where containers may lack ps
        try:
            command = read_file(f"/proc/{pid}/cmdline").decode(errors="replace")
        except OSError:
            return False
    else:
        ps = ["ps", "-ww", "-p", pid, "-o", "args="]
        command = subprocess.run(ps, capture_output=True, text=True).stdout
    return "submitit.local._local" in command and str(folder.absolute()) in command


@contextmanager
def _ignored(*signals: signal.Signals) -> Iterator[None]:
    """Ignore signals, also in child processes that are started here."""
    handlers = [signal.signal(number, signal.SIG_IGN) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)
